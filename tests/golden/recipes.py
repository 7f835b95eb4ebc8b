"""Eight small runs whose weights and figures must stay what they are, to the last bit, however the code is arranged.

    python -m tests.golden.recipes            compares them with hashes.json
    python -m tests.golden.recipes --write    writes hashes.json, after a change that is meant to change results

Of every run there are four hashes: of the exported weights, of the adapter's config, of the final figures and of the
log. They hold on every x86-64 processor with AVX2, for the runs are carried out in a process of their own whose
libraries are told to use no newer instructions (``PINNED``), and they hold for the versions of the libraries that
hashes.json names. Only peftkit's public names are used here, so that nothing depends on where a module lies.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HASHES = Path(__file__).with_name("hashes.json")
ROOT = Path(__file__).parents[2]
LIBRARIES = (
    "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors", "bitsandbytes", "numpy",
    "scipy", "scikit-learn",
)  # fmt: skip
"""Whose versions the hashes hold for."""

PINNED = {
    "ATEN_CPU_CAPABILITY": "avx2",  # torch's own kernels; its "default" would call the C library's exp and log
    "MKL_CBWR": "COMPATIBLE",  # torch's matrix products: the one way that processors of all makers have
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",  # matrix products of numpy and scipy
    "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR",
    "ARROW_USER_SIMD_LEVEL": "AVX2",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Environment of the process that trains. bitsandbytes needs nothing: peftkit keeps it from its bf16 kernel, and what
its other kernels compute in fp32, a product of two numbers at a time, is the same with all instructions, as long as
rows are whole blocks of 64 weights: those of narrower layers its AVX-512 kernel opens wrongly (seen in 0.50.2)."""

MEASURED = frozenset({
    "seconds", "rows_per_second", "tokens_per_second", "validation_rows_per_second", "test_rows_per_second",
    "flops_per_second", "matmul_flops_per_second", "flops_utilization", "peak_memory_bytes",
    "planned_peak_memory_bytes", "planned_seconds",
})  # fmt: skip
"""Keys that are left out of metrics.jsonl and of metrics.json's part ``training``: what the machine decides."""
DIGITS, PLACES = 10, 12
"""Significant digits and decimal places of a figure that count: the last ones lie with the C library's log."""

TOPICS = {
    "sports": "game team player match score win lose play ball first last".split(),
    "business": "market stock bank money price oil company trade year day cost".split(),
    "science": "computer software space science data red green blue star new light".split(),
}


# -- what is trained -------------------------------------------------------------------------------------------------


def topics(path: Path, count: int = 60) -> Path:
    """A CSV of rows (text, label) whose words tell the label, ragged in length."""
    generator = random.Random(0)
    rows = []
    for index in range(count):
        label = list(TOPICS)[index % len(TOPICS)]
        words = [generator.choice([*TOPICS[label], "the", "a", "of"]) for _ in range(generator.randint(4, 24))]
        rows.append((f"{' '.join(words)} {index}", label))
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


def passages(path: Path, count: int = 40) -> Path:
    """JSON lines of texts, ragged in length."""
    generator = random.Random(1)
    words = [word for known in TOPICS.values() for word in known]
    texts = [" ".join(generator.choices(words, k=generator.randint(8, 40))) for _ in range(count)]
    return _lines(path, [{"text": text} for text in texts])


def questions(path: Path, count: int = 48) -> Path:
    """JSON lines of instructions and answers."""
    generator = random.Random(2)
    rows = []
    for index in range(count):
        label = generator.choice(list(TOPICS))
        words = " ".join(generator.choices(TOPICS[label], k=generator.randint(1, 6)))
        rows.append({"instruction": f"what is {words} {index}", "input": "", "output": f"the {words} is {label}"})
    return _lines(path, rows)


def _lines(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def materials(folder: Path) -> None:
    """The bases and the data of all recipes."""
    from tests import tiny

    tiny.tiny_bert(folder / "bert")
    tiny.tiny_llama(folder / "llama")
    tiny.tiny_llama(folder / "llama_64", hidden_size=64, intermediate_size=128)
    topics(folder / "topics.csv")
    passages(folder / "passages.jsonl")
    questions(folder / "questions.jsonl")


STEPS = {
    "epochs": 2, "batch_size": 8, "learning_rate": 1e-2, "log_every": 2, "threads": 1, "evaluate_every": 4,
    "save_every": 3,
}  # fmt: skip
DECODER = {
    "model": "llama",
    "method": {"kind": "lora", "rank": 2, "dropout": 0.1},
    "evaluation": {"generation": {"samples": 2, "max_new_tokens": 6}},
}
CHANGES: dict[str, dict[str, Any]] = {
    "lora": {"method": {"kind": "lora", "rank": 4, "dropout": 0.1}, "training": {"micro_batch": 3}},
    "bottleneck": {"method": {"kind": "bottleneck", "reduction_factor": 4, "dropout": 0.1}},
    "frozen": {"method": {"kind": "frozen"}},
    "top_k": {"method": {"kind": "top_k", "k": 1}, "training": {"learning_rate": 2e-3}},
    "full": {"method": {"kind": "full"}, "training": {"learning_rate": 1e-3, "scheduler": "constant_with_warmup"}},
    "style": {**DECODER, "data": "passages.jsonl", "task": {"kind": "style"}},
    "instruction": {**DECODER, "data": "questions.jsonl", "task": {"kind": "instruction", "packing": True}},
    "nf4": {
        **DECODER,
        "model": "llama_64",
        "data": "questions.jsonl",
        "task": {"kind": "instruction"},
        "quantization": {"kind": "nf4"},
        "training": {"batching": "random"},
    },
}
"""By name: what is not as in the classification of topics with a tiny BERT."""


def recipe(name: str, folder: Path, out: Path, seed: int = 0) -> Any:
    """The recipe of a name, on the materials of a folder."""
    import peftkit

    given = {"model": "bert", "data": "topics.csv", **CHANGES[name]}
    plain = {
        **given,
        "name": name,
        "model": {"source": str(folder / given["model"]), "dtype": "float32"},
        "data": {"source": str(folder / given["data"]), "max_length": 32 if given["model"] == "bert" else 64},
        "training": {**STEPS, "seed": seed, **given.get("training", {})},
        "export": {"prove": False},
        "tracking": [],
        "output_dir": str(out),
    }
    return peftkit.Recipe.parse(plain)


# -- what of it is kept ----------------------------------------------------------------------------------------------


def digests(run: Path) -> dict[str, Any]:
    """The hashes of a finished run."""
    exported = run / "adapter" if (run / "adapter").is_dir() else run / "model"
    found: dict[str, Any] = {
        "weights": {
            f"{exported.name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(exported.glob("*.safetensors"))
        }
    }
    if (exported / "adapter_config.json").is_file():
        config = json.loads((exported / "adapter_config.json").read_text(encoding="utf-8"))
        found["adapter_config"] = _digest({**_ordered(config), "base_model_name_or_path": "base"})
    found["metrics"] = _digest(figures(run))
    found["log"] = _digest(log(run))
    return found


def figures(run: Path) -> dict[str, Any]:
    """metrics.json without what was measured of the machine."""
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    metrics["training"] = {name: value for name, value in metrics["training"].items() if name not in MEASURED}
    return _rounded(metrics)


def log(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without rates."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [_rounded({name: value for name, value in line.items() if name not in MEASURED}) for line in lines]


def _ordered(value: Any) -> Any:
    """Lists of names in order: peft writes sets as lists."""
    if isinstance(value, dict):
        return {name: _ordered(held) for name, held in value.items()}
    if isinstance(value, list) and all(isinstance(held, str) for held in value):
        return sorted(value)
    return value


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(held) for name, held in value.items()}
    if isinstance(value, list):
        return [_rounded(held) for held in value]
    return float(f"{round(value, PLACES):.{DIGITS - 1}e}") if isinstance(value, float) else value


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# -- carrying out ----------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Of the libraries, without the build's name (+cpu)."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            found[name] = ""
    return found


def why_not_comparable() -> str | None:
    """What keeps the stored hashes from holding here; None where nothing does."""
    if platform.machine().lower() not in {"x86_64", "amd64"} or not sys.platform.startswith("linux"):
        return f"the hashes are of Linux on x86-64, and this is {sys.platform} on {platform.machine()}"
    here, there = versions(), json.loads(HASHES.read_text(encoding="utf-8"))["versions"]
    changed = [f"{name} {there.get(name)} → {here[name]}" for name in here if there.get(name) != here[name]]
    return f"the hashes are of other versions ({', '.join(changed)})" if changed else None


def computed(folder: Path, *, seed: int = 0, names: tuple[str, ...] = (), python: tuple[str, ...] = ()) -> Any:
    """Hashes by recipe, of runs carried out in a process of their own; folder keeps bases, data and runs."""
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "found.json"
    order = [*(python or (sys.executable,)), "-m", "tests.golden.recipes", "--in", str(folder.resolve()), *names]
    environment = {**os.environ, **PINNED, "PEFTKIT_CACHE": str(folder.resolve() / "cache")}
    done = subprocess.run(
        [*order, "--seed", str(seed)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the runs failed:\n{done.stderr[-4000:]}")
    return json.loads(out.read_text(encoding="utf-8"))


def carry_out(folder: Path, names: tuple[str, ...], seed: int) -> None:
    """What the process of ``computed`` does; its environment must be ``PINNED``."""
    import peftkit

    materials(folder)
    found = {}
    for name in names:
        run = peftkit.train(recipe(name, folder, folder / "runs", seed), quiet=True)
        found[name] = digests(Path(run.path))
    (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Runs whose results must stay what they are.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="recipes; all of them by default")
    parser.add_argument("--write", action="store_true", help="write hashes.json")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep bases, data and runs there")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--in", dest="inside", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    names = tuple(given.names) or tuple(CHANGES)
    if given.inside:
        carry_out(given.inside, names, given.seed)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        found = computed(given.keep or Path(folder), seed=given.seed, names=names)
    if given.write:
        stored = json.loads(HASHES.read_text(encoding="utf-8"))["recipes"] if HASHES.exists() else {}
        whole = {"versions": versions(), "recipes": {**stored, **found}}
        HASHES.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
        return 0
    stored = json.loads(HASHES.read_text(encoding="utf-8"))["recipes"]
    for name in names:
        changed = [what for what in stored[name] if found[name].get(what) != stored[name][what]]
        print(f"{name}: {'changed: ' + ', '.join(changed) if changed else 'the same'}")
    return int(any(found[name] != stored[name] for name in names))


if __name__ == "__main__":
    sys.exit(main())
