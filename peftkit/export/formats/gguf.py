"""A language model as GGUF, for llama.cpp, Ollama and what is built on them: weights, tokenizer and template in a file.

    FOLDER/  model.gguf (or base.gguf, adapter.gguf)  Modelfile  peftkit.json  recipe.yaml  metrics.json  proof.json
             README.md

The adapter is merged into the base in fp32, and each weight rounded once. llama.cpp must then read prompts as the same
tokens, render conversations to the same text, stop where the trained model stops and answer like it, or nothing is
written; see ``peftkit.export.gguf.proof``.
"""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from peftkit.errors import ModelError
from peftkit.export import manifest
from peftkit.export.exporter import Exporter
from peftkit.export.folder import ADAPTER_WEIGHTS, ExportFolder
from peftkit.export.gguf.types import FileType, k_quants_reason
from peftkit.export.manifest import Manifest
from peftkit.schema.registries import EXPORTERS

if TYPE_CHECKING:
    from peftkit.export.card import Usage

MODEL, BASE, ADAPTER = "model.gguf", "base.gguf", "adapter.gguf"


@EXPORTERS.register("gguf")
class GGUF(Exporter):
    """A language model for llama.cpp and Ollama, proven in llama.cpp (pip install peftkit[gguf] xllamacpp)."""

    kind: Literal["gguf"] = "gguf"
    type: FileType = "f16"
    """How the weights are stored; vectors stay in fp32, and q4_0 keeps the vocabulary in q8_0."""
    content: Literal["merged", "base+adapter", "adapter"] = "merged"
    """The adapter merged into its base, a LoRA as a file next to its base, or the LoRA alone, in fp32."""
    prove: bool = True
    """Run the file in llama.cpp and compare it with the trained model."""
    max_kl: Annotated[float, Field(gt=0)] | None = None
    """Mean divergence from the trained model's next-token distributions that passes the proof, in nats per token; None
    takes what rounding to the type explains."""

    def unsupported_reason(self, source: ExportFolder) -> str:
        contents, method = source.manifest, source.recipe.method
        if not contents.head.writes_text:
            other = "--format onnx" if contents.head.onnx else "--merge"
            return f"GGUF is written for language models, not for task.kind={contents.task}; export it with {other}"
        if contents.head.encodes_source:
            return "GGUF is written for decoders; an encoder–decoder is exported as a plain model: --merge"
        if contents.saves not in manifest.SAVES:
            return f"{source.path} is an export of format '{contents.saves}'; export the run itself"
        if self.content != "merged":
            return self._adapter_reason(source)
        reason = method.unmergeable_reason() if contents.saves == "adapter" else ""
        return f"{reason}, and llama.cpp only loads LoRA adapters unmerged" if reason else ""

    def _adapter_reason(self, source: ExportFolder) -> str:
        method = source.manifest.method
        if source.manifest.saves != "adapter":
            return f"method '{method}' trained the base itself: there is no adapter; use content=merged"
        if source.recipe.method.loads_with != "peft":
            return f"llama.cpp loads LoRA adapters only, not those of method '{method}'; use content=merged"
        return ""

    def export(self, source: ExportFolder, folder: Path) -> None:
        """Writes the files and compares llama.cpp's answers with the trained model's.

        Raises:
            ModelError: packages are missing, or llama.cpp has no such tokenizer.
            MethodError: llama.cpp has no such architecture, or the adapter is no LoRA.
            ExportError: llama.cpp reads prompts otherwise, or answers differently.
        """
        self._check_packages()
        from peftkit.export.gguf import modelfile, proof, vocabulary
        from peftkit.export.gguf.architecture import architecture_of
        from peftkit.export.merged_model import merge_export

        with tempfile.TemporaryDirectory(prefix="peftkit-gguf-", dir=folder.parent) as name:
            base = Path(name) / BASE if self.content == "adapter" else folder / BASE
            if self.content != "merged":
                self._write_base_and_adapter(source, base, folder / ADAPTER)
            merged = merge_export(source)
            merged.check(source.recipe.export.tolerance)
            tokenizer = merged.loaded.tokenizer
            architecture = architecture_of(merged.model.config)
            if self.content == "merged":
                self._write(folder / MODEL, merged.model, tokenizer, source, architecture)
            proven = None
            if self.prove:
                reference = proof.Reference(merged.model, tokenizer, architecture.exact_context)
                model, adapter = (folder / MODEL, None) if self.content == "merged" else (base, folder / ADAPTER)
                proven = proof.prove(reference, model, self.type, adapter=adapter, max_kl=self.max_kl)
        if self.content != "adapter":
            files = {"FROM": MODEL} if self.content == "merged" else {"FROM": BASE, "ADAPTER": ADAPTER}
            text = modelfile.text_of(
                files, tokenizer, vocabulary.stop_ids(merged.model, tokenizer),
                chat=not isinstance(source.recipe.task.as_prompt(""), str), system=source.recipe.data.system,
            )  # fmt: skip
            (folder / modelfile.FILE).write_text(text, encoding="utf-8")
        self.finish(source, folder, proven, saves=self.kind)

    def _check_packages(self) -> None:
        if importlib.util.find_spec("gguf") is None:
            raise ModelError("writing GGUF files needs the gguf package: pip install 'peftkit[gguf]'")
        if self.type == "q4_k_m" and (reason := k_quants_reason()):
            raise ModelError(reason)
        if self.prove:
            from peftkit.export.gguf import proof

            proof.need_runtime()

    def _write(self, file: Path, model: Any, tokenizer: Any, source: ExportFolder, architecture: Any) -> None:
        from peftkit.export.gguf import vocabulary, writer

        name = vocabulary.model_name(source.manifest.recipe, tokenizer)
        writer.write_model(file, model, tokenizer, architecture, self.type, name=name)

    def _write_base_and_adapter(self, source: ExportFolder, base: Path, adapter: Path) -> None:
        from safetensors.torch import load_file

        from peftkit.export.gguf import writer
        from peftkit.export.gguf.architecture import architecture_of
        from peftkit.export.loading import load_exported

        loaded = load_exported(source, device="cpu", dtype="float32", quantized=False).loaded
        config = loaded.model.peft_config["default"]
        model = loaded.model.unload()
        architecture = architecture_of(model.config)
        writer.write_adapter(adapter, load_file(source.path / ADAPTER_WEIGHTS), config, architecture)
        if self.prove or self.content == "base+adapter":
            self._write(base, model, loaded.tokenizer, source, architecture)

    def usage(self, contents: Manifest) -> Usage:
        from peftkit.export.card import Usage

        files = {"merged": (MODEL, ""), "base+adapter": (BASE, ADAPTER), "adapter": ("the base.gguf", ADAPTER)}
        limits = [] if self.type in {"f32", "f16"} else [f"Weights are rounded to {self.type}: some answers differ."]
        if self.content == "adapter":
            limits.append("It fits only the base named above: llama.cpp loads it on another without a warning.")
        return Usage("llama.cpp", _code(*files[self.content]), "llama.cpp", tuple(limits), loads_in_peftkit=False)


def _code(model: str, adapter: str) -> str:
    lines = ["import xllamacpp", "", 'folder = "path/to/this/folder"', "params = xllamacpp.CommonParams()"]
    lines.append(f'params.model.path = f"{{folder}}/{model}"')
    if adapter:
        lines += [
            "adapter = xllamacpp.CommonAdapterLoraInfo()",
            f'adapter.path, adapter.scale = f"{{folder}}/{adapter}", 1.0',
            "params.lora_adapters = [adapter]",
        ]
    lines += [
        "server = xllamacpp.Server(params)",
        'answer = server.handle_completions({"prompt": "Once upon a time", "max_tokens": 64})',
        'print(answer["choices"][0]["text"])',
    ]
    return "\n".join(lines)
