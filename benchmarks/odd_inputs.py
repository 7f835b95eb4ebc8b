"""What peftkit makes of odd data files: each is inspected, and trained on for two steps where it can be read.

    python benchmarks/odd_inputs.py --cases FOLDER

FOLDER holds files that failed in some tool: spellings of labels, tables of many programs, conversations with fields
that mean something. Tiny random models are trained; nothing is asked but how each file is read. Files of conversations
and instructions are read as such, texts without labels as style, all others as classification. Writes
results/odd_inputs.md and ends with 1 if any file led to a traceback or to a message of more than 20 lines.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))
RESULTS = Path(__file__).parent / "results" / "odd_inputs.md"
COLUMNS = {
    "label": ("label", "labels", "Label", "score", "stars", "code", "version", "when", "gold", "category", "on"),
    "text": ("text", "Text", "y"),
}
"""Columns that a person would name, in this order."""
PAIR = ("premise", "hypothesis")
ONE_HOT = ("biz", "sport", "tech")
LINES = 20
UNSUITED = ("no such column", "expected the columns of one of the instruction formats")
"""Refusals after which a person would name other columns."""


def main() -> None:
    """Tries every file, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=Path, required=True)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="peftkit-odd-") as folder:
        os.environ["PEFTKIT_CACHE"] = str(Path(folder) / "cache")
        models = bases(Path(folder))
        for case in sorted(args.cases.iterdir()):
            if args.only in case.name:
                rows.append((case.name, *tried(case, models, Path(folder))))
                print(*rows[-1], sep=" | ", flush=True)
    broken = [row for row in rows if row[2] == "traceback" or row[3].count("\n") >= LINES]
    if not args.only:
        RESULTS.write_text(page(rows, broken), encoding="utf-8")
    sys.exit(bool(broken))


def bases(folder: Path) -> dict[str, Path]:
    """Tiny models by task."""
    from tests import tiny

    llama = tiny.tiny_llama(folder / "llama")
    return {"classification": tiny.tiny_bert(folder / "bert"), "instruction": llama, "style": llama}


def tried(case: Path, models: dict[str, Path], folder: Path) -> tuple[str, str, str]:
    """How a file was asked for, what happened ("trained", "refused", "traceback"), and details."""
    from peftkit.errors import PeftkitError

    asked = "?"
    try:
        for task, columns in ways(case):
            asked = ", ".join([task, *(f"{key}={value}" for key, value in columns.items())])
            try:
                return asked, *carried_out(case, task, columns, models[task], folder)
            except PeftkitError as error:
                refusal = str(error)
                if not any(words in refusal for words in UNSUITED):
                    return asked, "refused", refusal.replace(str(case), case.name)
        return asked, "refused", refusal.replace(str(case), case.name)
    except Exception as error:  # what this looks for
        return asked, "traceback", f"{type(error).__name__}: {error}"


def ways(case: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Tasks and columns to ask for, the likeliest first."""
    yield "instruction", {}
    for text in COLUMNS["text"]:
        for label in COLUMNS["label"]:
            yield "classification", {"text": text, "label": label}
        yield "classification", {"text": text, "label": list(ONE_HOT)}
    for label in COLUMNS["label"]:
        yield "classification", {"text": PAIR[0], "text_pair": PAIR[1], "label": label}
    yield "style", {}


def carried_out(case: Path, task: str, columns: dict[str, Any], model: Path, folder: Path) -> tuple[str, str]:
    """Two steps of training, and what the file was read as, with all remarks."""
    import peftkit
    from peftkit.data.pipeline import prepare

    recipe = peftkit.Recipe.parse(
        {
            "name": "odd",
            "model": {"source": str(model), "dtype": "float32"},
            "data": {"source": str(case), "max_length": 128, **columns},
            "task": {"kind": task},
            "training": {"max_steps": 2, "batch_size": 4, "threads": 1},
            "tracking": [],
            "output_dir": str(folder / "runs"),
        }
    )
    prepared = prepare(recipe)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        peftkit.train(recipe, quiet=True, final=False)
    counts = " + ".join(str(len(split)) for split in prepared.splits.values())
    names = prepared.info.labels or ()
    read = f"{prepared.info.problem_type.replace('_', ' ')}, {counts} rows"
    read += f", {len(names)} classes: {', '.join(map(str, names[:6]))}" if names else ""
    return "trained", "; ".join([read, *remarks(prepared)]).replace(str(case), case.name)


def remarks(prepared: Any) -> list[str]:
    """What a run says about its data before training."""
    steps = [step for step in prepared.steps if step.name != "split"]
    shown = [f"{s.name} {s.action} ({s.split}, {s.rows}): {'; '.join(s.examples)}" for s in steps]
    return [" ".join(text.split()) for text in shown]


def page(rows: list[tuple[str, str, str, str]], broken: list[Any]) -> str:
    """The table as a page."""
    counts = {outcome: sum(row[2] == outcome for row in rows) for outcome in ("trained", "refused", "traceback")}
    lines = [
        "# Odd inputs", "",
        f"{len(rows)} files by `benchmarks/odd_inputs.py`: {counts['trained']} read and trained on, "
        f"{counts['refused']} refused, {counts['traceback']} tracebacks; {len(broken)} of these or of messages with "
        f"more than {LINES} lines.", "",
        "| file | asked for | outcome | read as, or refused because |", "| --- | --- | --- | --- |",
    ]  # fmt: skip
    for name, asked, outcome, details in rows:
        shown = details if len(details) < 700 else f"{details[:700]} …"
        cells = [text.replace("|", "\\|").replace("\n", "<br>") for text in (name, asked, outcome, shown)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
