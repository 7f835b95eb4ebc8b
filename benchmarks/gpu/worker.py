"""One contestant on one piece of work, in a process of its own; prints one JSON line of figures last.

    python benchmarks/gpu/worker.py CASE.json

The first epoch warms up; each later one is timed from the end of a step to the end of a step, the device synchronized,
and counts as a repeat. Tokens are those of the rows, without padding.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

CUDA = torch.cuda.is_available()
PROFILED = (5, 7)
"""The steps after which the profiler starts and stops."""


class Clock:
    """When each step ended, and the peaks of memory from the first step on."""

    def __init__(self, profile: str | None = None) -> None:
        self.ends: list[float] = []
        self.profile = profile
        """A file for the kernels of PROFILED steps; the times are then not those of an undisturbed run."""
        self._profiler: Any = None

    def start(self) -> None:
        if CUDA:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def step(self) -> None:
        if CUDA:
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        if self.profile and len(self.ends) == PROFILED[0]:
            self._profiler = torch.profiler.profile(record_shapes=True)
            self._profiler.start()
        if self.profile and len(self.ends) == PROFILED[1]:
            self._profiler.stop()
            self._write_profile(Path(self.profile))

    def _write_profile(self, file: Path) -> None:
        averages = self._profiler.key_averages()
        seconds = self.ends[PROFILED[1] - 1] - self.ends[PROFILED[0] - 1]
        busy = sum(getattr(event, "self_device_time_total", 0) for event in averages) / 1e6
        calls = sum(event.count for event in averages if event.key == "cudaLaunchKernel")
        lines = [f"{PROFILED[1] - PROFILED[0]} steps: {seconds:.3f} s, device busy {busy:.3f} s, launches {calls}"]
        for key in ("self_device_time_total", "self_cpu_time_total") if CUDA else ("self_cpu_time_total",):
            lines.append(averages.table(sort_by=key, row_limit=45, max_name_column_width=60))
        file.write_text("\n".join(lines), encoding="utf-8")

    def figures(self, epochs: int, tokens: int, rows: int) -> dict[str, Any]:
        """Medians over the epochs after the first, and the peaks."""
        steps = len(self.ends) // epochs
        times = [self.ends[steps * n - 1] - self.ends[steps * (n - 1) - 1] for n in range(2, epochs + 1)]
        middle = sorted(times)[len(times) // 2]
        found: dict[str, Any] = {
            "tokens_per_second": tokens / middle, "rows_per_second": rows / middle,
            "epoch_seconds": [round(value, 4) for value in times], "steps_per_epoch": steps,
            "step_seconds": middle / steps, "tokens": tokens,
        }  # fmt: skip
        if CUDA:
            found["peak_allocated_gb"] = torch.cuda.max_memory_allocated() / 1e9
            found["peak_reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
        return found


def peftkit_run(case: dict[str, Any], clock: Clock) -> dict[str, Any]:
    """peftkit, by a recipe."""
    import peftkit
    from peftkit.training.loop import Loop

    real = Loop._step

    def step(self: Any, *arguments: Any, **options: Any) -> None:
        if not clock.ends:
            clock.start()
        real(self, *arguments, **options)
        clock.step()

    Loop._step = step  # type: ignore[method-assign]
    lengths: dict[str, int] = {}

    def keep(self: Any, *arguments: Any, **options: Any) -> None:
        lengths["tokens"] = int(self.train_split.lengths.sum())
        return run(self, *arguments, **options)

    run, Loop.run = Loop.run, keep  # type: ignore[method-assign]
    recipe = peftkit.Recipe.parse(case["recipe"])
    found: dict[str, Any] = {}
    if case.get("plan"):
        from peftkit.planning.plan import make_plan

        plan = make_plan(recipe)
        tensors = plan.peak.total - plan.peak.parts["framework"]
        found |= {"planned_peak_gb": tensors / 1e9, "planned_phase": plan.peak.name}
        found["planned_parts_gb"] = {name: size / 1e9 for name, size in plan.peak.parts.items()}
        found["planned_seconds"] = plan.training_seconds
    done = peftkit.train(recipe, quiet=True, final=False)
    training = done.metrics.get("training", {})
    found |= {key: training[key] for key in ("flops_per_token", "matmul_flops_per_second") if key in training}
    found |= clock.figures(case["epochs"], lengths["tokens"], case["rows"])
    if "flops_per_token" in found:
        found["flops_utilization"] = (
            found["flops_per_token"] * found["tokens_per_second"] / found["matmul_flops_per_second"]
        )
    return found


def trl_run(case: dict[str, Any], clock: Clock) -> dict[str, Any]:
    """trl's SFTTrainer with peft."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    quantized: dict[str, Any] = {}
    if case["nf4"]:
        quantized["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
    if CUDA:
        quantized["device_map"] = {"": 0}
    rows = [json.loads(line) for line in Path(case["file"]).read_text(encoding="utf-8").splitlines()]
    conversations = [
        {
            "prompt": [{"role": "user", "content": "\n\n".join(filter(None, (row["instruction"], row["input"])))}],
            "completion": [{"role": "assistant", "content": row["output"]}],
        }
        for row in rows
    ]
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(case["model"], dtype=torch.bfloat16, **quantized),
        processing_class=AutoTokenizer.from_pretrained(case["model"]),
        train_dataset=Dataset.from_list(conversations),
        peft_config=lora("CAUSAL_LM", "all-linear"),
        callbacks=[callback(clock)],
        args=SFTConfig(
            output_dir=case["out"], max_length=case["max_length"], per_device_train_batch_size=case["batch_size"],
            num_train_epochs=case["epochs"], learning_rate=2e-4, lr_scheduler_type="linear", save_strategy="no",
            report_to=[], use_cpu=not CUDA, **case["options"],
        ),
    )  # fmt: skip
    tokens = sum(len(row) for row in trainer.train_dataset["input_ids"])
    trainer.train()
    return clock.figures(case["epochs"], tokens, case["rows"])


def trainer_run(case: dict[str, Any], clock: Clock) -> dict[str, Any]:
    """transformers' Trainer with peft, on texts with labels."""
    import csv

    from datasets import Dataset
    from peft import get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(case["model"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with Path(case["file"]).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = sorted({row["label"] for row in rows})
    encoded = [
        {**tokenizer(row["text"], truncation=True, max_length=case["max_length"]), "label": names.index(row["label"])}
        for row in rows
    ]
    model = AutoModelForSequenceClassification.from_pretrained(case["model"], num_labels=len(names))
    model.config.pad_token_id = tokenizer.pad_token_id
    trainer = Trainer(
        model=get_peft_model(model, lora("SEQ_CLS", case["targets"])),
        train_dataset=Dataset.from_list(encoded),
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[callback(clock)],
        args=TrainingArguments(
            output_dir=case["out"], per_device_train_batch_size=case["batch_size"], num_train_epochs=case["epochs"],
            learning_rate=2e-4, save_strategy="no", report_to=[], use_cpu=not CUDA, **case["options"],
        ),
    )  # fmt: skip
    trainer.train()
    return clock.figures(case["epochs"], sum(len(row["input_ids"]) for row in encoded), case["rows"])


def lora(task: str, targets: Any) -> Any:
    """The adapter that every contestant trains."""
    from peft import LoraConfig

    return LoraConfig(task_type=task, r=16, lora_alpha=32, lora_dropout=0.0, target_modules=targets)


def callback(clock: Clock) -> Any:
    """Tells a Trainer's steps to the clock."""
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        def on_step_begin(self, *arguments: Any, **options: Any) -> None:
            if not clock.ends:
                clock.start()

        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            clock.step()

    return Steps()


CONTESTANTS: dict[str, Callable[[dict[str, Any], Clock], dict[str, Any]]] = {
    "peftkit": peftkit_run, "trl": trl_run, "trainer": trainer_run,
}  # fmt: skip


def main() -> None:
    """Carries out one case."""
    case = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    started = time.perf_counter()
    found = CONTESTANTS[case["contestant"]](case, Clock(case.get("profile")))
    print(json.dumps({**found, "process_seconds": time.perf_counter() - started}))


if __name__ == "__main__":
    main()
