"""Which way a metric is better."""

from __future__ import annotations

SMALLER_IS_BETTER = frozenset(
    {
        "loss", "mse", "rmse", "mae", "mape", "hamming_loss", "calibration_error", "perplexity", "bits_per_byte",
        "pseudo_perplexity", "wer", "cer", "ter", "brier_score", "repetition", "kl", "kl_per_token", "rejected_reward",
        "rejected_logprob", "rejected_change",
    }
)  # fmt: skip


def greater_is_better(name: str) -> bool:
    """False for errors and losses ("loss", "validation_loss", "mse"), True for all other metrics.

    >>> greater_is_better("f1"), greater_is_better("validation_loss")
    (True, False)
    """
    plain = name.rpartition("/")[2]
    for split in ("train_", "validation_", "test_", "eval_"):
        plain = plain.removeprefix(split)
    return plain not in SMALLER_IS_BETTER
