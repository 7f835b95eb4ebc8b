"""How weights are stored in a GGUF file: the type of each tensor, and its bytes.

Simple types are rounded by the ``gguf`` package. K-quants are rounded by ggml itself, whose C function
``ggml_quantize_chunk`` the library of ``xllamacpp`` exports; which tensors of q4_k_m take more bits follows llama.cpp.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from peftkit.errors import ModelError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

FileType = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_k_m"]
FILE_TYPES = {
    "f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0",
    "q4_k_m": "MOSTLY_Q4_K_M",
}  # fmt: skip
"""Members of ``gguf.LlamaFileType``."""
VOCABULARY = ("token_embd.weight", "output.weight")
ALWAYS_F32 = ("position_embd", "rope_")
BLOCK, SUPERBLOCK = 32, 256
"""Weights per scale in the simple types and in K-quants: rows must be a multiple."""
LARGEST_F16 = 65504.0


def tensor_type(file_type: FileType, name: str, shape: tuple[int, ...], layers: int) -> GGMLQuantizationType:
    """The type of one tensor of a file; vectors and tables of positions stay in fp32."""
    from gguf import GGMLQuantizationType as Types

    if len(shape) == 1 or name.startswith(ALWAYS_F32):
        return Types.F32
    if file_type in {"f32", "f16", "bf16"}:
        return Types[file_type.upper()]
    if shape[-1] % BLOCK:
        return Types.F16
    if file_type == "q4_k_m":
        return _k_quant(name, shape[-1], layers)
    return Types.Q8_0 if file_type == "q8_0" or name in VOCABULARY else Types.Q4_0


def _k_quant(name: str, width: int, layers: int) -> GGMLQuantizationType:
    """llama.cpp's mixture: six bits for the vocabulary and for half of the value and down projections, else four."""
    from gguf import GGMLQuantizationType as Types

    six = name in VOCABULARY
    if any(part in name for part in (".attn_v.", ".attn_qkv.", ".ffn_down.")):
        block, eighth = int(name.split(".")[1]), layers // 8
        six = block < eighth or block >= 7 * layers // 8 or (block - eighth) % 3 == 2
    if width % SUPERBLOCK:  # as llama.cpp falls back
        return Types.Q8_0 if six else Types.Q5_0
    return Types.Q6_K if six else Types.Q4_K


def encode(values: np.ndarray, kind: GGMLQuantizationType, name: str) -> np.ndarray:
    """The weights (fp32) rounded to a type: fp16 or fp32 numbers, or bytes.

    Raises:
        ModelError: a weight is outside of fp16, or K-quants cannot be rounded here.
    """
    from gguf import GGMLQuantizationType as Types
    from gguf import quants

    if kind == Types.F32:
        return values
    if kind == Types.F16:
        if (largest := float(np.abs(values).max(initial=0))) > LARGEST_F16:
            raise ModelError(f"{name} holds {largest:.3g}, which fp16 cannot represent; export with type=bf16")
        return values.astype(np.float16)
    return _by_ggml(values, kind) if kind in {Types.Q4_K, Types.Q6_K} else quants.quantize(values, kind)


def byte_shape(shape: tuple[int, ...], kind: GGMLQuantizationType) -> tuple[tuple[int, ...], Any]:
    """(shape, NumPy dtype) of the array that ``encode`` returns."""
    from gguf import GGMLQuantizationType as Types
    from gguf import quants

    if kind in {Types.F32, Types.F16}:
        return shape, np.dtype(np.float32 if kind == Types.F32 else np.float16)
    return quants.quant_shape_to_byte_shape(shape, kind), np.dtype(np.uint8)


def k_quants_reason() -> str:
    """Why K-quants cannot be rounded here; empty if they can."""
    if importlib.util.find_spec("xllamacpp") is None:
        return "type=q4_k_m is rounded by ggml: run `pip install xllamacpp`, or use q4_0 or q8_0"
    if not hasattr(_ggml(), "ggml_quantize_chunk"):
        return "the installed xllamacpp does not export ggml_quantize_chunk, which rounds q4_k_m; use q4_0 or q8_0"
    return ""


@functools.cache
def _ggml() -> ctypes.CDLL:
    import xllamacpp

    (library,) = Path(xllamacpp.__file__).parent.glob("xllamacpp*.so")
    return ctypes.CDLL(str(library))


def _by_ggml(values: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    quantize = _ggml().ggml_quantize_chunk
    floats, integer = ctypes.POINTER(ctypes.c_float), ctypes.c_int64
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, floats, ctypes.c_void_p, integer, integer, integer, floats]
    values = np.ascontiguousarray(values, dtype=np.float32)
    shape, _ = byte_shape(values.shape, kind)
    encoded = np.zeros(shape, dtype=np.uint8)
    rows = values.size // values.shape[-1]
    written = quantize(
        int(kind), values.ctypes.data_as(floats), encoded.ctypes.data, 0, rows, values.shape[-1], None
    )  # fmt: skip
    if written != encoded.nbytes:
        raise ModelError(f"ggml wrote {written} bytes of {kind.name}, expected {encoded.nbytes}; use type=q4_0")
    return encoded
