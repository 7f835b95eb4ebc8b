"""Every comparison, one after the other, then the page of results.

    python benchmarks/run_all.py --data AG_NEWS --instructions ALPACA [--share 0.1] [--repeats 2] [--only startup]

AG_NEWS holds train.csv and test.csv (text,label), ALPACA train.jsonl and test.jsonl (instruction,input,output).
``--share`` takes that part of the rows, ``--repeats`` sets all repeats. One that fails is told and does not keep the
others from running. Peers' environments are built first, so that no measurement waits for a download.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from environments import PACKAGES, python_of

HERE = Path(__file__).parent
CLASSIFICATION: dict[str, list[str]] = {
    "frozen_features": ["frozen_features.py"],
    "encoder_lora": ["encoder_lora.py"],
    "encoder_lora_last_2": ["encoder_lora.py", "--last-layers", "2", "--epochs", "3"],
    "time_to_quality": ["time_to_quality.py"],
    "classify": ["classify.py"],
    "few_shot": ["few_shot.py"],
    "bottleneck": ["bottleneck_adapters.py"],
    "growth": ["growth.py"],
    "runtimes": ["runtimes.py"],
    "batching_curves": ["batching_curves.py"],
    "serving_classify": ["serving.py", "--work", "classify"],
}
INSTRUCTIONS: dict[str, list[str]] = {
    "startup": ["startup.py"],
    "instruction_lora": ["instruction_lora.py"],
    "llamafactory_lora": ["llamafactory_lora.py"],
    "serving_chat": ["serving.py", "--work", "chat"],
}


def main() -> None:
    """Runs what was asked for; exits 1 when one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--instructions", required=True)
    parser.add_argument("--share", default="1")
    parser.add_argument("--repeats")
    parser.add_argument("--only", choices=(*CLASSIFICATION, *INSTRUCTIONS), action="append")
    args = parser.parse_args()
    for peer in PACKAGES:
        python_of(peer)
    failed = []
    for name, command in {**CLASSIFICATION, **INSTRUCTIONS}.items():
        if args.only and name not in args.only:
            continue
        data = args.data if name in CLASSIFICATION else args.instructions
        options = ["--data", data, "--share", args.share, "--name", name]
        options += ["--repeats", args.repeats] if args.repeats else []
        print(f"\n== {name}", flush=True)
        started = time.perf_counter()
        done = subprocess.run([sys.executable, str(HERE / command[0]), *command[1:], *options], check=False)
        print(f"{name}: {(time.perf_counter() - started) / 60:.1f} minutes", flush=True)
        failed += [name] if done.returncode else []
    subprocess.run([sys.executable, str(HERE / "table.py")], check=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
