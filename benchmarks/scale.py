"""The tables of docs/scale.md: measured laws extrapolated to more rows, larger models and more GPUs.

    python benchmarks/scale.py [--write]        # prints the tables, or puts them into the page

Nothing is measured here. Bytes and FLOPs of the models come from the planner (``scale_plans.py``), seconds and bytes
per row from ``data_scale.py``, ``growth.py`` and ``scale_checks.py``, all by their JSON in results/. What a GPU and its
links do is assumed, see ``Gpu``.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
COUNTS = (1, 2, 4, 8, 16, 32, 64)
"""GPUs."""
ROWS, GLOBAL_BATCH, TOKENS = 10_000_000, 128, 2048
TOKENS_PER_ROW = 256
"""Mean of instruction rows, for the time of an epoch."""
GB, HOUR = 1e9, 3600


@dataclass(frozen=True)
class Gpu:
    """What is assumed of a GPU, and of what joins several of them."""

    memory: float = 80 * 2**30 - 2e9
    """Bytes of an H100 less 2 GB for its context and what the allocator cannot use."""
    flops: float = 0.32 * 750e12
    """Per second: the share of the matmul rate, and the rate, that benchmarks/gpu measured on an H200 (compiled QLoRA
    of the 8B shape), whose compute units are an H100's."""
    per_node: int = 8
    nvlink: float = 0.8 * 450e9
    """Bytes per second that a GPU sends inside a node: four fifths of NVLink 4 in one direction."""
    network: float = 0.8 * 50e9
    """Bytes per second that a GPU sends to another node: four fifths of 400 Gb/s each."""

    def link(self, count: int) -> float:
        """Bytes per second between so many GPUs."""
        return self.nvlink if count <= self.per_node else self.network


GPU = Gpu()


@dataclass(frozen=True)
class Model:
    """One row of 2,048 tokens of a model under one kind of training, as the planner counts it."""

    parameters: int
    trained_parameters: int
    frozen: int
    constants: int
    trained: int
    states: int
    block: int
    outside_blocks: int
    activations: int
    flops: int

    @property
    def quantized(self) -> bool:
        return self.constants > 0

    @property
    def weights(self) -> int:
        """Bytes of all weights as they are stored."""
        return self.frozen + self.constants + self.trained

    @property
    def copies(self) -> float:
        """Of the activations, what autocast keeps: fp32 weights in bf16 until the forward pass ends."""
        return self.trained / 2 if self.frozen < self.trained else 0.0

    @property
    def checkpoint(self) -> int:
        """Trained weights, AdamW's two moments."""
        return self.trained + self.states


def ring(count: int) -> float:
    """Share of a buffer that each GPU sends in an all-gather or reduce-scatter over a ring; an all-reduce is both."""
    return (count - 1) / count


def ddp_memory(model: Model, count: int) -> float:
    """All of it on every GPU, and DDP's buckets: the gradients once more."""
    buckets = model.trained if count > 1 else 0
    # copies of weights and all gradients are not there at the same moment
    working = max(model.activations, model.trained) if model.copies else model.activations + model.trained
    return model.weights + model.states + working + buckets


def fsdp_memory(model: Model, count: int) -> float:
    """Shards, what is outside of blocks, two gathered blocks; of a quantized base, only the adapters are sharded."""
    sharded = 2 * model.trained + model.states
    if model.quantized:
        return model.frozen + model.constants + model.activations + sharded / count
    gathered = (model.outside_blocks + 2 * model.block) if count > 1 else 0
    return (model.frozen + sharded) / count + gathered + model.activations


def zero2_memory(model: Model, count: int) -> float:
    """Frozen weights and trained ones in bf16 on every GPU; fp32 weights, gradients and states sharded."""
    sharded = 2 * model.trained + model.states
    return model.frozen + model.trained / 2 + sharded / count + model.activations - model.copies


def zero3_memory(model: Model, count: int) -> float:
    """As ZeRO-2, with the weights in bf16 sharded, and gathered as by FSDP2."""
    sharded = model.frozen + 2.5 * model.trained + model.states
    gathered = (model.outside_blocks + 2 * model.block) / (2 if model.copies else 1) if count > 1 else 0
    return sharded / count + gathered + model.activations - model.copies


def ddp_sent(model: Model, count: int, micro_batches: int) -> float:
    """An all-reduce of the fp32 gradients in the last micro-batch of a step."""
    return 2 * ring(count) * model.trained


def fsdp_sent(model: Model, count: int, micro_batches: int) -> float:
    """Each micro-batch gathers blocks twice and the rest once; a reduce-scatter of the fp32 gradients ends the step."""
    gradients = ring(count) * model.trained
    if model.quantized:
        return (2 * micro_batches + 1) * gradients
    blocks = model.weights - model.outside_blocks
    return micro_batches * ring(count) * (2 * blocks + model.outside_blocks) + gradients


def zero2_sent(model: Model, count: int, micro_batches: int) -> float:
    """A reduce-scatter of gradients and an all-gather of trained weights, both in bf16."""
    return ring(count) * 2 * model.trained / 2


def zero3_sent(model: Model, count: int, micro_batches: int) -> float:
    """Each micro-batch gathers all weights twice in bf16; a reduce-scatter of the gradients in bf16 ends the step."""
    weights = model.frozen + model.trained / 2
    return ring(count) * (2 * micro_batches * weights + model.trained / 2)


STRATEGIES: dict[str, tuple[Callable[..., float], Callable[..., float]]] = {
    "DDP": (ddp_memory, ddp_sent),
    "ZeRO-2": (zero2_memory, zero2_sent),
    "ZeRO-3": (zero3_memory, zero3_sent),
    "FSDP2": (fsdp_memory, fsdp_sent),
}
CASES = [
    ("Llama-3.1-8B", "LoRA, NF4", "DDP"), ("Llama-3.1-8B", "LoRA, bf16", "DDP"),
    ("Llama-3.1-8B", "LoRA, bf16", "FSDP2"), ("Llama-3.1-8B", "full, fp32", "ZeRO-2"),
    ("Llama-3.1-8B", "full, fp32", "ZeRO-3"), ("Llama-3.1-8B", "full, fp32", "FSDP2"),
    ("Llama-3.1-70B", "LoRA, NF4", "DDP"), ("Llama-3.1-70B", "LoRA, bf16", "FSDP2"),
    ("Llama-3.1-70B", "full, fp32", "ZeRO-3"), ("Llama-3.1-70B", "full, fp32", "FSDP2"),
]  # fmt: skip


@dataclass(frozen=True)
class Step:
    """A step of the global batch on so many GPUs, rows of 2,048 tokens one by one."""

    compute: float
    """Seconds."""
    communication: float
    """Seconds."""

    @property
    def efficiency(self) -> tuple[float, float]:
        """Share of the time that is compute: nothing overlapped, and everything."""
        return self.compute / (self.compute + self.communication), self.compute / max(self.compute, self.communication)


def step(model: Model, sent: Callable[..., float], count: int) -> Step:
    """The step of a model whose GPUs send that much."""
    micro_batches = GLOBAL_BATCH // count
    return Step(micro_batches * model.flops / GPU.flops, sent(model, count, micro_batches) / GPU.link(count))


def models() -> dict[tuple[str, str], Model]:
    """The planned models by name and kind of training."""
    plans = read("scale_plans")["plans"]
    return {(name, work): Model(**plan) for name, kinds in plans.items() for work, plan in kinds.items()}


def read(name: str) -> dict[str, Any]:
    """A file of results."""
    return dict(json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")))


# -- tables ------------------------------------------------------------------------------------------------------------


def models_table() -> str:
    """What one GPU holds and writes."""
    header = ["model", "training", "trained", "weights", "optimizer", "activations", "checkpoint", "adapter or model",
              "TFLOP per row"]  # fmt: skip
    rows = [
        [name, work, f"{m.trained_parameters / 1e6:,.0f} M", gigabytes(m.weights), gigabytes(m.states),
         gigabytes(m.activations), gigabytes(m.checkpoint), gigabytes(m.trained), f"{m.flops / 1e12:,.0f}"]
        for (name, work), m in models().items()
    ]  # fmt: skip
    return table(header, rows)


def sent_table() -> str:
    """Bytes sent per step and GPU, one row after the other."""
    header = ["model", "training", *(f"{name}, {count} GPUs" for count in (8, 64) for name in STRATEGIES)]
    rows = []
    for (name, work), model in models().items():
        cells = [
            "refused" if strategy.startswith("ZeRO") and model.quantized
            else gigabytes(sent(model, count, GLOBAL_BATCH // count))
            for count in (8, 64) for strategy, (_, sent) in STRATEGIES.items()
        ]  # fmt: skip
        rows.append([name, work, *cells])
    return table(header, rows)


def memory_table() -> str:
    """Bytes per GPU; in brackets where they are more than the GPU has."""

    def cell(size: float) -> str:
        return gigabytes(size) if size <= GPU.memory else f"({gigabytes(size)})"

    return by_count(lambda model, memory, _, count: cell(memory(model, count)), loading=cell)


def speed_table() -> str:
    """Tokens per second, and the share of time that is compute without and with overlap."""

    def cell(model: Model, memory: Callable[..., float], sent: Callable[..., float], count: int) -> str:
        if memory(model, count) > GPU.memory:
            return "–"
        timing = step(model, sent, count)
        low, high = timing.efficiency
        rate = f"{high * GLOBAL_BATCH * TOKENS / timing.compute:,.0f}"
        return f"{rate} ({low:.0%}–{high:.0%})" if count > 1 else rate

    return by_count(cell)


def epoch_table() -> str:
    """Hours of an epoch of ten million rows, everything overlapped."""

    def cell(model: Model, memory: Callable[..., float], sent: Callable[..., float], count: int) -> str:
        timing = step(model, sent, count)
        seconds = max(timing.compute, timing.communication) * ROWS * TOKENS_PER_ROW / (GLOBAL_BATCH * TOKENS)
        return f"{seconds / HOUR:,.0f}" if memory(model, count) <= GPU.memory else "–"

    return by_count(cell)


def by_count(cell: Callable[..., str], loading: Callable[[float], str] | None = None) -> str:
    """A table with a column for each number of GPUs; a dagger where a GPU cannot load what it is to share."""
    rows = []
    for name, work, strategy in CASES:
        model, (memory, sent) = models()[name, work], STRATEGIES[strategy]
        mark = " †" if model.weights > GPU.memory else ""
        first = [loading(model.weights)] if loading else []
        rows.append([name, work, strategy + mark, *first, *(cell(model, memory, sent, count) for count in COUNTS)])
    return table(["model", "training", "", *(["loading"] if loading else []), *map(str, COUNTS)], rows)


def balance_table() -> str:
    """Tokens of a GPU between two messages from which computing takes as long as sending them."""

    def tokens(model: Model, sent: Callable[..., float], count: int) -> str:
        return f"{sent(model, count, 1) / GPU.link(count) * GPU.flops / model.flops * TOKENS:,.0f}"

    columns = {"FSDP2, 8 GPUs": (fsdp_sent, 8), "FSDP2, 64 GPUs": (fsdp_sent, 64), "DDP, 64 GPUs": (ddp_sent, 64)}
    rows = [
        [name, work, *(tokens(model, sent, count) for sent, count in columns.values())]
        for (name, work), model in models().items()
    ]
    return table(["model", "training", *columns], rows)


def rows_table() -> str:
    """AG News' 120,000 rows and ten million of their kind on two cores, from measurements of fewer."""
    data, growth, checks = read("data_scale"), read("growth"), read("scale_checks")
    few, many = data["rows"]
    stages = data["stages"]

    def per_row(stage: str, name: str) -> float:
        return float(stages[str(many)][stage][name] - stages[str(few)][stage][name]) / (many - few)

    longest = max(growth["series"]["rows"], key=lambda point: point["rows"])
    plans = {int(rows): plan for rows, plan in checks["batch plan"].items()}
    most = max(plans)
    cached = max(int(rows) for rows in checks["rows"])
    laws: dict[str, Callable[[int], str]] = {
        "load, check, clean, split: s": lambda n: f"{per_row('prepare', 'processor_seconds') * n:,.0f}",
        "tokenize, one process: s": lambda n: f"{per_row('tokenize', 'processor_seconds') * n:,.0f}",
        "memory added by rows: MB": lambda n: f"{per_row('tokenize', 'anonymous_mb') * n:,.0f}",
        "plan of an epoch's batches: s": lambda n: f"{plans[most]['seconds'] / most * n:,.1f}",
        "– its memory: MB": lambda n: f"{plans[most]['peak_mb'] / most * n:,.0f}",
        "caches of rows and tokens on disk: GB": lambda n: (
            f"{checks['rows'][str(cached)]['cache_mb'] / cached * n / 1e3:,.2f}"
        ),
        "LoRA on all linear layers, an epoch: h": lambda n: (
            f"{longest['train_seconds'] / longest['rows'] * n / HOUR:,.2f}"
        ),
        "features of a frozen backbone, pooled, fp32: GB": lambda n: f"{384 * 4 * n / GB:,.2f}",
        "– of all 53 tokens of a row, for adapters above a cut: GB": lambda n: f"{53 * 384 * 4 * n / GB:,.0f}",
    }
    return table(["rows", "120,000", "10 M"], [[name, law(120_000), law(ROWS)] for name, law in laws.items()])


def checks_table() -> str:
    """What was measured at the small end next to the formulas."""
    checks = read("scale_checks")
    rows = []
    for count, figures in checks["processes"].items():
        if count == "1":  # which sends nothing
            continue
        processes, ddp, fsdp = int(count), figures["ddp"], figures["fsdp2"]
        outside = fsdp["weights"] - fsdp["blocks"]
        reduced = 2 * fsdp["weights"]  # gloo reduces and scatters by an all-reduce
        gathered = ring(processes) * (2 * fsdp["blocks"] + outside + reduced)
        rows += [
            [f"DDP in the training loop, {count} processes: MB sent per step",
             f"{2 * ring(processes) * ddp['trained_bytes'] / 1e6:.2f}", f"{ddp['sent'] / 1e6:.2f}"],
            [f"FSDP2, {count} processes: MB sent per step", f"{gathered / 1e6:.2f}", f"{fsdp['sent'] / 1e6:.2f}"],
            [f"FSDP2, {count} processes: MB of weights per process", f"{fsdp['weights'] / processes / 1e6:.2f}",
             f"{fsdp['local_weights'] / 1e6:.2f}"],
        ]  # fmt: skip
    data = read("data_scale")
    few, many = data["rows"]
    for stage in ("prepare", "tokenize"):
        first, last = (data["stages"][str(count)][stage] for count in (few, many))
        rows += [
            [f"{many:,} rows, {stage}: processor seconds", f"{first['processor_seconds'] * many / few:.1f}",
             f"{last['processor_seconds']:.1f}"],
            [f"{many:,} rows, {stage}: peak memory, MB", f"{first['rss_mb']:,.0f}", f"{last['rss_mb']:,.0f}"],
        ]  # fmt: skip
    return table(["quantity", "expected", "measured"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "rows": rows_table, "models": models_table, "memory": memory_table, "sent": sent_table, "speed": speed_table,
    "balance": balance_table, "epoch": epoch_table, "checks": checks_table,
}  # fmt: skip
"""By the name under which the page holds them."""


def gigabytes(size: float) -> str:
    """Bytes in GB, with as many digits as matter."""
    value = size / GB
    return f"{value:,.0f} GB" if value >= 100 else f"{value:.1f} GB" if value >= 1 else f"{value:.2f} GB"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def filled(page: str) -> str:
    """The page with its tables computed anew."""

    def insert(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n\n{TABLES[match[1]]()}\n\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->.*?<!-- end -->", insert, page, flags=re.S)


def main() -> None:
    """Prints the tables, or writes them into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scale.md")
    if parser.parse_args().write:
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        return
    for name, build in TABLES.items():
        print(f"## {name}\n\n{build()}\n")


if __name__ == "__main__":
    main()
