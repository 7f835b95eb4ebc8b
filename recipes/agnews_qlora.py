"""AG News topics with QLoRA: LoRA on an encoder stored in 4 bits.

    accelerate launch recipes/agnews_qlora.py

Needs: `pip install bitsandbytes`, the hub (330 MB of weights, 20 MB of data); 3 GB of memory. Local files
as for agnews_lora.
Reached: not measured yet.
"""

from peftkit import Recipe, get_recipe, main, recipe, replace


@recipe
def agnews_qlora() -> Recipe:
    """Dettmers et al. 2023 (arXiv:2305.14314): NF4 with double quantization; the head stays in full precision."""
    return replace(get_recipe("agnews_lora"), name="agnews_qlora", quantization={"kind": "nf4"})


if __name__ == "__main__":
    main(agnews_qlora)
