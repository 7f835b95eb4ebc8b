"""Whole small runs in forked children, to be killed and gone on with; and what it takes for two runs to be equal.

The parent imports everything and prepares nothing that holds a thread, so that a child starts in milliseconds.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peftkit.schema.recipe import Recipe, replace
from tests import tiny

TIMED = {"rows_per_second", "tokens_per_second", "seconds"}
LIMIT = 120.0
"""Seconds after which a child counts as hanging."""
FRESH_LIMIT = 600.0
"""The same for an interpreter of its own, which imports everything anew."""


def warm_up() -> None:
    """Imports what every run needs, so that forked children find it."""
    os.environ.setdefault("PEFTKIT_CACHE", str(Path.cwd() / ".cache"))
    import matplotlib.pyplot  # noqa: F401
    import peft.tuners.lora.bnb
    import peft.utils.transformers_weight_conversion  # noqa: F401
    import sklearn.metrics  # noqa: F401
    import torch
    import transformers.models.bert.modeling_bert
    import transformers.models.llama.modeling_llama
    import transformers.optimization
    import transformers.trainer_pt_utils
    import transformers.trainer_utils  # noqa: F401

    import peftkit.cli.launch
    import peftkit.export.loading
    import peftkit.export.multi_adapter
    import peftkit.export.proof
    import peftkit.models.kernels.activation_checkpointing
    import peftkit.models.kernels.attention
    import peftkit.models.kernels.lora_linear
    import peftkit.run  # noqa: F401

    torch.set_num_threads(1)


def encoder(folder: Path, **parts: Any) -> Recipe:
    """LoRA with dropout on a tiny BERT: batches by length, accumulation, frequent checkpoints and validations."""
    from tests.conftest import topic_rows

    rows = folder / "topics.csv"
    if not rows.exists():
        tiny.tiny_bert(folder / "bert")
        with rows.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *topic_rows(60)])
    recipe = {
        "name": "encoder",
        "model": {"source": str(folder / "bert"), "dtype": "float32"},
        "data": {"source": str(rows), "max_length": 32},
        "method": {"kind": "lora", "rank": 2, "dropout": 0.1},
        "training": {**STEPS, "micro_batch": 3},
    }
    return replace(Recipe.parse({**recipe, **COMMON}), **parts)


def decoder(folder: Path, **parts: Any) -> Recipe:
    """LoRA with dropout on a tiny Llama, packed."""
    rows = folder / "questions.jsonl"
    if not rows.exists():
        tiny.tiny_llama(folder / "llama")
        lines = [{"instruction": f"say {n % 5} and {n}", "input": "", "output": f"it is {n % 5}"} for n in range(48)]
        rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = {
        "name": "decoder",
        "model": {"source": str(folder / "llama"), "dtype": "float32"},
        "data": {"source": str(rows), "max_length": 64},
        "task": {"kind": "instruction", "packing": True},
        "method": {"kind": "lora", "rank": 2, "dropout": 0.1},
        "training": {**STEPS, "batch_size": 2, "micro_batch": 1, "learning_rate": 2e-2},
        **COMMON,
        "evaluation": {"baselines": [], "generation": {"samples": 0}},
    }
    return replace(Recipe.parse(recipe), **parts)


def decoder_nf4(folder: Path, **parts: Any) -> Recipe:
    """The packed decoder with its base in NF4."""
    return replace(decoder(folder), name="decoder_nf4", quantization={"kind": "nf4"}, **parts)


def preferences(folder: Path, *, adapter: Path, **parts: Any) -> Recipe:
    """A second stage: DPO that trains the decoder's adapter further."""
    rows = folder / "preferences.jsonl"
    if not rows.exists():
        lines = [{"prompt": f"say {n}", "chosen": f"it is {n % 5}", "rejected": f"no {n % 7}"} for n in range(48)]
        rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    changes = {
        "name": "preferences", "model": {"adapter": str(adapter), "adapter_use": "continue"},
        "data": {"source": str(rows)}, "task": {"kind": "preference"},
    }  # fmt: skip
    return replace(replace(decoder(folder), **changes), **parts)


STEPS = {
    "epochs": 2, "batch_size": 8, "learning_rate": 1e-2, "log_every": 2, "threads": 1, "evaluate_every": 4,
    "save_every": 3, "early_stopping": {"patience": 9},
}  # fmt: skip
COMMON: dict[str, Any] = {
    "evaluation": {"baselines": [], "metrics": ["accuracy"]}, "export": {"prove": False}, "tracking": [],
    "output_dir": "unset",
}  # fmt: skip
KINDS = {"encoder": encoder, "decoder": decoder, "decoder_nf4": decoder_nf4, "preferences": preferences}


# -- children ----------------------------------------------------------------------------------------------------------


def fork(work: Callable[[], Any], said: Path | None = None) -> int:
    """Starts a child that does the work and exits with 0, or with the error's own code; gives its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        output = os.open(said or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)  # pytest has put its own in their place
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        work()
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        os._exit(code)


def wait(child: int, limit: float = LIMIT) -> int:
    """A child's exit code, negative for a signal's number; one that hangs is killed, and gives -1000."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1000


def train(recipe: Recipe, *, resume: bool = False, allow: tuple[str, ...] = ()) -> Callable[[], Any]:
    """The work of a child: the run as the command line carries it out, one message for an error."""

    def work() -> None:
        import peftkit
        from peftkit.cli import launch

        _spare()
        with launch.one_message():
            peftkit.train(recipe, resume=resume or None, allow=allow, quiet=True)

    return work


def _spare() -> None:
    """Leaves out what takes long and does not bear on what is trained; a fresh interpreter leaves out nothing."""
    import functools

    from peftkit.evaluation import intervals
    from peftkit.reporting import run_report
    from peftkit.training import flops

    run_report.write = lambda path: None
    run_report.ConsoleReporter.end = lambda *_: None  # type: ignore[method-assign]
    intervals.bootstrap = functools.partial(intervals.bootstrap, resamples=8, bca=False)
    flops.utilization_metrics = lambda loop: {}


def fresh(recipe: Recipe, said: Path, *, resume: Path | None = None) -> int:
    """Starts the command line in an interpreter of its own; gives its process id."""
    file = said.with_suffix(".yaml")
    file.write_text(recipe.to_yaml())
    place = ["--resume", str(resume)] if resume else [str(file)]
    command = [sys.executable, "-c", "from peftkit.cli.app import main; main()", "train", *place]
    given = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    path = os.pathsep.join([str(Path(__file__).parents[2]), *given])
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    actions = [(os.POSIX_SPAWN_OPEN, 1, str(said), flags, 0o644), (os.POSIX_SPAWN_DUP2, 1, 2)]
    return os.posix_spawn(sys.executable, command, os.environ | {"PYTHONPATH": path}, file_actions=actions)


def fork_ranks(work: Callable[[int], Any], said: Path, world_size: int = 2) -> list[int]:
    """Starts a child for every rank, told its place as torchrun would tell it; gives their process ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def ranked(rank: int) -> Callable[[], Any]:
        def place() -> None:
            from accelerate.state import AcceleratorState

            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo",
            }  # fmt: skip
            # an earlier test of this process may have told Accelerate that it is alone
            AcceleratorState._reset_state(reset_partial_state=True)
            work(rank)

        return place

    return [fork(ranked(rank), said) for rank in range(world_size)]


def wait_all(children: list[int], limit: float = LIMIT) -> list[int]:
    """Exit codes of all children; ``limit`` counts for all of them together."""
    deadline = time.monotonic() + limit
    return [wait(child, max(0.0, deadline - time.monotonic())) for child in children]


def run(recipe: Recipe, *, resume: bool = False, said: Path | None = None) -> int:
    """Carries a recipe out in a child; gives its exit code."""
    return wait(fork(train(recipe, resume=resume), said))


def folder_of(recipe: Recipe) -> Path | None:
    """The newest run folder that can be gone on with."""
    runs = sorted(path.parent for path in Path(recipe.output_dir).glob("*/recipe.yaml"))
    return runs[-1] if runs else None


def finish(recipe: Recipe, said: Path, world_size: int = 1) -> int:
    """Goes on with the run, or starts it where it had not begun; the worst exit code of its processes."""
    work = train(recipe, resume=folder_of(recipe) is not None)
    if world_size == 1:
        return wait(fork(work, said))
    codes = wait_all(fork_ranks(lambda rank: work(), said, world_size))
    return max(codes, key=abs)


# -- equality ----------------------------------------------------------------------------------------------------------


def log(path: Path) -> list[dict[str, Any]]:
    """The metrics log without times and without events, which tell of the faults themselves."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMED} for line in lines if "event" not in line]


def differences(path: Path | None, whole: Path) -> list[str]:
    """What of a run is not as in the uninterrupted one; empty when all is equal."""
    if path is None:
        return ["there is no run"]
    found = []
    name = "adapter/adapter_model.safetensors"
    if not (path / name).is_file():
        return ["there is no adapter"]
    if (path / name).read_bytes() != (whole / name).read_bytes():
        found.append("the adapter differs")
    if log(path) != log(whole):
        found.append("the log differs")
    first, second = (json.loads((each / "metrics.json").read_text()) for each in (path, whole))
    if any(first[name] != second[name] for name in ("validation", "test")):
        found.append("the figures differ")
    return found + litter(path)


def litter(path: Path) -> list[str]:
    """Staged and half-removed things in a run's folder."""
    names = [item.name for item in path.glob(".*") if item.name != ".lock"]
    names += [item.name for item in (path / "checkpoints").glob("*") if not item.name.startswith("step-")]
    return [f"left behind: {', '.join(names)}"] if names else []
