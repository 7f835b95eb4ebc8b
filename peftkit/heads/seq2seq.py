"""An encoder–decoder's own output: the encoder reads the source, the decoder predicts each token of the target.

    loss = − Σ_t log p(target_t | source, start, target_1, …, target_{t−1})

An example holds source and target one after the other, and ``labels`` tell them apart: -100 on the source. A batch
holds them side by side, each padded to its own longest row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from peftkit.heads.causal_lm import CausalLM
from peftkit.schema.registries import HEADS
from peftkit.schema.types import Batch, Row

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

NAME = "seq2seq_lm"
IGNORE = -100


@HEADS.register(NAME)
@dataclass(frozen=True)
class Seq2SeqLM(CausalLM):
    """Predicts the tokens of a target from a source; loss, perplexity and accuracy are those of its tokens."""

    encodes_source: ClassVar[bool] = True
    model_inputs: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask", "labels")
    proof_tokens: ClassVar[int | None] = None
    pipeline_tag: ClassVar[str] = "text2text-generation"

    target_length: int = 128
    """Most tokens of a target, for planning."""

    @classmethod
    def auto_class(cls, pooling: str) -> str:
        return "AutoModelForSeq2SeqLM"

    def collate(self, columns: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase) -> Batch:
        """``input_ids`` and ``attention_mask`` [rows, source], ``labels`` [rows, target] with -100 on the padding.

        Padding is on the right on both sides, whatever the tokenizer's own: BART counts positions from the first token.
        """
        import torch
        from torch.nn.utils.rnn import pad_sequence

        pairs = list(zip(columns["input_ids"], columns["labels"], strict=True))
        sources = [
            torch.tensor([token for token, label in zip(*pair, strict=True) if label == IGNORE]) for pair in pairs
        ]
        targets = [torch.tensor([label for label in labels if label != IGNORE]) for _, labels in pairs]
        batch = {
            "input_ids": pad_sequence(sources, batch_first=True, padding_value=int(tokenizer.pad_token_id or 0)),
            "attention_mask": pad_sequence([torch.ones_like(source) for source in sources], batch_first=True),
            "labels": pad_sequence(targets, batch_first=True, padding_value=IGNORE),
        }
        if "weight" in columns:
            batch["weight"] = torch.tensor(columns["weight"], dtype=torch.float32)
        return batch

    def loss(self, model: torch.nn.Module, batch: Batch, pooling: str) -> torch.Tensor:
        """Cross-entropy summed over the tokens of the targets, the end of text among them."""
        return super().loss(model, with_decoder_inputs(model, batch), pooling)

    def outputs(self, model: torch.nn.Module, batch: Batch, pooling: str) -> dict[str, torch.Tensor]:
        return super().outputs(model, with_decoder_inputs(model, batch), pooling)

    def plain_logits(self, model: torch.nn.Module, batch: Batch, pooling: str) -> torch.Tensor:
        """[target tokens, vocabulary], with the decoder's inputs as transformers makes them of the labels."""
        logits: torch.Tensor = model(**{name: batch[name] for name in self.model_inputs}, use_cache=False).logits
        return logits.float()[batch["labels"] != IGNORE]

    def example_batch(self, rows: int, tokens: int, *, packed: bool = False) -> Batch:
        """``tokens`` are those of source and target: half for the target, or fewer where it cannot be as long."""
        import torch

        target = min(self.target_length, max(1, tokens // 2))
        lengths = {"input_ids": max(1, tokens - target), "decoder_input_ids": target + 1, "labels": target + 1}
        batch = {name: torch.zeros((rows, length), dtype=torch.int64) for name, length in lengths.items()}
        return batch | {"attention_mask": torch.ones_like(batch["input_ids"]), "weight": torch.ones(rows)}

    def parts(self, example: Row) -> Sequence[tuple[str, slice]]:
        source = sum(label == IGNORE for label in example["labels"])
        return (("source", slice(0, source)), ("target", slice(source, None)))

    def lead_texts(self, train: Any, rows: Any) -> tuple[list[str], str]:
        """As many sentences as targets of training have, their median."""
        import statistics

        from peftkit.evaluation.text_metrics import sentences

        most = max(1, round(statistics.median(len(sentences(target)) for target in train["target"])))
        texts = [text[: [0, *(end for _, end in sentences(text)[:most])][-1]] for text in rows["text"]]
        return texts, f"the first {most} sentences" if most > 1 else "the first sentence"

    def summary(self) -> str:
        return "writes a text from another one"

    def usage_code(self, pooling: str, max_length: int) -> list[str]:
        return [
            f'inputs = tokenizer("a text", truncation=True, max_length={max_length}, return_tensors="pt")',
            "output = model.generate(**inputs, max_new_tokens=64)",
            "print(tokenizer.decode(output[0], skip_special_tokens=True))",
        ]

    def peftkit_code(self) -> list[str]:
        return ['print(model.generate("a text", max_new_tokens=64)[0])']


def with_decoder_inputs(model: Any, batch: Batch) -> Batch:
    """The batch as a causal model's loss reads it: position t of ``decoder_input_ids`` predicts label t + 1.

    transformers shifts the labels behind the architecture's own start (mBART's is the language's code). A last
    position is appended, which predicts nothing, and a first label that nothing predicts.
    """
    import torch

    from peftkit.models.blocks import unwrap

    if "decoder_input_ids" in batch:
        return batch
    labels, base = batch["labels"], unwrap(model)
    pad = base.config.pad_token_id
    shifted = base.prepare_decoder_input_ids_from_labels(labels.clone())
    extra = labels.new_full((len(labels), 1), 0)
    decoder = torch.cat([shifted, extra + (pad or 0)], dim=1)
    return batch | {"decoder_input_ids": decoder, "labels": torch.cat([extra + IGNORE, labels], dim=1)}
