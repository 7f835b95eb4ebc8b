"""Losses over the vectors of a batch, each × its number of rows, so that ÷ Σ weight is their mean.

Vectors are [rows, texts of a row, width]; similarity is their cosine. Under Matryoshka representation learning
(Kusupati et al. 2022, arXiv:2205.13147) a loss is the mean of those of several prefixes of the vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor], Tensor]


def over_prefixes(loss: Loss, vectors: Tensor, dimensions: Sequence[int]) -> Tensor:
    """The mean of a loss over whole vectors and their first ``dimensions``, each of length 1."""
    widths = [vectors.shape[-1], *(width for width in dimensions if width != vectors.shape[-1])]
    losses = [loss(F.normalize(vectors[..., :width], dim=-1)) for width in widths]
    return torch.stack(losses).mean()


def cosent(vectors: Tensor, scores: Tensor, scale: float) -> Tensor:
    """log(1 + Σ exp(scale · (cos_j − cos_i))) over all pairs of rows with score_i > score_j (Su 2022, CoSENT)."""
    similarity = scale * (vectors[:, 0] * vectors[:, 1]).sum(-1)
    differences = similarity[None, :] - similarity[:, None]  # [i, j] = cos_j − cos_i
    ordered = scores[:, None] > scores[None, :]
    terms = differences[ordered]
    return torch.logsumexp(torch.cat([terms.new_zeros(1), terms]), dim=0) * len(scores)


def cosine_mse(vectors: Tensor, scores: Tensor) -> Tensor:
    """Squared difference of cosine and score (Reimers & Gurevych 2019, arXiv:1908.10084)."""
    return ((vectors[:, 0] * vectors[:, 1]).sum(-1) - scores).square().sum()


def ranking(vectors: Tensor, texts: Tensor, scale: float, *, symmetric: bool) -> Tensor:
    """Multiple negatives ranking (Henderson et al. 2017, arXiv:1705.00652).

    Each row's first text is to find its second among the second and further texts of all rows. Candidates that equal
    the row's own texts, or belong to a row with the same first text, are left out. ``symmetric`` adds the same from the
    second to the first texts, and halves the sum.

    Args:
        texts: [rows, texts of a row], equal where the texts are.
    """
    rows, count = texts.shape
    first = vectors[:, 0]
    candidates = torch.cat([vectors[:, place] for place in range(1, count)])
    names = torch.cat([texts[:, place] for place in range(1, count)])
    queries = torch.cat([texts[:, 0]] * (count - 1))
    is_positive = torch.arange(len(names), device=names.device) < rows
    same = (names[None, :] == texts[:, 1:2]) | (names[None, :] == texts[:, :1])
    same |= (queries[None, :] == texts[:, :1]) & is_positive[None, :]
    loss = _nearest(scale * first @ candidates.T, same)
    if not symmetric:
        return loss
    back = (texts[None, :, 0] == texts[:, :1]) | (texts[None, :, 0] == texts[:, 1:2])
    back |= texts[None, :, 1] == texts[:, 1:2]
    return (loss + _nearest(scale * vectors[:, 1] @ first.T, back)) / 2


def _nearest(scores: Tensor, same: Tensor) -> Tensor:
    """Cross-entropy of finding candidate i for row i, without the others that are the ``same``."""
    own = torch.eye(*scores.shape, dtype=torch.bool, device=scores.device)
    scores = scores.masked_fill(same & ~own, float("-inf"))
    return F.cross_entropy(scores, torch.arange(len(scores), device=scores.device), reduction="sum")


def supervised_contrastive(vectors: Tensor, labels: Tensor, scale: float) -> Tensor:
    """Texts of a class are to find each other (Khosla et al. 2020, arXiv:2004.11362); a class's only text adds 0."""
    scores = scale * vectors[:, 0] @ vectors[:, 0].T
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    chances = scores.masked_fill(itself, float("-inf")).log_softmax(-1).masked_fill(itself, 0.0)
    alike = (labels[None, :] == labels[:, None]) & ~itself
    return -((chances * alike).sum(-1) / alike.sum(-1).clamp(min=1)).sum()
