"""Console output of a run, and its report read back from its folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from peftkit.data.batching import epoch_batches, padding_share, pass_tokens, shard_batch
from peftkit.models.architectures import reads_padding
from peftkit.models.inventory import trainable_table
from peftkit.planning import prediction
from peftkit.reporting import html, tables
from peftkit.schema.head import possible_heads
from peftkit.schema.recipe import Recipe

ABOUT = "about.json"
"""Console output before training, saved for the report."""


class ConsoleReporter:
    """Prints on the main process: tables to stdout, notes to stderr."""

    def __init__(self, *, silent: bool) -> None:
        self._out = tables.console(quiet=silent)
        self._err = Console(stderr=True, highlight=False, quiet=silent, soft_wrap=True)

    def start(self, recipe: Recipe, session: Any, prepared: Any, encoded: Any, loaded: Any) -> dict[str, Any]:
        """Prints model, data and notes, and returns them for the report."""
        about = {
            "summary": summary(recipe),
            "where": session.describe(),
            "data": prepared.fingerprint,
            "rows": prepared.rows_fingerprint,
            "splits": split_rows(encoded, recipe, session.device.type, unpadded=reads_padding(loaded.model)),
            "cleaning": [asdict(step) for step in prepared.steps if step.rows],
            "trainable": [asdict(part) for part in trainable_table(loaded.model)],
            "notes": [*session.notes, *loaded.notes],
        }
        self._out.print(f"{recipe.name}: {about['summary']}\n{about['where']}", markup=False)
        self._out.print(tables.splits(about["splits"]))
        if about["cleaning"]:
            self._out.print(tables.cleaning(about["cleaning"]))
        self._out.print(tables.trainable(about["trainable"]))
        for note in about["notes"]:
            self.warn(note)
        return about

    def warn(self, text: str) -> None:
        self._err.print(f"note: {text}", markup=False)

    def end(self, path: Path) -> None:
        """Prints the results, the run's folder and possible next commands."""
        report = read(path)
        main = html.main_assessment(report)
        if main:
            self._out.print(tables.metrics(report.assessments))
            if report.baselines:
                self._out.print(tables.baselines(main, report.baselines))
        if report.plan:
            self._out.print(tables.plan(report.plan))
        self._out.print(f"\nRun: {path}\nNext:", markup=False)
        for description, command in report.commands:  # one line each, to be copied
            self._out.print(f"  {command}", style="cyan", soft_wrap=True, markup=False)
            self._out.print(f"      {description}", style="dim", markup=False)


def summary(recipe: Recipe) -> str:
    """``lora on ./model, classification of data.csv``."""
    storage = f" in {recipe.quantization.kind}" if recipe.quantization else ""
    source = recipe.data.source if isinstance(recipe.data.source, str) else " + ".join(recipe.data.source)
    return f"{recipe.method.kind} on {recipe.model.source}{storage}, {recipe.task.kind} of {source}"


def split_rows(encoded: Any, recipe: Recipe, device: str, *, unpadded: bool = False) -> list[dict[str, Any]]:
    """One row per split: examples, tokens, longest, truncated, and the padding of one process's micro-batches."""
    rows = []
    for name, split in encoded.splits.items():
        cut = split.examples["truncated"] if "truncated" in split.examples.column_names else []
        row = {
            "split": name,
            "examples": len(split.lengths),
            "tokens": int(split.lengths.sum()),
            "longest": int(split.lengths.max()) if len(split.lengths) else 0,
            "truncated": sum(bool(tokens) for tokens in cut),
            "padding": "",
        }
        if name == "train":
            training = recipe.training
            batches = epoch_batches(split.lengths, training, 0)
            micro_batches = [
                micro.rows
                for batch in batches
                for micro in shard_batch(
                    batch, split.lengths, rank=0, world_size=1, micro_tokens=pass_tokens(training, device),
                    micro_batch=training.micro_batch if isinstance(training.micro_batch, int) else None,
                    unpadded=unpadded,
                )
            ]  # fmt: skip
            row["padding"] = f"{padding_share(split.lengths, micro_batches):.1%} in {len(batches)} batches"
        rows.append(row)
    return rows


def next_commands(path: Path, recipe: Recipe) -> list[tuple[str, str]]:
    """(description, command) of possible next steps after a run."""
    heads = possible_heads(recipe.task)
    use = [("predict a file", f"peftkit predict {path} --file texts.csv --out predictions.csv")]
    if any(head.embeds for head in heads):
        use.append(("search in a file", f'peftkit search {path} --corpus texts.csv --query "…"'))
    if any(head.writes_text for head in heads):
        use = [("generate from a file", f"peftkit generate {path} --file prompts.jsonl")]
        if not any(head.encodes_source for head in heads):
            use.insert(0, ("chat with it", f"peftkit chat {path}"))
    curves = [("view the curves", f"tensorboard --logdir {path}")] if "tensorboard" in recipe.tracking else []
    return [
        ("open the report", str(path / "report.html")),
        *use,
        ("evaluate again", f"peftkit evaluate {path}"),
        *curves,
        ("export", f"peftkit export {path} --to {recipe.name}-{recipe.method.saves}"),
    ]


def read(path: Path) -> html.Report:
    """A run's folder as a report."""
    from peftkit.runs import choices
    from peftkit.runs.environment import ENVIRONMENT
    from peftkit.runs.folder import LOG, METRICS, RECIPE

    recipe = Recipe.from_yaml(path / RECIPE)
    about = _json(path / ABOUT, {})
    metrics, log = _json(path / METRICS, {}), _lines(path / LOG)
    events = [f"step {line['step']}: {line['message']}" for line in log if "event" in line]
    return html.Report(
        title=path.name,
        recipe=recipe.to_yaml(defaults=False),
        summary=about.get("summary", summary(recipe)),
        assessments=_json(path / "assessment.json", {}),
        baselines=_json(path / "baselines.json", []),
        splits=about.get("splits", []),
        cleaning=about.get("cleaning", []),
        trainable=about.get("trainable", []),
        choices=[asdict(choice) for choice in choices.read(path)],
        log=log,
        best_metric=metrics.get("training", {}).get("best_metric"),
        samples=_lines(path / "generations.jsonl"),
        plan=_json(path / prediction.FILE, {}),
        notes=[*about.get("notes", []), *events],
        commands=next_commands(path, recipe),
        environment={**_json(path / ENVIRONMENT, {}), **metrics.get("training", {})},
    )


def write(path: Path) -> None:
    """Writes ``report.html`` and ``plots/``."""
    report = read(path)
    plots = html.plots_of(report)
    (path / "report.html").write_text(html.render(report, plots), encoding="utf-8")
    (path / "plots").mkdir(exist_ok=True)
    for name, image in plots.items():
        (path / "plots" / name).write_bytes(image)


def _json(path: Path, default: Any) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else default


def _lines(path: Path) -> Sequence[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
