"""What heads share whose answer is the vector of each text: their texts lie close where they are alike."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peftkit.schema.head import Head, Outputs
from peftkit.schema.types import Batch, Prediction, Row

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from peftkit.schema.recipe import EvaluationConfig

VALIDATION_ROWS = 64
"""Rows that are compared with each other for the loss of held-out rows, whatever the batch size."""
NAME_PARTS, NAME_BITS = 3, 20
"""A text is named by numbers that fp32 holds: outputs are kept as such."""
MODULES = ("", "1_Pooling", "2_Normalize")


@dataclass(frozen=True)
class Embedding(Head):
    """A head over the pooled hidden states of each text; a kind of rows has to add ``row_loss`` and its metrics."""

    loss_name: str = "cosent"
    scale: float = 20.0
    symmetric: bool = False
    dimensions: tuple[int, ...] = ()

    adds_layers: ClassVar[bool] = False
    pools: ClassVar[bool] = True
    embeds: ClassVar[bool] = True
    compares_rows: ClassVar[bool] = True
    baselines: ClassVar[tuple[str, ...]] = ("zero_shot",)
    proof_tokens: ClassVar[int | None] = 64
    onnx: ClassVar[bool] = True
    onnx_output: ClassVar[Literal["logits", "vectors"]] = "vectors"
    pipeline_tag: ClassVar[str] = "sentence-similarity"

    @classmethod
    def auto_class(cls, pooling: str) -> str:
        return "AutoModel"

    def configure(self, config: PreTrainedConfig) -> None:
        from peftkit.errors import ModelError, RecipeError

        if getattr(config, "is_encoder_decoder", False):
            raise ModelError(f"{config.model_type} models write texts; choose an encoder or a decoder to embed texts")
        width = int(config.get_text_config().hidden_size)
        if wide := [size for size in self.dimensions if size > width]:
            raise RecipeError(f"task.dimensions: the model's vectors have {width} dimensions, found {wide[0]}")

    # -- training --------------------------------------------------------------------------------------------------

    def collate(self, columns: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase) -> Batch | None:
        """The texts of all rows, one after the other, as rows of the model's inputs; the rest by row."""
        import torch

        from peftkit.data.batching import collate

        if "parts" not in columns:
            return None
        ids, types = [], []
        for row, parts in enumerate(columns["parts"]):
            start = 0
            for length in parts:
                ids.append(columns["input_ids"][row][start : start + length])
                types.append([0] * length)
                start += length
        stacked = {"input_ids": ids} | ({"token_type_ids": types} if "token_type_ids" in columns else {})
        by_row = {
            "labels": torch.tensor(columns["labels"]), "weight": torch.tensor(columns["weight"], dtype=torch.float32),
            "texts": torch.tensor(columns["texts"]),
        }  # fmt: skip
        return collate(stacked, tokenizer) | by_row

    def vectors(self, model: torch.nn.Module, batch: Batch, pooling: str) -> torch.Tensor:
        import torch

        from peftkit.data.batching import cut_texts
        from peftkit.models.architectures import reads_padding

        lengths = batch["attention_mask"].sum(dim=1)
        if lengths.is_meta or not reads_padding(model) or len(set(lengths.tolist())) == 1:
            return self._pooled(model, batch, pooling)
        groups = [(lengths == length).nonzero().flatten() for length in lengths.unique()]
        vectors = torch.cat([self._pooled(model, cut_texts(batch, group), pooling) for group in groups])
        return vectors[torch.cat(groups).argsort()]

    @staticmethod
    def _pooled(model: torch.nn.Module, batch: Batch, pooling: str) -> torch.Tensor:
        from peftkit.models.pooled_logits import model_inputs, pool

        outputs = model(**model_inputs(model, batch))
        if pooling == "own":  # an ONNX file, which pools by itself
            return outputs.vectors
        return pool(outputs.last_hidden_state, batch["attention_mask"], pooling).float()

    def loss(self, model: torch.nn.Module, batch: Batch, pooling: str) -> torch.Tensor:
        return self.batch_loss(self.vectors(model, batch, pooling), batch)

    def batch_loss(self, vectors: torch.Tensor, batch: Batch) -> torch.Tensor:
        from peftkit.heads.layers.similarity_losses import over_prefixes

        rows = vectors.reshape(len(batch["weight"]), -1, vectors.shape[-1])
        return over_prefixes(lambda unit: self.row_loss(unit, batch), rows, self.dimensions)

    @abstractmethod
    def row_loss(self, vectors: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The loss × rows of unit vectors [rows, texts of a row, width]."""

    def outputs(self, model: torch.nn.Module, batch: Batch, pooling: str) -> dict[str, torch.Tensor]:
        """``vectors`` [rows, texts · width], ``labels`` [rows], ``texts`` [rows, texts · NAME_PARTS] that name them."""
        import torch

        rows = len(batch["weight"])
        return {
            "vectors": self.vectors(model, batch, pooling).reshape(rows, -1), "labels": batch["labels"].float(),
            "texts": name_parts(batch["texts"]), "weight": batch["weight"].float(),
            "loss": torch.zeros(rows),
        }  # fmt: skip

    def complete(self, outputs: Outputs) -> Outputs:
        """Adds ``loss`` [rows]: that of a row's group of ``VALIDATION_ROWS``, in the split's order, as their mean."""
        import numpy as np
        import torch

        losses = np.zeros(len(outputs["weight"]))
        if not outputs["weight"].any():  # rows to be predicted
            return {**outputs, "loss": losses}
        for start in range(0, len(losses), VALIDATION_ROWS):
            group = slice(start, start + VALIDATION_ROWS)
            vectors = torch.from_numpy(self.texts_of(outputs)[group])
            batch = {
                "labels": torch.from_numpy(outputs["labels"][group]), "weight": torch.ones(len(vectors)),
                "texts": torch.from_numpy(names_of(outputs)[group]),
            }  # fmt: skip
            losses[group] = float(self.batch_loss(vectors.flatten(0, 1), batch)) / len(vectors)
        return {**outputs, "loss": losses}

    def plain_logits(self, model: torch.nn.Module, batch: Batch, pooling: str) -> torch.Tensor:
        """[rows, width]: the vectors."""
        return self._pooled(model, batch, pooling)

    def example_batch(self, rows: int, tokens: int, *, packed: bool = False) -> Batch:
        """Two texts per row, each of half the tokens."""
        import torch

        shape = (2 * rows, max(1, tokens // 2))
        return {
            "input_ids": torch.zeros(shape, dtype=torch.int64), "attention_mask": torch.ones(shape, dtype=torch.int64),
            "labels": torch.zeros(rows), "weight": torch.ones(rows), "texts": torch.arange(2 * rows).reshape(rows, 2),
        }  # fmt: skip

    # -- evaluation ------------------------------------------------------------------------------------------------

    def texts_of(self, outputs: Outputs, width: int | None = None) -> np.ndarray:
        """Unit vectors [rows, texts of a row, width], of the first ``width`` dimensions."""
        import numpy as np

        count = outputs["texts"].shape[1] // NAME_PARTS
        vectors = np.asarray(outputs["vectors"], dtype=np.float64).reshape(len(outputs["vectors"]), count, -1)
        vectors = vectors[..., :width]
        return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)

    def cosines(self, outputs: Outputs, width: int | None = None) -> np.ndarray:
        """Cosine of the first and the second text of each row."""
        vectors = self.texts_of(outputs, width)
        return (vectors[:, 0] * vectors[:, 1]).sum(-1)

    def metrics(self, outputs: Outputs, evaluation: EvaluationConfig) -> dict[str, float]:
        """``loss``, the named metrics, and under Matryoshka each of them for each of the dimensions, as NAME_64."""
        import numpy as np

        from peftkit.evaluation.decisions import mean_loss

        values, names, rows = {"loss": mean_loss(outputs)}, self._names(evaluation), np.arange(len(outputs["weight"]))
        for width in (None, *self.dimensions):
            known = self.measured(outputs, width)(rows)
            values |= {name if width is None else f"{name}_{width}": known[name] for name in names}
        return values

    @abstractmethod
    def measured(self, outputs: Outputs, width: int | None = None) -> Any:
        """Row numbers → the metrics of these rows, from the first ``width`` dimensions."""

    def metric_names(self, evaluation: EvaluationConfig) -> tuple[str, ...]:
        names = self._names(evaluation)
        return ("loss", *names, *(f"{name}_{width}" for width in self.dimensions for name in names))

    known_metrics: ClassVar[tuple[str, ...]] = ()
    """Metrics of the head, all of which are given where the recipe names none."""

    def _names(self, evaluation: EvaluationConfig) -> tuple[str, ...]:
        from peftkit.errors import RecipeError, did_you_mean

        for name in evaluation.metrics or ():
            if name not in self.known_metrics:
                hint = did_you_mean(name, self.known_metrics)
                raise RecipeError(f"evaluation.metrics: no metric '{name}' of embeddings: {hint}")
        wanted = self.known_metrics if evaluation.metrics is None else evaluation.metrics
        return tuple(dict.fromkeys((*wanted, self.best_metric)))

    def statistics(self, outputs: Outputs) -> Any:
        return self.measured(outputs)

    def compare(self, outputs: Outputs, baseline: Outputs, name: str, confidence: float) -> tuple[Row | None, str]:
        """The paired bootstrap of the head's main metric."""
        from peftkit.evaluation import paired_tests

        trained, other = self.measured(outputs), self.measured(baseline)
        test = paired_tests.paired(
            [lambda rows: trained(rows)[self.best_metric]], [lambda rows: other(rows)[self.best_metric]],
            len(outputs["weight"]), confidence=confidence,
        )  # fmt: skip
        return test, paired_tests.verdict(test, name)

    def predictions(self, outputs: Outputs, threshold: float | None = None) -> list[Prediction]:
        """The cosine of each pair."""
        return [Prediction(float(cosine), None, {}) for cosine in self.cosines(outputs)]

    def label_text(self, label: Any) -> str:
        return f"{label:g}"

    def parts(self, example: Row) -> Sequence[tuple[str, slice]]:
        """The texts of the row."""
        ends = list(itertools.accumulate(example["parts"]))
        names = ("first", "second", *(f"negative {number}" for number in range(1, len(ends) - 1)))
        cuts = (slice(start, end) for start, end in zip([0, *ends], ends))
        return tuple(zip(names if len(ends) > 1 else ("",), cuts))

    # -- the model card --------------------------------------------------------------------------------------------

    def summary(self) -> str:
        return "gives each text a vector; texts that are alike have vectors with a large cosine"

    def usage_code(self, pooling: str, max_length: int) -> list[str]:
        options = f'truncation=True, max_length={max_length}, padding=True, return_tensors="pt"'
        lines_of = {
            "mean": 'mask = inputs["attention_mask"].unsqueeze(-1)\nvectors = (hidden * mask).sum(1) / mask.sum(1)',
            "cls": "vectors = hidden[:, 0]  # the first token",
            "last": 'mask = inputs["attention_mask"]\nlast = (mask * torch.arange(mask.shape[1])).argmax(1)\n'
            "vectors = hidden[torch.arange(len(hidden)), last]",
        }
        pooled = lines_of.get(pooling, lines_of["mean"])
        return [
            "inputs = tokenizer(",
            f'    ["a text", "another text"], {options}',
            ")",
            "with torch.no_grad():",
            "    hidden = model(**inputs).last_hidden_state",
            *pooled.split("\n"),
            "vectors = torch.nn.functional.normalize(vectors, dim=1)",
            "print(vectors @ vectors.T)  # SentenceTransformer(FOLDER).encode gives the same vectors",
        ]

    def onnx_code(self) -> list[str]:
        return [
            "vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)",
            "print(vectors @ vectors.T)  # the cosines",
        ]

    def peftkit_code(self) -> list[str]:
        return ['vectors = model.embed(["a text", "another text"], normalize=True)', "print(vectors @ vectors.T)"]

    def library_files(self, pooling: str, width: int, max_length: int) -> dict[str, Any]:
        """The files of sentence-transformers: transformer, pooling, vectors of length 1."""
        kinds = ("Transformer", "Pooling", "Normalize")
        modules = [
            {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for number, (path, kind) in enumerate(zip(MODULES, kinds))
        ]
        modes = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken"}
        pooled = {f"pooling_mode_{mode}": name == pooling for name, mode in modes.items()}
        return {
            "modules.json": modules,
            "1_Pooling/config.json": {"word_embedding_dimension": width, **pooled},
            "2_Normalize/config.json": {},
            "sentence_bert_config.json": {"max_seq_length": max_length, "do_lower_case": False},
            "config_sentence_transformers.json": {"prompts": {}, "similarity_fn_name": "cosine"},
        }


def name_parts(numbers: torch.Tensor) -> torch.Tensor:
    """[rows, texts] → [rows, texts · NAME_PARTS]: numbers of texts in parts that fp32 holds; see ``names_of``."""
    import torch

    parts = [(numbers >> (NAME_BITS * part)) % (1 << NAME_BITS) for part in range(NAME_PARTS)]
    return torch.stack(parts, dim=-1).reshape(len(numbers), -1)


def names_of(outputs: Outputs) -> np.ndarray:
    """[rows, texts of a row]: numbers that are equal where the texts are."""
    import numpy as np

    parts = np.asarray(outputs["texts"]).astype(np.int64).reshape(len(outputs["texts"]), -1, NAME_PARTS)
    return sum(parts[..., part] << (NAME_BITS * part) for part in range(NAME_PARTS))  # type: ignore[return-value]
