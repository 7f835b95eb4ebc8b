"""The untrained base's scores are computed once for the same base and texts, and anew where anything else decides."""

from __future__ import annotations

import peftkit
from peftkit import replace
from peftkit.evaluation import zero_shot_scores


def test_a_second_run_scores_the_base_no_more(small_recipe, monkeypatch, tmp_path):
    monkeypatch.setenv("PEFTKIT_CACHE", str(tmp_path / "cache"))
    calls, real = [], zero_shot_scores.of_encoder

    def counted(*arguments, **options):
        calls.append(len(arguments[2]))
        return real(*arguments, **options)

    monkeypatch.setattr(zero_shot_scores, "of_encoder", counted)
    scored = {"baselines": ["zero_shot"]}
    short = replace(small_recipe, training={"max_steps": 1}, export={"prove": False}, evaluation=scored)
    first = peftkit.train(short, quiet=True).metrics["zero_shot"]
    again = peftkit.train(replace(short, training={"seed": 5}, method={"rank": 2}), quiet=True).metrics["zero_shot"]
    assert again == first
    assert len(calls) == 1
    other = peftkit.train(replace(short, data={"max_length": 3}), quiet=True).metrics["zero_shot"]
    assert len(calls) == 2
    assert other != first
