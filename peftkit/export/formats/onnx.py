"""A model that scores or embeds texts as an ONNX file: base, adapter and pooling in one graph, without torch.

    FOLDER/  model.onnx  config.json  tokenizer…  peftkit.json  recipe.yaml  metrics.json  proof.json  README.md

Inputs are ``input_ids`` and ``attention_mask`` (``token_type_ids`` where texts come in pairs), [rows, tokens] of any
size; the output is ``logits`` [rows, labels] in fp32, or ``vectors`` [rows, width], not normalized. The adapter is
merged into the base first, in fp32, if its method allows it. ONNX Runtime must give torch's outputs of base and
adapter, or nothing is written. INT8 weights may differ more (INT8_TOLERANCE); `peftkit evaluate FOLDER` scores that
file.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from peftkit.errors import ModelError
from peftkit.export import manifest, runtimes
from peftkit.export.exporter import Exporter
from peftkit.export.folder import ExportFolder
from peftkit.export.formats.merged import Merged
from peftkit.export.manifest import Manifest
from peftkit.schema.registries import EXPORTERS
from peftkit.schema.types import LoadedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peftkit.export.card import Usage

FILE = "model.onnx"
WRITE, READ = ("onnx", "onnxscript", "onnxruntime"), ("onnxruntime",)
"""Packages needed."""
SPEED = {False: {"float32": 1.6, "int8": 3.1}, True: {"float32": 0.65, "int8": 1.2}}
"""Next to torch in fp32, and in bf16 where the processor has it: docs/inference.md."""
INT8_TOLERANCE = 0.5
"""Tolerance of the INT8 file's proof: a larger difference is an error, not rounding."""


class OnnxExporter(Exporter):
    """What both ONNX formats share."""

    int8: ClassVar[bool]
    runtime: ClassVar[str] = "ONNX Runtime"

    merge: bool | Literal["auto"] = "auto"
    """True: merge the adapter into the base or fail; "auto": merge if that is possible."""

    def check_installed(self) -> None:
        need(WRITE)

    def unsupported_reason(self, source: ExportFolder) -> str:
        if not source.manifest.head.onnx:
            return f"ONNX is not written for task.kind={source.manifest.task}; export one plain model with --merge"
        if source.manifest.saves not in manifest.SAVES:
            return f"{source.path} is an export of format '{source.manifest.saves}'; export the run itself"
        return Merged().unsupported_reason(source) if self.merge is True else ""

    def export(self, source: ExportFolder, folder: Path) -> None:
        """Traces the model with its adapter merged; compares ONNX Runtime's logits with torch's of the unmerged model.

        INT8 starts from the run's own file in fp32 where there is one.

        Raises:
            ModelError: packages are missing, or the model cannot be traced.
            MethodError: the adapter cannot be merged, and ``merge`` is True.
            ExportError: ONNX Runtime's logits are not torch's.
        """
        self.check_installed()
        from peftkit.export import onnx_graph, onnx_int8

        fp32 = runtimes.proven(source, Onnx().kind)[0] if self.int8 and self.merge == "auto" else None
        traced = fp32.path / FILE if fp32 else None
        reference = onnx_graph.write_model(source, folder / FILE, self.merge, traced)
        proof = reference.prove(folder / FILE, source.recipe.export.tolerance, "float32")
        if self.int8:
            proof.check("ONNX in fp32")
            onnx_int8.quantize(folder / FILE)
            proof = reference.prove(folder / FILE, INT8_TOLERANCE, "int8")
            proof.check("ONNX in INT8", allowed_by="rounding to INT8")
        self.finish(source, folder, proof, quantization=None, dtype=proof.dtype)

    def usage(self, contents: Manifest) -> Usage:
        from peftkit.export.card import Usage

        rounded = "Weights and activations are rounded to 8 bits: some answers differ from the trained model's."
        limits = (rounded,) if self.int8 else ()
        return Usage("onnxruntime and transformers' tokenizer", _code(contents), "ONNX Runtime", limits)

    def speed(self, contents: Manifest) -> float:
        from peftkit.models import dtypes

        return SPEED[dtypes.native_bf16()][contents.dtype]

    def load(self, source: ExportFolder, tokenizer: PreTrainedTokenizerBase) -> LoadedModel:
        """Raises ModelError if onnxruntime is missing."""
        need(READ)
        from peftkit.export.onnx_graph import OnnxModel

        contents = source.manifest
        model = OnnxModel(source.path / FILE).eval()
        return LoadedModel(model, tokenizer, "own", contents.heads, contents.fingerprint)


@EXPORTERS.register("onnx")
class Onnx(OnnxExporter):
    """A model that scores or embeds texts in one ONNX file, its adapter merged (pip install peftkit[onnx])."""

    int8: ClassVar[bool] = False

    kind: Literal["onnx"] = "onnx"


@EXPORTERS.register("onnx-int8")
class OnnxInt8(OnnxExporter):
    """The ONNX file with its weights in 8 bits: a quarter of the size, slightly different answers."""

    int8: ClassVar[bool] = True
    rounds: ClassVar[bool] = True

    kind: Literal["onnx-int8"] = "onnx-int8"


def need(packages: tuple[str, ...]) -> None:
    """Raises ModelError with the command that installs missing packages."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(f"ONNX needs {', '.join(missing)}; run `pip install {' '.join(missing)}`")


def _code(contents: Manifest) -> str:
    output = contents.head.onnx_output
    lines = [
        "import numpy as np",
        "import onnxruntime",
        "from transformers import AutoTokenizer",
        "",
        'folder = "path/to/this/folder"',
        'session = onnxruntime.InferenceSession(f"{folder}/model.onnx", providers=["CPUExecutionProvider"])',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "inputs = tokenizer(",
        f'    ["a text", "another text"], truncation=True, max_length={contents.max_length}, padding=True, '
        'return_tensors="np"',
        ")",
        "names = [given.name for given in session.get_inputs()]",
        f'({output},) = session.run(["{output}"], {{name: inputs[name].astype(np.int64) for name in names}})',
        *contents.head.onnx_code(),
    ]
    return "\n".join(lines)
