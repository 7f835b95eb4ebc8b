"""A hub on the loopback with a tiny encoder and AG-News-shaped Parquet, under the names that the recipes pin."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from peftkit import get_recipe
from tests.hub.stand_in import HubStandIn, Repository

Runner = Callable[..., subprocess.CompletedProcess[str]]
TOPICS = {
    "World": ["the king said hello to the world", "one world with new peace at last", "the world was sad that day"],
    "Sports": ["the team won the match", "a player of the best team", "match and game were good"],
    "Business": ["the stock market and the bank", "oil price and money", "the bank lost money on oil"],
    "Sci/Tech": ["new computer software in space", "science of space and software", "a computer for science"],
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``model`` and ``data`` as they lie on the hub."""
    from tests.tiny import tiny_roberta

    base = tmp_path_factory.mktemp("repositories")
    model = tiny_roberta(base / "model")
    (model / "README.md").write_text("---\nlicense: apache-2.0\n---\n", encoding="utf-8")
    return {"model": model, "data": write_topics(base / "data")}


def write_topics(folder: Path) -> Path:
    """AG News as it lies on the hub: a card that names the files, and one Parquet file a split with ClassLabel."""
    import datasets

    names = list(TOPICS)
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    (folder / "data").mkdir(parents=True)
    for split, rows in (("train", 15), ("test", 5)):
        columns = {"text": [], "label": []}
        for label, texts in enumerate(TOPICS.values()):
            columns["text"] += [f"{texts[row % 3]} {split} number {row * 7 + label}" for row in range(rows)]
            columns["label"] += [label] * rows
        datasets.Dataset.from_dict(columns, features=features).to_parquet(
            folder / "data" / f"{split}-00000-of-00001.parquet"
        )
    files = "".join(f"  - split: {split}\n    path: data/{split}-*\n" for split in ("train", "test"))
    card = f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n"
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


@pytest.fixture
def hub(folders: dict[str, Path]) -> Iterator[HubStandIn]:
    """The stand-in, serving the model and the data set of agnews_lora at their pinned commits."""
    recipe = get_recipe("agnews_lora")
    repositories = {
        f"models/{recipe.model.source}": Repository(folders["model"], recipe.model.revision),
        f"datasets/{recipe.data.source}": Repository(folders["data"], recipe.data.revision),
        "models/some/gated": Repository(folders["model"], "b" * 40, gated=True),
        "datasets/some/gated": Repository(folders["data"], "c" * 40, gated=True),
    }
    with HubStandIn(repositories) as running:
        yield running


@pytest.fixture
def python(tmp_path: Path) -> Runner:
    """Runs Python in a new process whose hub and whose caches are those given; none of this machine's."""

    def run(*arguments: str, hub: str, offline: bool = False, cache: str = "cache") -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        ours = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / cache), "XDG_CACHE_HOME": str(tmp_path / cache / "xdg")}
        ours |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "1" if offline else "0", "OMP_NUM_THREADS": "1"}
        ours |= {"HF_HUB_DOWNLOAD_TIMEOUT": "5", "HF_HUB_ETAG_TIMEOUT": "5", "NO_PROXY": "127.0.0.1"}
        return subprocess.run(
            [sys.executable, *arguments], env=kept | ours, capture_output=True, text=True, timeout=240, cwd=tmp_path,
            check=False,
        )  # fmt: skip

    return run
