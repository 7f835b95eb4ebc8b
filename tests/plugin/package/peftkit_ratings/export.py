"""The merged model as one safetensors file with its configuration."""

from __future__ import annotations

from typing import Literal

from peftkit.export.exporter import Exporter
from peftkit.schema.types import LoadedModel


class Bundle(Exporter):
    """One safetensors file for a runtime of our own."""

    kind: Literal["bundle"] = "bundle"

    def unsupported_reason(self, source):
        return "" if source.manifest.head.pools else "bundle is for classifiers"

    def export(self, source, folder):
        from safetensors.torch import save_file

        from peftkit.export import proof
        from peftkit.export.loading import load_exported

        loaded = load_exported(source, device="cpu", dtype="float32", quantized=False).loaded
        model = loaded.model.merge_and_unload()
        save_file({name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()},
                  folder / "weights.safetensors")  # fmt: skip
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        result = proof.prove_loader(folder, loaded, source.manifest, read, source.recipe.export.tolerance)
        self.finish(source, folder, result, quantization=None, dtype="float32")

    def load(self, source, tokenizer):
        contents = source.manifest
        return LoadedModel(read(source.path), tokenizer, contents.pooling, contents.heads, contents.fingerprint)


def read(folder):
    """The model of a bundle."""
    import transformers
    from safetensors.torch import load_file

    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0])(config)
    model.load_state_dict(load_file(folder / "weights.safetensors"))
    return model.eval()
