"""Losses that learn from which answer is better: the choices of ``task.loss``.

Notation: y⁺ the chosen and y⁻ the rejected answer to a prompt x, |y| tokens of an answer with its stop token,
log π(y|x) the sum over them, π₀ the model as it is before training, σ the logistic function.

    Δ = [log π(y⁺|x) − log π₀(y⁺|x)] − [log π(y⁻|x) − log π₀(y⁻|x)]

A loss is of a row; the loss of a batch is the mean over its rows, whatever their lengths.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from peftkit.registry import Registry
from peftkit.schema.sections import ConfigSection

if TYPE_CHECKING:
    from torch import Tensor

PAIRS, MARKS = "preference_pairs", "preference_marks"
"""Heads of rows with two answers, and of rows with one that is good or bad."""
LOSSES: Registry[Any] = Registry("preference loss", group="peftkit.preference_losses")
Positive = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Smoothing = Annotated[float, Field(ge=0, lt=0.5)]


class PreferenceLoss(ConfigSection):
    """How the preference becomes a number to minimize."""

    head: ClassVar[str]
    """Name of the head that has such rows."""
    uses_reference: ClassVar[bool] = True
    """Whether it compares with the model before training."""

    kind: str
    beta: Positive


class PairLoss(PreferenceLoss):
    """A loss of a chosen and a rejected answer."""

    head: ClassVar[str] = PAIRS
    per_token: ClassVar[bool] = False
    """Whether the reward is per token of an answer."""

    nll_weight: Weight

    def rewards(self, logps: Tensor, reference: Tensor | None, tokens: Tensor) -> Tensor:
        """The implicit reward of every answer, β · (log π − log π₀), or β · log π without a reference; per token where
        the loss is.

        Args:
            logps, reference: log-probabilities [rows, 2], chosen and rejected.
            tokens: of the answers, [rows, 2].
        """
        difference = logps if reference is None else logps - reference
        return self.beta * (difference / tokens if self.per_token else difference)

    def losses(self, logps: Tensor, reference: Tensor | None, tokens: Tensor) -> Tensor:
        """The loss of every row, [rows]; arguments as of ``rewards``."""
        rewards = self.rewards(logps, reference, tokens)
        losses = self.of_rewards(rewards, logps / tokens)
        return losses - self.nll_weight * logps[:, 0] / tokens[:, 0] if self.nll_weight else losses

    @abstractmethod
    def of_rewards(self, rewards: Tensor, per_token: Tensor) -> Tensor:
        """The loss of every row without the likelihood of the chosen answer.

        Args:
            rewards: [rows, 2].
            per_token: mean log-probabilities of the answers' tokens, [rows, 2].
        """


def _sigmoid(difference: Tensor, smoothing: float) -> Tensor:
    """−log σ(d), or with label smoothing ε: −(1 − ε) log σ(d) − ε log σ(−d)."""
    import torch.nn.functional as F

    losses = -F.logsigmoid(difference)
    return losses if not smoothing else (1 - smoothing) * losses - smoothing * F.logsigmoid(-difference)


@LOSSES.register("dpo")
class DPO(PairLoss):
    """−log σ(β Δ), direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290)."""

    kind: Literal["dpo"] = "dpo"
    beta: Positive = 0.1
    """How strongly the model is held near the one before training; the larger, the nearer."""
    label_smoothing: Smoothing = 0.0
    """Share of the preferences that are assumed to be the wrong way round (conservative DPO, Mitchell 2023)."""
    nll_weight: Weight = 0.0
    """Weight of the chosen answer's negative log-likelihood per token, which keeps its likelihood from falling
    (arXiv:2404.19733)."""

    def of_rewards(self, rewards: Tensor, per_token: Tensor) -> Tensor:
        return _sigmoid(rewards[:, 0] - rewards[:, 1], self.label_smoothing)


@LOSSES.register("ipo")
class IPO(PairLoss):
    """(Δ per token − 1 / 2β)², identity preference optimization (Azar et al. 2023, arXiv:2310.12036).

    The log-ratios are per token of their answers, as in the paper's experiments, so that β fits answers of any length.
    """

    kind: Literal["ipo"] = "ipo"
    beta: Positive = 0.1
    """The paper's τ: the log-ratios of chosen and rejected are pulled 1 / 2β apart."""
    nll_weight: Weight = 0.0
    """Weight of the chosen answer's negative log-likelihood per token."""

    per_token: ClassVar[bool] = True

    def of_rewards(self, rewards: Tensor, per_token: Tensor) -> Tensor:
        return ((rewards[:, 0] - rewards[:, 1]) / self.beta - 1 / (2 * self.beta)) ** 2


@LOSSES.register("hinge")
class Hinge(PairLoss):
    """max(0, 1 − β Δ): rows whose margin is large enough count no more (SLiC, Zhao et al. 2023, arXiv:2305.10425)."""

    kind: Literal["hinge"] = "hinge"
    beta: Positive = 0.1
    """A margin of 1 / β in log-ratios is enough."""
    nll_weight: Weight = 0.0
    """Weight of the chosen answer's negative log-likelihood per token."""

    def of_rewards(self, rewards: Tensor, per_token: Tensor) -> Tensor:
        return (1 - (rewards[:, 0] - rewards[:, 1])).relu()


@LOSSES.register("orpo")
class ORPO(PairLoss):
    """−log p⁺ − β log σ(log odds p⁺ − log odds p⁻), p = exp(log π / |y|): without a reference (arXiv:2403.07691).

    Instruction tuning on the chosen answer and the preference at once (Hong et al. 2024). As in the paper, both terms
    are of a row: the likelihood is the mean over the row's answer tokens.
    """

    uses_reference: ClassVar[bool] = False
    per_token: ClassVar[bool] = True

    kind: Literal["orpo"] = "orpo"
    beta: Positive = 0.1
    """Weight of the odds ratio, the paper's λ."""
    nll_weight: Weight = 1.0
    """Weight of the chosen answer's negative log-likelihood per token; 1 in the paper."""

    def of_rewards(self, rewards: Tensor, per_token: Tensor) -> Tensor:
        log_odds = per_token - _log1mexp(per_token)
        return self.beta * _sigmoid(log_odds[:, 0] - log_odds[:, 1], 0.0)


@LOSSES.register("simpo")
class SimPO(PairLoss):
    """−log σ(β/|y⁺| log π(y⁺|x) − β/|y⁻| log π(y⁻|x) − γ): without a reference (Meng et al. 2024, arXiv:2405.14734)."""

    uses_reference: ClassVar[bool] = False
    per_token: ClassVar[bool] = True

    kind: Literal["simpo"] = "simpo"
    beta: Positive = 2.0
    """Scale of the rewards, which are log-probabilities per token."""
    gamma: Weight = 1.0
    """By how much the chosen answer's reward should exceed the rejected one's; the paper takes β/2 or less."""
    label_smoothing: Smoothing = 0.0
    """Share of the preferences that are assumed to be the wrong way round."""
    nll_weight: Weight = 0.0
    """Weight of the chosen answer's negative log-likelihood per token."""

    def of_rewards(self, rewards: Tensor, per_token: Tensor) -> Tensor:
        return _sigmoid(rewards[:, 0] - rewards[:, 1] - self.gamma, self.label_smoothing)


@LOSSES.register("cpo")
class CPO(PairLoss):
    """−log σ(β log π(y⁺|x) − β log π(y⁻|x)) and the chosen answer's likelihood: without a reference (arXiv:2401.08417).

    Contrastive preference optimization (Xu et al. 2024).
    """

    uses_reference: ClassVar[bool] = False

    kind: Literal["cpo"] = "cpo"
    beta: Positive = 0.1
    """Scale of the rewards, which are log-probabilities of the answers."""
    label_smoothing: Smoothing = 0.0
    """Share of the preferences that are assumed to be the wrong way round."""
    nll_weight: Weight = 1.0
    """Weight of the chosen answer's negative log-likelihood per token; 1 in the paper."""

    def of_rewards(self, rewards: Tensor, per_token: Tensor) -> Tensor:
        return _sigmoid(rewards[:, 0] - rewards[:, 1], self.label_smoothing)


@LOSSES.register("kto")
class KTO(PreferenceLoss):
    """w⁺ (1 − σ(r − z)) for a good answer, w⁻ (1 − σ(z − r)) for a bad one (Ethayarajh et al. 2024, arXiv:2402.01306).

    r = β (log π − log π₀) is the answer's reward, and z = β max(0, KL) the reference point, the same for all rows of a
    batch: KL is estimated as the mean log-ratio of prompts with answers to other prompts, and has no gradient.
    """

    head: ClassVar[str] = MARKS

    kind: Literal["kto"] = "kto"
    beta: Positive = 0.1
    """How strongly the model is held near the one before training; the larger, the nearer."""
    desirable_weight: Weight = 1.0
    """Weight of the rows with good answers."""
    undesirable_weight: Weight = 1.0
    """Weight of the rows with bad answers. The paper keeps (desirable_weight × good rows) ÷ (undesirable_weight × bad
    rows) between 1 and 4/3."""

    def losses(self, log_ratios: Tensor, desirable: Tensor, kl: Tensor) -> Tensor:
        """The loss of every row, [rows].

        Args:
            log_ratios: log π − log π₀ of the rows' answers, [rows].
            desirable: bool, [rows].
            kl: the estimate, a scalar.
        """
        import torch

        margin = self.beta * (log_ratios - kl.clamp(min=0))
        good, bad = self.desirable_weight * margin.neg().sigmoid(), self.undesirable_weight * margin.sigmoid()
        return torch.where(desirable, good, bad)


def _log1mexp(value: Tensor) -> Tensor:
    """log(1 − exp(x)) for x < 0 (Mächler 2012); just below 0 where x rounds to it, so that it stays finite."""
    import torch

    value = value.clamp(max=-1e-7)
    return torch.where(value > -0.6931471805599453, (-value.expm1()).log(), (-value.exp()).log1p())
