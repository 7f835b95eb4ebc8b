"""Writes docs/methods.md from the methods' own classes: python docs/generate_methods.py"""

from __future__ import annotations

from pathlib import Path

from peftkit.methods.table import markdown

TARGET = Path(__file__).with_name("methods.md")
OPENING = """\
# Methods

One line chooses the method of any recipe: `method=vera`, or `method.kind=vera` with fields of its own beside it.
`peftkit list --methods` prints this list; `peftkit schema` every field with its meaning.

"""
CLOSING = """

A mark says that a recipe of that kind is taken, trained and loaded again in a fresh process with equal outputs (by
plain peft, bottleneck adapters and BitFit by peftkit), and that the merged model, where it merges, gives them too;
`tests/methods/test_every_method.py` holds the marks to it on tiny models. `classifier` is one on an encoder. Where
there is no mark the recipe is refused before anything is loaded, with the reason. Some fields narrow it further: the
PiSSA, OLoRA and orthogonal starts of LoRA and the bat variant of MiSS need whole weights, LoftQ needs NF4, DoRA takes
no INT8. BitFit needs a base with biases. Prompt tuning and p-tuning are refused for classifiers built on decoders,
prefix tuning for architectures that take no keys and values from outside, and for checkpointed activations. `peft`
takes quantized weights for the types that leave the weights below them alone. Rows under a learned prompt are never
packed. Checkpoints whose weights are quantized already (GPTQ, AWQ, torchao, bitsandbytes) are taken as they are where
their kernels are installed; LoRA and all methods without layers of their own over linear ones stand on each of them.
GPTQ's and AWQ's layers are given kernels that have a backward pass, and keep them through evaluations. HQQ's are
refused with versions of transformers that cannot read them (5.23 is one). AWQ is checked by its config alone.
"""


def page() -> str:
    """The whole page."""
    return OPENING + markdown() + CLOSING


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
