"""The fault bench: every fault injected, counted, and published in results/faults.json and results/faults.md.

    python benchmarks/faults.py                       # all kinds at their full counts (make faults)
    python benchmarks/faults.py --share 0.1           # a tenth of them
    python benchmarks/faults.py --only damaged ranks  # some kinds; the results of the others stay
    python benchmarks/faults.py --go-on               # what an interrupted campaign left undone

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
PEER = "Trainer: "
WRONG = ("could not resume", "silently resumed to another adapter")
Kind = Callable[[Path, Callable[[int], int]], list[Any]]


def kinds() -> dict[str, Kind]:
    """Name → what runs its trials in a folder; ``n`` scales a full count."""
    from tests.faults import disks, kinds_hostile, kinds_input
    from tests.faults import kinds as one
    from tests.faults import kinds_disk as on_disks
    from tests.faults import kinds_many as many
    from tests.faults import kinds_trainer as peer

    models = ("encoder", "decoder", "decoder_nf4")

    def each(trial: Callable[..., Any], counts: tuple[int, ...]) -> Kind:
        return lambda folder, n: [
            trial(folder, one.reference(folder, model), n(count)) for model, count in zip(models, counts) if count
        ]

    def nothing(folder: Path, n: Callable[[int], int]) -> list[Any]:
        print("not tried: this process may not mount disks")
        return []

    def with_two(trial: Callable[..., Any], count: int) -> Kind:
        return lambda folder, n: [trial(folder, many.reference(folder), n(count))]

    def trainers(folder: Path, whole: Any, n: Callable[[int], int]) -> list[Any]:
        found = [peer.kills(folder, whole, n(20)), peer.kills_in_saves(folder, whole, n(20))]
        found += [peer.damaged(folder, whole, kind, n(18)) for kind in ("truncated", "bit-flipped")]
        return found + ([peer.full_disk(folder, whole, n(10))] if disks.mountable() else [])

    return {
        "calls": lambda folder, n: [one.every_call(folder)],
        "damaged": lambda folder, n: [
            one.damaged(folder / kind, kind, n(1000)) for kind in ("truncated", "bit-flipped")
        ],
        "kills": each(one.kills, (50, 30, 20)),
        "saves": each(one.kills_in_saves, (50, 30, 20)),
        "fresh": each(one.fresh_kills, (6, 4, 0)),
        "disk": each(one.failing_saves, (20, 10, 0)),
        "full": each(on_disks.full_disk, (20, 10, 0)) if disks.mountable() else nothing,
        "readonly": (lambda folder, n: [on_disks.read_only(folder, one.reference(folder, "encoder"))])
        if disks.mountable()
        else nothing,
        "signals": each(one.signals, (20, 10, 0)),
        "signals2": with_two(many.signals, 20),
        "ranks": with_two(many.lost_ranks, 20),
        "ledger": lambda folder, n: [many.ledger(folder, n(30))],
        "changes": lambda folder, n: [kinds_input.changed_inputs(folder, one.reference(folder, "encoder"))],
        "trainer": lambda folder, n: trainers(folder, peer.reference(folder), n),
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
        failed += _campaign(name, kind, folder, arguments)
        shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(root, ignore_errors=True)
    print(TABLE.read_text())
    sys.exit(1 if failed else 0)


def _campaign(name: str, kind: Kind, folder: Path, arguments: argparse.Namespace) -> int:
    """Makes the trials of a kind; every one is published as soon as it is over. Gives the number that failed."""
    from tests.faults import kinds as one

    book = Book(name, go_on=arguments.go_on)
    one.HELD.clear()
    one.HELD.update({held["kind"]: one.Outcome(**held) for held in book.outcomes()})
    one.LISTENERS[:] = [book.write]
    outcomes = kind(folder, lambda count: max(1, round(count * arguments.share)))
    for outcome in outcomes:
        book.write(outcome)
        print(f"{outcome.kind}: {outcome.passed} of {outcome.trials} {outcome.figures}", flush=True)
        for failure in outcome.failures[:5]:
            print(f"    {failure}", flush=True)
    return sum(len(outcome.failures) for outcome in outcomes)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="share of the full counts")
    parser.add_argument("--only", nargs="+", metavar="KIND", help="some kinds")
    parser.add_argument("--go-on", action="store_true", help="make only the trials that are not among the results")
    given = parser.parse_args()
    strange = set(given.only or ()) - set(kinds())
    if strange:
        parser.error(f"no kind {', '.join(sorted(strange))}; there are {', '.join(kinds())}")
    return given


class Book:
    """The results of one kind among all results, on disk after every trial.

    Args:
        go_on: keep what the results hold of this kind; otherwise it is forgotten.
    """

    def __init__(self, name: str, *, go_on: bool) -> None:
        self.name, self.machine = name, machine()
        held = self._content()["kinds"].get(name, {}) if go_on else {}
        self.held = {outcome["kind"]: outcome for outcome in held.get("outcomes", [])}
        self.before, self.started = held.get("seconds", 0.0), time.monotonic()

    def outcomes(self) -> list[dict[str, Any]]:
        """What there was, as the fields of outcomes."""
        return [{name: value for name, value in held.items() if name != "passed"} for held in self.held.values()]

    def write(self, outcome: Any) -> None:
        """Puts an outcome in the place of what there was of it."""
        self.held[outcome.kind] = _plain(outcome)
        seconds = self.before + time.monotonic() - self.started
        content = self._content()
        content["machine"] = self.machine
        content["kinds"][self.name] = {"seconds": round(seconds, 1), "outcomes": list(self.held.values())}
        _replace(JSON, json.dumps(content, indent=1) + "\n")
        _replace(TABLE, _table(content["kinds"]))

    @staticmethod
    def _content() -> dict[str, Any]:
        return dict(json.loads(JSON.read_text())) if JSON.is_file() else {"kinds": {}}


def _table(kinds: dict[str, Any]) -> str:
    """The results as Markdown; beside peftkit's what transformers' Trainer made of the same fault."""
    peers = {held["kind"].removeprefix(PEER): held for held in kinds.get("trainer", {}).get("outcomes", [])}
    lines = ["| fault | trials | handled as intended | target | transformers' Trainer |", "|---|---|---|---|---|"]
    for name, kind in kinds.items():
        for held in kind["outcomes"] if name != "trainer" else ():
            start = next((start for start in peers if held["kind"].startswith(start)), None)
            said = _beside(peers.pop(start)) if start else ""  # beside the encoder, which is what the peer trains
            lines.append("| {kind} | {trials:,} | {passed:,} | {target} |".format(**held) + f" {said} |")
    return "\n".join(lines) + "\n"


def _beside(held: dict[str, Any]) -> str:
    """``3 of 20 byte-equal; 9 could not resume, 8 went on …``."""
    rest = [f"{held['figures'][name]} {name}" for name in WRONG if held["figures"].get(name)]
    return f"{held['passed']} of {held['trials']} byte-equal{'; ' if rest else ''}{', '.join(rest)}"


def _replace(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    staged = path.with_name(f".{path.name}.tmp")
    staged.write_text(text)
    os.replace(staged, path)


def _plain(outcome: Any) -> dict[str, Any]:
    held = {"kind": outcome.kind, "target": outcome.target, "trials": outcome.trials, "passed": outcome.passed}
    return {**held, "figures": outcome.figures, "failures": outcome.failures}


if __name__ == "__main__":
    main()
