"""A causal language model that learns which of its possible answers is better; see ``preference_losses``.

An example of ``preference_pairs`` holds two sequences, the prompt with the chosen and with the rejected answer, which
are rows 2i and 2i + 1 of the batch: one forward pass, in which the output layer computes the answers' tokens only. An
example of ``preference_marks`` holds one, and a second that is read without gradient: the prompt with another row's
answer, from which the reference point of KTO is estimated.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from peftkit.heads.causal_lm import CausalLM
from peftkit.heads.preference_losses import DPO, KTO, MARKS, PAIRS, PairLoss, PreferenceLoss
from peftkit.schema.head import Outputs, Statistics, StoredPredictions
from peftkit.schema.registries import HEADS
from peftkit.schema.types import Batch, Row

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedTokenizerBase

    from peftkit.schema.recipe import EvaluationConfig

DEFAULT, DEFAULT_OF_MARKS = DPO(), KTO()
FALL = 0.1
"""Nats per answer by which both log-probabilities must have fallen before it is reported."""
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Preference(CausalLM):
    """What both heads share."""

    scores_tokens: ClassVar[bool] = False

    sequences: ClassVar[int] = 1
    """Rows of a batch for one example."""

    objective: PreferenceLoss = DEFAULT

    # -- a reference -----------------------------------------------------------------------------------------------

    def reference_splits(self) -> tuple[str, ...]:
        """All splits; held-out ones only where the loss has no reference, for the change since training began."""
        return SPLITS if self.objective.uses_reference else SPLITS[1:]

    def reference_outputs(self, model: torch.nn.Module, batch: Batch, pooling: str) -> dict[str, torch.Tensor]:
        """``reference``: the log-probability of every answer token of an example, [examples, most of an example]."""
        from torch.nn.utils.rnn import pad_sequence

        logps_S, rows_S = _log_probabilities(model, batch)
        examples = rows_S // self.sequences
        counts = examples.bincount(minlength=len(batch["input_ids"]) // self.sequences).tolist()
        padded = pad_sequence(list(logps_S.float().split(counts)), batch_first=True, padding_value=float("nan"))
        return {"reference": padded}

    # -- the loss --------------------------------------------------------------------------------------------------

    def loss(self, model: torch.nn.Module, batch: Batch, pooling: str) -> torch.Tensor:
        """The loss summed over the examples."""
        return self._scores(model, batch)["loss"].sum()

    def loss_and_measures(
        self, model: torch.nn.Module, batch: Batch, pooling: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        scores = self._scores(model, batch)
        with torch.no_grad():
            measured = self._measures(scores, batch)
            pairs = [torch.stack([value.float(), count.float()]) for value, count in measured.values()]
        return scores["loss"].sum(), torch.stack(pairs)

    @abstractmethod
    def _scores(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """``loss`` [examples], and whatever else is known of each example."""

    @abstractmethod
    def _measures(
        self, scores: Mapping[str, torch.Tensor], batch: Batch
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """``measures`` by name, each as a sum and what divides it."""

    def _answers(
        self, model: torch.nn.Module, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Of every sequence: log π, log π₀ or None, tokens scored, Σ ½ (log π − log π₀)² over these; each [rows]."""
        import torch

        logps_S, rows_S = _log_probabilities(model, batch)
        zeros = logps_S.new_zeros(len(batch["input_ids"]))
        tokens = zeros.index_add(0, rows_S, torch.ones_like(logps_S))
        logps = zeros.index_add(0, rows_S, logps_S)
        if "reference" not in batch:
            return logps, None, tokens, torch.zeros_like(zeros)
        stored = batch["reference"]
        reference_S = stored[~stored.isnan()].to(logps_S)
        divergence = (logps_S.detach() - reference_S).square() / 2
        return logps, zeros.index_add(0, rows_S, reference_S), tokens, zeros.index_add(0, rows_S, divergence)

    # -- evaluation ------------------------------------------------------------------------------------------------

    def outputs(self, model: torch.nn.Module, batch: Batch, pooling: str) -> dict[str, torch.Tensor]:
        """``loss`` and ``weight`` [examples], and log-probabilities of the answers with those of the reference."""
        return {**self._scores(model, batch), "weight": batch["weight"].float()}

    def metrics(self, outputs: Outputs, evaluation: EvaluationConfig) -> dict[str, float]:
        """``loss``, ``reward_accuracy``, ``reward_margin``, ``chosen_reward``, ``rejected_reward``, ``chosen_logprob``,
        ``rejected_logprob``; and where the reference is known ``chosen_change``, ``rejected_change`` and
        ``kl_per_token``. See ``docs/preferences.md``.
        """
        import numpy as np

        loss = float(outputs["loss"].mean(dtype="float64"))
        values = self._statistics(outputs)(np.arange(len(outputs["loss"])))
        return {"loss": loss, **{name: value for name, value in values.items() if np.isfinite(value)}}

    def metric_names(self, evaluation: EvaluationConfig) -> tuple[str, ...]:
        return ("loss", "reward_accuracy", "reward_margin", "chosen_logprob", "rejected_logprob")

    def statistics(self, outputs: Outputs) -> Statistics:
        return self._statistics(outputs)

    @abstractmethod
    def _statistics(self, outputs: Outputs) -> Statistics:
        """All metrics but the loss, of any choice of rows."""

    def warnings(self, metrics: Mapping[str, float]) -> Sequence[tuple[str, str]]:
        """Likelihood displacement: the margin grows while both answers become less likely (arXiv:2410.08847)."""
        changes = [metrics.get(name, 0.0) for name in ("chosen_change", "rejected_change")]
        if not all(change < -FALL for change in changes):
            return ()
        remedy = "lower training.learning_rate or raise task.loss.beta"
        if "nll_weight" in type(self.objective).model_fields:
            remedy += ", or set task.loss.nll_weight=1"
        message = (
            f"likelihood displacement: both answers are less likely than before training, the chosen by "
            f"{-changes[0]:.1f} and the rejected by {-changes[1]:.1f} nats on average, so something else has become "
            f"likelier; read the generations, and {remedy}"
        )
        return (("likelihood_displacement", message),)

    def summary(self) -> str:
        return "answers as preferred in comparisons"

    def peftkit_code(self) -> list[str]:
        return ['print(model.generate("Why is the sky blue?", max_new_tokens=64)[0])']


@HEADS.register(PAIRS)
@dataclass(frozen=True)
class PreferencePairs(Preference):
    """Ranks a chosen answer over a rejected one."""

    sequences: ClassVar[int] = 2
    measures: ClassVar[tuple[str, ...]] = (
        "reward_accuracy", "reward_margin", "chosen_reward", "rejected_reward", "chosen_logprob", "rejected_logprob",
    )  # fmt: skip

    objective: PairLoss = DEFAULT

    def collate(self, columns: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase) -> Batch | None:
        """Rows 2i and 2i + 1 are the chosen and the rejected sequence of example i; ``weight`` is of the examples."""
        import torch

        from peftkit.data.batching import collate

        if "chosen_tokens" not in columns:
            return None
        split = {
            name: [part for row, cut in zip(columns[name], columns["chosen_tokens"]) for part in (row[:cut], row[cut:])]
            for name in ("input_ids", "labels")
            if name in columns
        }
        return collate(split, tokenizer) | {"weight": torch.tensor(columns["weight"], dtype=torch.float32)}

    def parts(self, example: Row) -> Sequence[tuple[str, slice]]:
        cut = example["chosen_tokens"]
        return ("chosen", slice(None, cut)), ("rejected", slice(cut, None))

    def example_batch(self, rows: int, tokens: int, *, packed: bool = False) -> Batch:
        """Two sequences of half the tokens for each row."""
        import torch

        half = max(2, -(-tokens // 2))
        batch = {name: torch.zeros((2 * rows, half), dtype=torch.int64) for name in ("input_ids", "labels")}
        return batch | {"weight": torch.ones(rows)}

    def _scores(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        answers = self._answers(model, batch)
        logps, reference, tokens, divergence = (None if one is None else one.view(-1, 2) for one in answers)
        assert logps is not None
        assert tokens is not None
        assert divergence is not None
        # before training, and in planning, there is no reference: it is the model itself
        used = (logps.detach() if reference is None else reference) if self.objective.uses_reference else None
        scores = {
            "loss": self.objective.losses(logps, used, tokens),
            "rewards": self.objective.rewards(logps.detach(), used, tokens),
            "logps": logps.detach(), "tokens": tokens, "divergence": divergence,
        }  # fmt: skip
        return scores if reference is None else scores | {"reference_logps": reference}

    def _measures(
        self, scores: Mapping[str, torch.Tensor], batch: Batch
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        (chosen, rejected), count = scores["rewards"].T, scores["loss"].new_tensor(len(scores["loss"]))
        values = ((chosen > rejected).sum(), (chosen - rejected).sum(), chosen.sum(), rejected.sum(),
                  *scores["logps"].sum(0))  # fmt: skip
        return {name: (value, count) for name, value in zip(self.measures, values, strict=True)}

    def _statistics(self, outputs: Outputs) -> Statistics:
        import numpy as np

        columns = {
            name: np.asarray(outputs[name], dtype=float) for name in ("rewards", "logps", "tokens", "divergence")
        }
        before = np.asarray(outputs["reference_logps"], dtype=float) if "reference_logps" in outputs else None

        def statistics(rows: np.ndarray) -> dict[str, float]:
            chosen, rejected = columns["rewards"][rows].T
            logps = columns["logps"][rows].mean(axis=0)
            values = {
                "reward_accuracy": float((chosen > rejected).mean()),
                "reward_margin": float((chosen - rejected).mean()),
                "chosen_reward": float(chosen.mean()), "rejected_reward": float(rejected.mean()),
                "chosen_logprob": float(logps[0]), "rejected_logprob": float(logps[1]),
            }  # fmt: skip
            if before is not None:
                change = logps - before[rows].mean(axis=0)
                values |= {"chosen_change": float(change[0]), "rejected_change": float(change[1])}
                values["kl_per_token"] = float(columns["divergence"][rows].sum() / columns["tokens"][rows].sum())
            return values

        return statistics

    def prediction_rows(self, outputs: Outputs, rows: Sequence[Row]) -> list[Row]:
        """Where each example begins, its loss, and rewards and log-probabilities of its answers."""
        return [
            {
                "file": row.get("_file"), "line": row.get("_line"), "loss": round(float(loss), 6), "tokens": 1.0,
                **{f"{name}_reward": round(float(value), 6) for name, value in zip(("chosen", "rejected"), rewards)},
                **{f"{name}_logprob": round(float(value), 6) for name, value in zip(("chosen", "rejected"), logps)},
            }
            for row, loss, rewards, logps in zip(
                rows, outputs["loss"], outputs["rewards"], outputs["logps"], strict=True
            )
        ]  # fmt: skip

    def read_predictions(self, lines: Sequence[Row]) -> StoredPredictions:
        """Compared by loss, and by the rewards."""
        import numpy as np

        chosen, rejected = (
            np.array([line[f"{name}_reward"] for line in lines], dtype=float) for name in ("chosen", "rejected")
        )
        return _stored(
            lines,
            lambda rows: {
                "reward_accuracy": float((chosen[rows] > rejected[rows]).mean()),
                "reward_margin": float((chosen[rows] - rejected[rows]).mean()),
            },
        )


@HEADS.register(MARKS)
@dataclass(frozen=True)
class PreferenceMarks(Preference):
    """Makes good answers likelier and bad ones less likely."""

    measures: ClassVar[tuple[str, ...]] = (
        "chosen_reward", "rejected_reward", "chosen_logprob", "rejected_logprob", "kl",
    )  # fmt: skip
    sums_batches: ClassVar[bool] = True

    objective: KTO = DEFAULT_OF_MARKS

    def collate(self, columns: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase) -> Batch | None:
        """Besides the usual: ``desirable`` [rows], and the prompts with other rows' answers as ``mismatched_``…"""
        import torch

        from peftkit.data.batching import collate

        if "mismatched_ids" not in columns:
            return None
        batch = collate(columns, tokenizer)
        other = collate({"input_ids": columns["mismatched_ids"], "labels": columns["mismatched_labels"]}, tokenizer)
        return (
            batch
            | {f"mismatched_{name}": tensor for name, tensor in other.items()}
            | {"desirable": torch.tensor(columns["desirable"], dtype=torch.bool)}
        )

    def parts(self, example: Row) -> Sequence[tuple[str, slice]]:
        return (("good" if example["desirable"] else "bad", slice(None)),)

    def example_batch(self, rows: int, tokens: int, *, packed: bool = False) -> Batch:
        import torch

        batch = {name: torch.zeros((rows, tokens), dtype=torch.int64) for name in ("input_ids", "labels")}
        other = {f"mismatched_{name}": tensor for name, tensor in batch.items()}
        return {**batch, **other, "desirable": torch.ones(rows, dtype=torch.bool), "weight": torch.ones(rows)}

    def reference_outputs(self, model: torch.nn.Module, batch: Batch, pooling: str) -> dict[str, torch.Tensor]:
        """Besides ``reference``: ``mismatched_reference``, the log-probability of the other row's answer, [rows]."""
        logps, _ = _mismatched(model, batch)
        return {**super().reference_outputs(model, batch, pooling), "mismatched_reference": logps.float()}

    def batch_sums(self, model: torch.nn.Module, batch: Batch, pooling: str) -> torch.Tensor:
        """[sum of log π − log π₀ of prompts with other rows' answers, how many there are]."""
        import torch

        ratios, paired = self._mismatched_ratios(model, batch)
        return torch.stack([ratios.sum(), paired.sum()])

    def _mismatched_ratios(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """log π − log π₀ of other rows' answers, 0 where there is none; and 1 where there is one, else 0: [rows]."""
        logps, tokens = _mismatched(model, batch)
        reference = batch["mismatched_reference"].to(logps) if "mismatched_reference" in batch else logps
        return logps - reference, (tokens > 0).to(logps)

    def _scores(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        logps, reference, tokens, divergence = self._answers(model, batch)
        ratios = logps - (logps.detach() if reference is None else reference)
        kl = ratios.new_zeros(())
        if "batch_sums" in batch:
            total, count = batch["batch_sums"].to(ratios)
            kl = total / count.clamp(min=1)
        scores = {
            "loss": self.objective.losses(ratios, batch["desirable"], kl), "kl": kl,
            "logps": logps.detach(), "ratios": ratios.detach(), "tokens": tokens, "divergence": divergence,
        }  # fmt: skip
        return scores if reference is None else scores | {"reference_logps": reference}

    def _measures(
        self, scores: Mapping[str, torch.Tensor], batch: Batch
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        good, rewards = batch["desirable"].float(), self.objective.beta * scores["ratios"]
        bad, rows = 1 - good, good.new_tensor(len(good))
        values = ((rewards * good).sum(), (rewards * bad).sum(), (scores["logps"] * good).sum(),
                  (scores["logps"] * bad).sum(), scores["kl"].clamp(min=0) * rows)  # fmt: skip
        return dict(zip(self.measures, zip(values, (good.sum(), bad.sum(), good.sum(), bad.sum(), rows)), strict=True))

    def outputs(self, model: torch.nn.Module, batch: Batch, pooling: str) -> dict[str, torch.Tensor]:
        """As ``Preference``; the loss is without the reference point, which ``complete`` knows."""
        ratios, paired = self._mismatched_ratios(model, batch)
        outputs = super().outputs(model, batch, pooling)
        outputs.pop("kl")
        return {**outputs, "desirable": batch["desirable"], "mismatched": ratios, "paired": paired}

    def complete(self, outputs: Outputs) -> Outputs:
        """With the loss at the reference point of the whole split."""
        import torch

        ratios, desirable = (torch.from_numpy(outputs[name]) for name in ("ratios", "desirable"))
        loss = self.objective.losses(ratios, desirable > 0, torch.tensor(_mean_ratio(outputs)))
        return {**outputs, "loss": loss.numpy()}

    def _statistics(self, outputs: Outputs) -> Statistics:
        import numpy as np

        columns = {name: np.asarray(array, dtype=float) for name, array in outputs.items()}
        beta, known = self.objective.beta, "reference_logps" in columns

        def statistics(rows: np.ndarray) -> dict[str, float]:
            of = {name: array[rows] for name, array in columns.items()}
            good, kl = of["desirable"] > 0, max(0.0, _mean_ratio(of))
            right = np.where(good, of["ratios"] > kl, of["ratios"] < kl)
            means = {}
            for name, chosen in (("chosen", good), ("rejected", ~good)):
                means[f"{name}_reward"] = beta * _mean(of["ratios"][chosen])
                means[f"{name}_logprob"] = _mean(of["logps"][chosen])
                if known:
                    means[f"{name}_change"] = _mean(of["ratios"][chosen])
            values = {
                "reward_accuracy": float(right.mean()),
                "reward_margin": means["chosen_reward"] - means["rejected_reward"],
                **means, "kl": kl,
            }  # fmt: skip
            return values | ({"kl_per_token": float(of["divergence"].sum() / of["tokens"].sum())} if known else {})

        return statistics

    def prediction_rows(self, outputs: Outputs, rows: Sequence[Row]) -> list[Row]:
        """Where each example begins, its loss and its mark, and its answer's reward and log-probability."""
        columns = ("loss", "desirable", "ratios", "logps")
        return [
            {
                "file": row.get("_file"), "line": row.get("_line"), "loss": round(float(loss), 6), "tokens": 1.0,
                "mark": "good" if good > 0 else "bad", "reward": round(self.objective.beta * float(ratio), 6),
                "logprob": round(float(logp), 6),
            }
            for row, loss, good, ratio, logp in zip(rows, *(outputs[name] for name in columns), strict=True)
        ]  # fmt: skip

    def read_predictions(self, lines: Sequence[Row]) -> StoredPredictions:
        """Compared by loss, and by the rewards' margin."""
        import numpy as np

        good = np.array([line["mark"] == "good" for line in lines])
        rewards = np.array([line["reward"] for line in lines], dtype=float)
        return _stored(
            lines,
            lambda rows: {"reward_margin": _mean(rewards[rows][good[rows]]) - _mean(rewards[rows][~good[rows]])},
        )


def _log_probabilities(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probability of every answer token, and the row that it belongs to, [S] each."""
    from peftkit.models.kernels import linear_cross_entropy

    losses_S, rows_S = linear_cross_entropy.token_losses(model, batch)
    return -losses_S, rows_S


def _mismatched(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """log π of the prompts with other rows' answers, and the tokens of these, [rows] each, without gradient."""
    import torch

    with torch.no_grad():
        start = "mismatched_"
        own = {name.removeprefix(start): tensor for name, tensor in batch.items() if name.startswith(start)}
        logps_S, rows_S = _log_probabilities(model, own)
        zeros = logps_S.new_zeros(len(own["input_ids"]))
        return zeros.index_add(0, rows_S, logps_S), zeros.index_add(0, rows_S, torch.ones_like(logps_S))


def _mean_ratio(outputs: Outputs) -> float:
    """The mean log-ratio of prompts with other rows' answers."""
    return float(outputs["mismatched"].sum(dtype="float64")) / max(1.0, float(outputs["paired"].sum()))


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _stored(lines: Sequence[Row], statistics: Statistics) -> StoredPredictions:
    """Stored predictions with these statistics and the loss."""
    import numpy as np

    from peftkit.evaluation.resampling import of_loss

    losses = of_loss(np.array([line["loss"] for line in lines], dtype=float), np.ones(len(lines)))
    gold = np.array([line.get("mark", "pair") for line in lines])
    return StoredPredictions(gold, lambda rows: {**statistics(rows), **losses(rows)})
