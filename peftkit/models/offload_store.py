"""Where the frozen weights of blocks lie while they are not on the compute device: pinned host memory, or files.

A store hands out a block's weights in two ways: ``views`` are tensors over the memory or the mapped file, which can be
read at any time, and ``read`` fills a buffer on the compute device.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from peftkit.errors import ModelError
from peftkit.system import cache, files
from peftkit.system.memory import discard_pages, mapped_files, release_mapped_pages, trim_heap

SLOT, ALIGNMENT = 256, 64
"""Bytes: tensors have slots of multiples of the one in a buffer, which torch aligns to the other.

On a CPU the last bit of a matmul may depend on how an operand is aligned, and weights of a mapped file lie as the file
has them; so a tensor begins where its address has the same remainder. A GPU's memory is aligned from the start.
"""
FILE = "weights.safetensors"


@dataclass(frozen=True)
class Weight:
    """A frozen tensor of a block."""

    name: str
    owners: tuple[Tensor, ...]
    """The tensors of the model that share its bytes; the first one is a parameter or buffer."""
    dtype: torch.dtype
    shape: torch.Size
    start: int
    """Where it begins in its block's buffer."""

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def view(self, buffer: Tensor, start: int) -> Tensor:
        """The tensor whose bytes begin there in a buffer."""
        return buffer[start : start + self.nbytes].view(self.dtype).view(self.shape)


def buffer_bytes(tensors: Mapping[str, list[Tensor]]) -> int:
    """Size of the buffer of a block with these tensors."""
    return sum(_slot(owners[0]) for owners in tensors.values())


def _slot(tensor: Tensor) -> int:
    return -(-(tensor.nbytes + ALIGNMENT - 1) // SLOT) * SLOT


class BlockWeights:
    """The frozen tensors of one block, and their places in a buffer."""

    def __init__(self, tensors: Mapping[str, list[Tensor]], device: str) -> None:
        self.weights: list[Weight] = []
        self.nbytes = buffer_bytes(tensors)
        start = 0
        for name, owners in tensors.items():
            first = owners[0]
            shift = first.data_ptr() % ALIGNMENT if device == "cpu" else 0
            self.weights.append(Weight(name, tuple(owners), first.dtype, first.shape, start + shift))
            start += _slot(first)

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The tensors inside a buffer of ``nbytes`` bytes."""
        return [weight.view(buffer, weight.start) for weight in self.weights]

    def use(self, tensors: Sequence[Tensor]) -> None:
        """Makes the model's tensors use the memory of these; what they used before is freed."""
        for weight, tensor in zip(self.weights, tensors):
            for owner in weight.owners:
                owner.data = tensor


class HostStore:
    """Weights in host memory, pinned where there is a GPU, so that copies run next to computations."""

    def __init__(self, blocks: Sequence[BlockWeights], *, pinned: bool) -> None:
        self._buffers: list[Tensor] = []
        self.views: list[list[Tensor]] = []
        for block in blocks:  # one after the other, so that only one is in memory twice
            buffer = torch.empty(block.nbytes, dtype=torch.uint8, pin_memory=pinned)
            views = block.views(buffer)
            for view, weight in zip(views, block.weights):
                view.copy_(weight.owners[0].data)
            block.use(views)
            self._buffers.append(buffer)
            self.views.append(views)

    def read(self, block: int, buffer: Tensor) -> None:
        """Copies a block into a buffer of its size; on a GPU, on the current stream."""
        buffer.copy_(self._buffers[block], non_blocking=True)


class FileStore:
    """Weights in safetensors files: the model's own where they hold each tensor byte for byte, or else one in the
    cache, written once and named by the digest of its content.
    """

    def __init__(self, blocks: Sequence[BlockWeights], folder: Path, *, pinned: bool) -> None:
        self._blocks = blocks
        own = _own_places(blocks, folder)
        self.copied = own is None
        """Whether the weights were written to the cache."""
        self._places = _cached_places(blocks) if own is None else own
        self.views = [_views(block, places) for block, places in zip(blocks, self._places)]
        for block, views in zip(blocks, self.views):
            block.use(views)
        largest = max(block.nbytes for block in blocks)
        self._staging = torch.empty(largest, dtype=torch.uint8, pin_memory=True) if pinned else None
        trim_heap()

    def read(self, block: int, buffer: Tensor) -> None:
        """Copies a block into a buffer of its size. System calls read it, which leave no mapped pages in memory."""
        target = buffer if self._staging is None else self._staging[: buffer.numel()]
        # a storage that a NumPy array has shared cannot be resized any more
        memory = memoryview((ctypes.c_char * target.numel()).from_address(target.data_ptr())).cast("B")
        for weight, place in zip(self._blocks[block].weights, self._places[block]):
            place.file.read(memory[weight.start : weight.start + weight.nbytes], place.start)
        if target is not buffer:
            buffer.copy_(target, non_blocking=True)
            torch.cuda.current_stream(buffer.device).synchronize()  # the staging buffer is used again


class _File:
    """A file that is mapped, and open for reading."""

    def __init__(self, path: Path) -> None:
        self._path, self._stream = path, path.open("rb", buffering=0)
        # torch warns of memory that cannot be written; what is written here would not reach the file
        mapped = mmap.mmap(self._stream.fileno(), 0, access=mmap.ACCESS_COPY)
        mapped_files.add(mapped)
        self.bytes = torch.frombuffer(mapped, dtype=torch.uint8)

    def view(self, weight: Weight, start: int) -> Tensor:
        """The tensor whose bytes begin there, mapped."""
        return weight.view(self.bytes, start)

    def read(self, memory: memoryview, start: int) -> None:
        """Fills memory with the bytes from ``start`` on."""
        while len(memory):
            count = os.preadv(self._stream.fileno(), [memory], start)
            if count == 0:
                raise ModelError(f"{self._path}: has become shorter since training began; weights are read from it")
            memory, start = memory[count:], start + count


@dataclass(frozen=True)
class _Place:
    """Where a tensor begins in a file."""

    file: _File
    start: int
    nbytes: int


def _views(block: BlockWeights, places: Sequence[_Place]) -> list[Tensor]:
    return [place.file.view(weight, place.start) for weight, place in zip(block.weights, places)]


def _own_places(blocks: Sequence[BlockWeights], folder: Path) -> list[list[_Place]] | None:
    """Where the model's own files hold the tensors as they are used; None unless they hold every one.

    A loaded model maps these files, too, so comparing fills memory: what it brought is released after each block.
    """
    stored = {name: place for path in sorted(folder.glob("*.safetensors")) for name, place in _places_in(path)}
    places: list[list[_Place]] = []
    for block in blocks:
        own = [place for weight in block.weights if (place := _own_place(weight, stored))]
        if len(own) < len(block.weights):
            return None
        before = [weight.owners[0].data for weight in block.weights]
        block.use(_views(block, own))  # equal, even where a later block is not
        for tensor in before:
            if tensor.untyped_storage().nbytes() == tensor.nbytes:
                discard_pages(tensor.data_ptr(), tensor.nbytes)
        del before
        release_mapped_pages()
        places.append(own)
    return places


def _own_place(weight: Weight, stored: dict[str, _Place]) -> _Place | None:
    """Where the files hold a tensor: under the longest end of its name that they know, with the same bytes."""
    steps = [step for step in weight.name.split(".") if step != "base_layer"]  # which peft adds
    keys = (".".join(steps[number:]) for number in range(len(steps)))
    place = next((stored[key] for key in keys if key in stored), None)
    if place is None or place.nbytes != weight.nbytes or place.start % weight.dtype.itemsize:
        return None
    same = torch.equal(_as_bytes(place.file.view(weight, place.start)), _as_bytes(weight.owners[0].data))
    return place if same else None


def _cached_places(blocks: Sequence[BlockWeights]) -> list[list[_Place]]:
    """Writes the tensors into the cache, unless an entry with the same content is there."""
    tensors = {weight.name: weight.owners[0].data for block in blocks for weight in block.weights}
    digest = hashlib.sha256()
    for piece in files.safetensors(tensors):
        digest.update(piece)
    folder = cache.cache_folder("offload") / digest.hexdigest()[:32]

    def write(staging: Path) -> None:
        files.write_new(staging / FILE, files.safetensors(tensors))

    with cache.cached_entry(folder, write):
        stored = dict(_places_in(folder / FILE))
    return [[stored[weight.name] for weight in block.weights] for block in blocks]


def _places_in(path: Path) -> Iterator[tuple[str, _Place]]:
    """The tensors of a safetensors file (https://huggingface.co/docs/safetensors) by name."""
    file = _File(path)
    size = int.from_bytes(bytes(file.bytes[:8].tolist()), "little")
    header = json.loads(bytes(file.bytes[8 : 8 + size].numpy()))
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            yield name, _Place(file, 8 + size + start, end - start)


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
