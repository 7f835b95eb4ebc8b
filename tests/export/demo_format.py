"""An export format of another package: one safetensors file, read by a function of its own."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from safetensors.torch import load_file, save_file

from peftkit.export.exporter import Exporter
from peftkit.schema.types import LoadedModel


class Demo(Exporter):
    """A classifier over the mean of its word vectors."""

    kind: Literal["demo"] = "demo"
    scale: float = 1.0
    """What the saved weights are multiplied by: 1 gives the trained model."""

    def unsupported_reason(self, source):
        return "" if source.manifest.head.pools else "demo is for classifiers"

    def export(self, source, folder):
        from peftkit.export import proof
        from peftkit.export.loading import load_exported

        loaded = load_exported(source, device="cpu", dtype="float32", quantized=False).loaded
        model = loaded.model.merge_and_unload()
        state = {name: (tensor * self.scale).contiguous() for name, tensor in model.state_dict().items()}
        save_file({name: tensor.clone() for name, tensor in state.items()}, folder / "demo.safetensors")
        model.config.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        (folder / "demo.json").write_text(json.dumps({"class": type(model).__name__}))
        found = proof.prove_loader(folder, loaded, source.manifest, read, source.recipe.export.tolerance)
        self.finish(source, folder, found, quantization=None, dtype="float32")

    def load(self, source, tokenizer):
        contents = source.manifest
        return LoadedModel(read(source.path), tokenizer, contents.pooling, contents.heads, contents.fingerprint)


def read(folder: Path) -> Any:
    """The model in the folder."""
    import transformers

    kind = getattr(transformers, json.loads((folder / "demo.json").read_text())["class"])
    model = kind(transformers.AutoConfig.from_pretrained(folder))
    model.load_state_dict(load_file(folder / "demo.safetensors"))
    return model.eval()


def broken(folder: Path) -> Any:
    """Fails."""
    return SimpleNamespace()
