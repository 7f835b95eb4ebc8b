"""Summaries of news articles (CNN/DailyMail) with LoRA on FLAN-T5 small.

    accelerate launch recipes/summarize_lora.py

Needs: the hub (310 MB of weights, 840 MB of data), 4 GB of memory; a GPU helps, since articles are long.
Without the hub, on a T5 or BART folder and a table with the columns article and highlights:
    accelerate launch recipes/summarize_lora.py model.source=FOLDER data.source=FILE.csv
Reached: not measured yet.
"""

from peftkit import Recipe, main, recipe


@recipe
def summarize_lora() -> Recipe:
    """See et al. 2017 (arXiv:1704.04368): 5,000 of 287,113 articles, each with its highlights as the summary."""
    return Recipe(
        name="summarize_lora",
        model={"source": "google/flan-t5-small", "revision": "0fc9ddf78a1e988dac52e2dac162b0ede4fd74ab"},
        method={"kind": "lora", "rank": 16, "alpha": 32, "target_modules": "all-linear"},
        task={"kind": "seq2seq", "prefix": "summarize: ", "max_target_length": 128, "too_long": "drop"},
        data={
            "source": "abisee/cnn_dailymail",
            "revision": "96df5e686bee6baa90b8bee7c28b81fa3fa6223d",
            "subset": "3.0.0",
            "text": "article",
            "label": "highlights",
            "max_length": 512,
            "limit": {"train": 5000, "validation": 500, "test": 500},
        },
        training={"epochs": 2, "batch_size": 16, "learning_rate": 1e-3},
        evaluation={
            "baselines": ["zero_shot", "lead"],
            "generation": {"samples": 8, "test_rows": "all", "max_new_tokens": 128, "num_beams": 4},
        },
    )


if __name__ == "__main__":
    main(summarize_lora)
