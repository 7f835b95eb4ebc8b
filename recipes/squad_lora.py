"""SQuAD 1.1, answers to questions in paragraphs of Wikipedia, with LoRA on DistilRoBERTa.

    accelerate launch recipes/squad_lora.py

Needs: the hub (330 MB of weights, 16 MB of data), 6 GB of memory; a GPU, with 87,599 questions to train on.
The official validation questions are the test split here; a tenth of the training contexts is held out to choose the
checkpoint. SQuAD 2.0, with questions that have no answer, whose threshold is chosen on the held-out ones:
    accelerate launch recipes/squad_lora.py data.source=rajpurkar/squad_v2 \\
        data.revision=3ffb306f725f7d2ce8394bc1873b24868140c412
Without the hub, on the official files: data.source=FOLDER with train.json and test.json, data.revision=null.
Reached: not measured.
"""

from peftkit import Recipe, get_recipe, main, recipe, replace


@recipe
def squad_lora() -> Recipe:
    """Rajpurkar et al. 2016 (arXiv:1606.05250): the part of a paragraph that answers a question."""
    return replace(
        get_recipe("own_questions"),
        name="squad_lora",
        model={"source": "distilbert/distilroberta-base", "revision": "fb53ab8802853c8e4fbdbcd0529f21fc6f459b2b"},
        data={
            "source": "rajpurkar/squad",
            "revision": "7b6d24c440a36b6815f21b70d25016731768db1f",
            "splits": {"test": "validation"},
        },
        training={"epochs": 2, "batch_size": 32, "learning_rate": 5e-4},
    )


if __name__ == "__main__":
    main(squad_lora)
