"""Patches of third-party libraries that apply to the whole process; docs/patches.md lists their figures."""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import logging
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch


def silence_libraries() -> None:
    """Silences what users cannot act on: load reports, weight progress bars, hints about optional packages.

    Errors are still shown. ``TRANSFORMERS_VERBOSITY`` takes precedence where it is set.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import_bitsandbytes()
    skip_exit_gc()
    if "TRANSFORMERS_VERBOSITY" in os.environ:
        return
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


@functools.cache
def import_bitsandbytes() -> None:
    """Imports bitsandbytes, if it is installed, without importing torch's compiler.

    peft always imports it, and it passes its fallback kernels to ``torch.compile`` at import time, which imports
    Inductor: about a second of CPU time. Here they are compiled at their first call instead.
    """
    compile_now = torch.compile

    def compile_at_first_call(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
        if function is None:
            return functools.partial(compile_at_first_call, **options)
        compiled = functools.cache(lambda: compile_now(function, **options))
        return functools.wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))

    torch.compile = compile_at_first_call  # type: ignore[assignment]
    try:
        with contextlib.suppress(ImportError):  # whoever needs it imports it again, and gets the error
            from bitsandbytes.backends.cpu import ops

            ops.lib = AlignedRows(ops.lib)  # type: ignore[assignment]
    finally:
        torch.compile = compile_now


class AlignedRows:
    """bitsandbytes' library for CPUs, whose 4-bit weights it unpacks right whatever their width.

    On processors with AVX512 it takes a wrong scale (of another block) where a row of a multiple of 16 weights is no
    multiple of a block of 64: an error of 13 to 38 % of the weights in place of NF4's 9 %, without a word.
    Blocks go over the rows of a matrix, so that it may be unpacked as one with a block in each row.
    """

    def __init__(self, library: Any) -> None:
        self._library = library

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, name)
        if not name.startswith(("cdequantize_blockwise_cpu_nf4", "cdequantize_blockwise_cpu_fp4")):
            return function

        def unpack(packed: Any, scales: Any, out: Any, block: Any, rows: Any, width: Any) -> None:
            count = rows.value * width.value
            if width.value % block.value:
                width = type(width)(count if count % block.value else block.value)
                rows = type(rows)(count // width.value)
            function(packed, scales, out, block, rows, width)

        return unpack


@functools.cache
def skip_exit_gc() -> None:
    """Skips the garbage collection of cycles at exit, a second of CPU time with torch; open files are still closed."""
    atexit.register(gc.freeze)
