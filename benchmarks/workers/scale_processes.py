"""Bytes that a process sends in a training step on CPUs, by DDP in peftkit's own loop and by FSDP2, as one JSON line.

    torchrun --nproc_per_node 2 benchmarks/workers/scale_processes.py FOLDER     # model/ and train.csv

Sent is what the process wrote (``/proc/self/io``) per step: gloo writes every message to a socket. Memory is that of
the process's parameters after FSDP2 has sharded them.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_post_hook

STEPS, FIRST = 16, 3
"""Steps, and the one after which bytes are counted: DDP orders its buckets anew after the first."""
ROWS = 16
"""Global batch."""


def main() -> None:
    """Measures both, and prints the first process's figures."""
    folder = Path(sys.argv[1])
    os.environ["ACCELERATE_USE_CPU"] = "true"
    os.environ["PEFTKIT_CACHE"] = tempfile.mkdtemp(prefix="peftkit-scale-")
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    figures = {"processes": dist.get_world_size(), "fsdp2": fsdp2(folder), "ddp": ddp(folder)}
    if os.environ["RANK"] == "0":  # the training has ended the process group
        print(json.dumps(figures), flush=True)


def ddp(folder: Path) -> dict[str, float]:
    """Full finetuning of the encoder in the folder, by the training loop."""
    import peftkit
    from peftkit.schema.recipe import Recipe

    recipe = Recipe.parse(
        {
            "name": "scale", "model": {"source": str(folder / "model"), "dtype": "float32"},
            "data": {"source": str(folder / "train.csv"), "max_length": 32}, "method": "full",
            "training": {"max_steps": STEPS, "batch_size": ROWS, "threads": 1, "log_every": 1000},
            "evaluation": {"baselines": []}, "tracking": [], "output_dir": str(folder / "runs"),
        }
    )  # fmt: skip
    after: list[int] = []
    hook = register_optimizer_step_post_hook(lambda *_: after.append(written()))
    run = peftkit.train(recipe, quiet=True, final=False)
    hook.remove()
    weights = max(file.stat().st_size for file in run.path.glob("checkpoints/step-*/model.safetensors"))
    return {"sent": (after[-1] - after[FIRST]) / (STEPS - 1 - FIRST), "trained_bytes": weights}


def fsdp2(folder: Path) -> dict[str, float]:
    """Forward and backward of the encoder in the folder, its blocks and the rest sharded over the processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModel

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model: Any = AutoModel.from_pretrained(folder / "model", add_pooling_layer=False, use_safetensors=True).train()
    blocks = model.encoder.layer
    whole, inside = bytes_of(model), bytes_of(blocks)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    local = sum(p.to_local().nbytes for p in model.parameters())
    ids = torch.randint(5, 100, (2, 16))

    def step() -> None:
        model(input_ids=ids).last_hidden_state.square().mean().backward()
        model.zero_grad()

    step()
    dist.barrier()
    before = written()
    for _ in range(STEPS):
        step()
    sent = (written() - before) / STEPS
    return {"sent": sent, "weights": whole, "blocks": inside, "local_weights": local}


def bytes_of(module: torch.nn.Module) -> int:
    """Bytes of a module's parameters."""
    return sum(parameter.nbytes for parameter in module.parameters())


def written() -> int:
    """Bytes that this process has written so far, to files and sockets."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar"))


if __name__ == "__main__":
    main()
