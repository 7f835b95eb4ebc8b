"""Writes results/README.md: a table of every comparison in results/, as it stands in its JSON.

Files named try… are quick looks, and left out (``--name try_it``); git ignores them.

python benchmarks/table.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from harness import RESULTS

NAMES = {
    "first_step_seconds": "s to the first step", "wall_seconds": "s end to end", "train_seconds": "s of training",
    "train_rows_per_second": "rows/s", "train_tokens_per_second": "tokens/s", "rows_per_second": "rows/s",
    "rows_per_cpu_second": "rows/s of processor time",
    "predict_seconds": "s of prediction", "eval_rows_per_second": "rows/s evaluated", "peak_rss_gb": "GB peak",
    "accuracy": "accuracy", "agreement": "agreement", "held_out_loss": "held-out loss", "train_loss": "training loss",
    "validation_loss": "validation loss", "padding_share": "padding in a pass",
    "batch_padding_share": "padding in a batch", "flops_utilization": "of the matrix-product rate",
}  # fmt: skip
"""Figures that are shown, in this order, and what they are called; all others stay in the JSON."""
FASTER_IS_MORE = ("train_rows_per_second", "train_tokens_per_second", "rows_per_second", "rows_per_cpu_second")
OURS = "peftkit"
PLOT = "![validation loss by step, and the difference](../../docs/batching_curves.png)"


def main() -> None:
    """Reads all results and writes the page."""
    parts = [
        "# Results",
        "Medians of interleaved runs, with the least and the greatest; made by `benchmarks/table.py`.",
    ]
    for path in sorted(RESULTS.glob("*.json")):
        content = {} if path.stem.startswith("try") else json.loads(path.read_text(encoding="utf-8"))
        if "summary" in content and "runs" in content:
            parts += comparison(path.stem, content)
            if "points" in content:
                parts += curves(content)
        elif "slopes" in content:
            parts += growth(path.stem, content)
    (RESULTS / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(RESULTS / "README.md")


def comparison(name: str, content: Mapping[str, Any]) -> list[str]:
    """One comparison: a row for each contestant, and how many times slower than peftkit it is."""
    summary, headline = content["summary"], content.get("headline", "train_seconds")
    keys = [key for key in NAMES if any(key in values for values in summary.values())]
    repeats = max(len(runs) for runs in content["runs"].values())
    ours = OURS if OURS in summary else next(iter(summary))
    has_ratio = headline in summary[ours]
    header = [
        "",
        *(NAMES[key] for key in keys),
        *([f"{NAMES.get(headline, headline)}: {ours} is"] if has_ratio else []),
    ]
    rows = [header, ["---"] * len(header)]
    for contestant, values in summary.items():
        cells = [spread(values.get(key)) for key in keys]
        if has_ratio:
            cells.append(faster(headline, summary, ours, contestant))
        rows.append([contestant, *cells])
    return [f"## {content['work']}", table(rows), f"`{name}.json`, {repeats} runs each. {surroundings(content)}"]


def curves(content: Mapping[str, Any]) -> list[str]:
    """Loss at every step, with its range over the seeds, and the difference seed by seed."""
    names = [name for name in content["points"][0] if name != "step"]
    rows = [["step", *names], ["---"] * (len(names) + 1)]
    for point in content["points"]:
        each = ((point[name], "+.4f" if name == "difference" else ".4f") for name in names)
        cells = [f"{found['mean']:{how}} [{found['min']:{how}}, {found['max']:{how}}]" for found, how in each]
        rows.append([str(point["step"]), *cells])
    return ["Validation loss: the mean over seeds, the least and the greatest.", table(rows), PLOT]


def faster(headline: str, summary: Mapping[str, Any], ours: str, other: str) -> str:
    """``4.1 x as fast``, with the second run's where there is one."""

    def ratio(mine: str) -> float | None:
        one, two = (summary[name].get(headline, {}).get("median") for name in (mine, other))
        if not one or not two:
            return None
        return float(one / two if headline in FASTER_IS_MORE else two / one)

    first, second = ratio(ours), ratio(f"{ours}, second run") if f"{ours}, second run" in summary else None
    if first is None or other.startswith(ours):
        return "–"
    return f"{first:.2f} x as fast" + (f" (second run {second:.2f} x)" if second else "")


def growth(name: str, content: Mapping[str, Any]) -> list[str]:
    """The straight lines, then the points."""
    lines = [["", "slope of the logarithms"], ["---", "---"]]
    lines += [[f"`{what}`", f"{value:.3f}"] for what, value in content["slopes"].items()]
    parts = [f"## {content['work']}", table(lines)]
    for series, points in content["series"].items():
        keys = list(dict.fromkeys(key for point in points for key in point))
        rows = [keys, ["---"] * len(keys), *([figure(point.get(key)) for key in keys] for point in points)]
        parts += [f"### {series}", table(rows)]
    return [*parts, f"`{name}.json`, medians of {content['repeats']} runs. {surroundings(content)}"]


def surroundings(content: Mapping[str, Any]) -> str:
    """Machine, versions and date."""
    about = content["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    peers = {
        json.dumps(found): f"{name.split(',')[0]}: "
        + ", ".join(f"{package} {number}" for package, number in found.items())
        for name, found in about.get("peers", {}).items()
    }
    said = f"{about['processor']}, {about['cores']} cores; Python {about['python']}, {versions}; {about['date']}."
    return said + "".join(f" {text}." for text in peers.values())


def spread(value: Mapping[str, float] | None) -> str:
    """``98.8 [83.1, 99.0]``, or the figure alone where runs agree."""
    if value is None:
        return "–"
    if value["min"] == value["max"]:
        return figure(value["median"])
    return f"{figure(value['median'])} [{figure(value['min'])}, {figure(value['max'])}]"


def figure(value: float | None) -> str:
    """Four significant digits; whole numbers as they are."""
    if value is None:
        return "–"
    if isinstance(value, int) or value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def table(rows: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    main()
