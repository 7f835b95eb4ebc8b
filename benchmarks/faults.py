"""The fault bench: every fault injected, counted, and published in results/faults.json and results/faults.md.

    python benchmarks/faults.py                       # all kinds at their full counts (make faults)
    python benchmarks/faults.py --share 0.1           # a tenth of them
    python benchmarks/faults.py --only damaged ranks  # some kinds; the results of the others stay

The faults and what counts as passed stand in tests/faults; the tests run a few of each.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.harness import RESULTS, machine

JSON, TABLE = RESULTS / "faults.json", RESULTS / "faults.md"
Kind = Callable[[Path, Callable[[int], int]], list[Any]]


def kinds() -> dict[str, Kind]:
    """Name → what runs its trials in a folder; ``n`` scales a full count."""
    from tests.faults import kinds as one
    from tests.faults import kinds_hostile, kinds_input
    from tests.faults import kinds_many as many

    models = ("encoder", "decoder", "decoder_nf4")

    def each(trial: Callable[..., Any], counts: tuple[int, ...]) -> Kind:
        return lambda folder, n: [
            trial(folder, one.reference(folder, model), n(count)) for model, count in zip(models, counts) if count
        ]

    def with_two(trial: Callable[..., Any], count: int) -> Kind:
        return lambda folder, n: [trial(folder, many.reference(folder), n(count))]

    return {
        "calls": lambda folder, n: [one.every_call(folder)],
        "damaged": lambda folder, n: [
            one.damaged(folder / kind, kind, n(1000)) for kind in ("truncated", "bit-flipped")
        ],
        "kills": each(one.kills, (50, 30, 20)),
        "saves": each(one.kills_in_saves, (50, 30, 20)),
        "disk": each(one.failing_saves, (20, 10, 0)),
        "signals": each(one.signals, (20, 10, 0)),
        "signals2": with_two(many.signals, 20),
        "ranks": with_two(many.lost_ranks, 20),
        "ledger": lambda folder, n: [many.ledger(folder, n(30))],
        "changes": lambda folder, n: [kinds_input.changed_inputs(folder, one.reference(folder, "encoder"))],
        "recipes": lambda folder, n: [kinds_input.fuzzed_recipes(folder, n(1000))],
        "data": lambda folder, n: [kinds_input.bad_data(folder, n(500)), kinds_input.clean_data(folder, n(50))],
        "hostile": lambda folder, n: [kinds_hostile.hostile(folder, one.reference(folder, "encoder"), n(100))],
        "secrets": lambda folder, n: [kinds_input.secrets(folder, one.reference(folder, "encoder"))],
    }


def main() -> None:
    """Runs what was asked for and writes the results."""
    arguments = _arguments()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    root = Path(tempfile.mkdtemp(prefix="faults-"))
    os.environ["PEFTKIT_CACHE"] = str(root / "cache")
    from tests.faults import runs

    runs.warm_up()
    failed = 0
    for name, kind in kinds().items():
        if arguments.only and name not in arguments.only:
            continue
        folder = root / name
        folder.mkdir()
        started = time.monotonic()
        outcomes = kind(folder, lambda count: max(1, round(count * arguments.share)))
        _publish(name, outcomes, time.monotonic() - started)
        failed += sum(len(outcome.failures) for outcome in outcomes)
        shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(root, ignore_errors=True)
    print(TABLE.read_text())
    sys.exit(1 if failed else 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="share of the full counts")
    parser.add_argument("--only", nargs="+", metavar="KIND", help="some kinds")
    given = parser.parse_args()
    strange = set(given.only or ()) - set(kinds())
    if strange:
        parser.error(f"no kind {', '.join(sorted(strange))}; there are {', '.join(kinds())}")
    return given


def _publish(name: str, outcomes: list[Any], seconds: float) -> None:
    """Puts a kind's outcomes among the results, and says them."""
    content = json.loads(JSON.read_text()) if JSON.is_file() else {"kinds": {}}
    content["machine"] = machine()
    content["kinds"][name] = {"seconds": round(seconds, 1), "outcomes": [_plain(outcome) for outcome in outcomes]}
    JSON.write_text(json.dumps(content, indent=1) + "\n")
    lines = ["| fault | trials | as it should be | target |", "|---|---|---|---|"]
    for held in content["kinds"].values():
        lines += ["| {kind} | {trials:,} | {passed:,} | {target} |".format(**each) for each in held["outcomes"]]
    TABLE.write_text("\n".join(lines) + "\n")
    for outcome in outcomes:
        print(f"{outcome.kind}: {outcome.passed} of {outcome.trials} ({seconds:.0f} s) {outcome.figures}", flush=True)
        for failure in outcome.failures[:5]:
            print(f"    {failure}", flush=True)


def _plain(outcome: Any) -> dict[str, Any]:
    held = {"kind": outcome.kind, "target": outcome.target, "trials": outcome.trials, "passed": outcome.passed}
    return {**held, "figures": outcome.figures, "failures": outcome.failures[:20]}


if __name__ == "__main__":
    main()
