"""Fixtures shared by all tests: tiny bases, small data, and an environment that reaches no hub."""

from __future__ import annotations

import csv
import gc
import os
import pathlib
import random

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from peftkit.schema.recipe import Recipe
from tests import tiny, warm

TOPICS = {
    "sports": "game team player match score win lose play ball first last".split(),
    "business": "market stock bank money price oil company trade year day cost".split(),
    "science": "computer software space science data red green blue star new light".split(),
}


LONGEST = (
    "models/kernels/test_compile.py", "test_notebooks.py", "test_docs.py", "plugin/test_plugin.py", "hub/test_hub.py",
    "distributed/test_sharded.py", "experiments/test_compare.py", "export/test_onnx.py", "faults/test_fault_kinds.py",
    "training/test_features.py", "training/test_training_fields.py", "quantize/test_quantize.py", "test_run.py",
)  # fmt: skip
"""Files of half a minute, which start first, so that no worker is left with one while the others are done."""


def pytest_collection_modifyitems(items):
    root = pathlib.Path(__file__).parent
    places = {root / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_collection_finish():
    """Takes libraries and tests out of garbage collection, which visits millions of their objects again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Every test session caches in a folder of its own."""
    os.environ["PEFTKIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def _warm_proofs():
    """Processes that prove exports start warm, but for tests that ask for ``cold_processes``."""
    with warm.proofs():
        yield
    warm.stop()


@pytest.fixture(scope="session", autouse=True)
def _no_plots():
    """Reports and comparisons have no plots, which take longer than a tiny run; gives what draws them."""
    from peftkit.reporting import experiment, html

    real = {html: html.plots_of, experiment: experiment.plots_of}
    with pytest.MonkeyPatch.context() as patch:
        for module in real:
            patch.setattr(module, "plots_of", lambda shown: {})
        yield real


@pytest.fixture(scope="session", autouse=True)
def _few_resamples():
    """Intervals of tiny runs come from few resamples; tests of intervals ask for as many as they need."""
    from peftkit.evaluation import intervals

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(intervals.bootstrap.__kwdefaults__, "resamples", 40)
        yield


@pytest.fixture
def drawn_plots(_no_plots, monkeypatch):
    """Reports and comparisons of this test have their plots."""
    for module, draw in _no_plots.items():
        monkeypatch.setattr(module, "plots_of", draw)


@pytest.fixture
def cold_processes(monkeypatch):
    """Processes of this test are real ones, which import everything anew."""
    monkeypatch.setenv("PEFTKIT_COLD_PROCESSES", "1")


@pytest.fixture(scope="session", autouse=True)
def _without_bf16():
    """With ``PEFTKIT_TESTS_WITHOUT_BF16=1`` (make test-avx2) the processor's bf16 is hidden from peftkit."""
    if os.environ.get("PEFTKIT_TESTS_WITHOUT_BF16") != "1":
        yield
        return
    from peftkit.models import dtypes

    flags = dtypes.cpu_flags() - set(dtypes.CPU_FLAGS)
    dtypes.native_bf16.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dtypes, "cpu_flags", lambda: flags)
        assert not dtypes.native_bf16()
        yield
    dtypes.native_bf16.cache_clear()


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """Folder of a tiny BERT."""
    return tiny.tiny_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """Folder of a tiny Llama with a ChatML template."""
    return tiny.tiny_llama(tmp_path_factory.mktemp("models") / "llama")


def topic_rows(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Rows (text, topic) of words that tell the topic, ragged in length, no two alike."""
    generator = random.Random(seed)
    rows = []
    for index in range(count):
        topic = list(TOPICS)[index % len(TOPICS)]
        words = [generator.choice(TOPICS[topic] + ["the", "a", "of"]) for _ in range(generator.randint(4, 24))]
        rows.append((f"{' '.join(words)} {index}", topic))
    return rows


@pytest.fixture(scope="session")
def topics_csv(tmp_path_factory):
    """A CSV of 90 rows, columns text and label."""
    path = tmp_path_factory.mktemp("data") / "topics.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *topic_rows(90)])
    return path


@pytest.fixture
def small_recipe(bert, topics_csv, tmp_path):
    """A whole classification recipe that trains in a second or two."""
    return Recipe.parse(
        {
            "name": "small",
            "model": {"source": str(bert), "dtype": "float32", "dropout": 0.0},
            "data": {"source": str(topics_csv), "max_length": 32},
            "method": {"kind": "lora", "rank": 4},
            "training": {"epochs": 4, "batch_size": 8, "learning_rate": 1e-2, "log_every": 3, "threads": 1},
            "evaluation": {"baselines": ["majority"]},
            "export": {"prove": False},
            "tracking": [],
            "output_dir": str(tmp_path / "runs"),
        }
    )
