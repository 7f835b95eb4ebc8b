"""The peer: ``llamafactory-cli train`` on a recipe; prints one JSON line in the words of the other workers.

python benchmarks/workers/llamafactory_run.py --recipe FILE --command FILE --data FILE.jsonl --model FOLDER
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path


def main() -> None:
    """Trains through the command and counts the real tokens of the rows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", required=True, type=Path)
    parser.add_argument("--command", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True)
    args = parser.parse_args()
    environment = {**os.environ, "DISABLE_VERSION_CHECK": "1"}
    done = subprocess.run(
        [args.command, "train", str(args.recipe)], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        sys.exit(done.stdout[-1000:] + done.stderr[-3000:])
    from peer import instruction_rows
    from transformers import AutoTokenizer

    recipe = json.loads(args.recipe.read_text(encoding="utf-8"))
    out = Path(recipe["output_dir"])
    results = json.loads((out / "train_results.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rendered = [
        tokenizer.apply_chat_template([*row["prompt"], *row["completion"]], tokenize=True, return_dict=True)
        for row in instruction_rows(args.data)
    ]
    tokens = sum(min(len(row["input_ids"]), recipe["cutoff_len"]) for row in rendered) * recipe["num_train_epochs"]
    figures = {
        "train_tokens_per_second": tokens / results["train_runtime"],
        "train_seconds": results["train_runtime"],
        "train_loss": results["train_loss"],
        "adapter": str(out),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
