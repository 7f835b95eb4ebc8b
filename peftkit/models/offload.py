"""Frozen blocks that are brought to the compute device when they are needed (``model.offload``).

Two blocks are on the device at a time: the one that computes and, copied meanwhile, the next one. Forward passes go up
the stack, backward passes down. Adapters and everything else that is trained, embeddings, the head, activations and the
optimizer stay on the device.

Autograd keeps references to the weights that a forward pass has used, as saved tensors and in the functions of
quantized layers. They stay valid and take no memory: the buffer of a block is always the same storage, which is shrunk
to nothing when the block leaves and gets its bytes back, equal ones, before the block's backward pass begins. That is
how FSDP2 frees gathered parameters (Zhao et al. 2023, arXiv:2304.11277). While a block is away, its parameters are
views of the store, so that code that reads a weight outside of a block's call finds it on the CPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from peftkit.errors import ModelError, RecipeError
from peftkit.models.blocks import find_blocks, unwrap
from peftkit.models.offload_store import BlockWeights, FileStore, HostStore
from peftkit.models.patching import is_replaced
from peftkit.models.quantization.bitsandbytes_support import quantization_constants
from peftkit.models.quantization.checkpoint import quantized_with
from peftkit.models.sources import folder_of, resolve
from peftkit.schema.recipe import ModelConfig

AT_ONCE = 2
"""Blocks on the device at a time."""
_OFFLOADED: WeakSet[nn.Module] = WeakSet()


def is_offloaded(model: ModelConfig, device: torch.device | str | None) -> bool:
    """Whether blocks leave the device; host memory is no other place than a CPU's own."""
    return model.offload is not None and not (model.offload.to == "cpu" and torch.device(device or "cpu").type == "cpu")


def check(model: ModelConfig, device: str, *, sharded: bool = False) -> None:
    """Raises RecipeError unless ``model.offload`` works on this type of device."""
    if model.offload is None:
        return
    if not is_offloaded(model, device):
        raise RecipeError(
            "model.offload=cpu moves frozen weights from a GPU into the CPU's memory, and this run is on the CPU; use "
            "model.offload=disk, or leave it out"
        )
    if device not in ("cpu", "cuda"):
        raise RecipeError(f"model.offload works on CPUs and CUDA GPUs, and this run's device is {device}; leave it out")
    if sharded:
        raise RecipeError(
            "model.offload does not work with weights sharded over processes (FSDP, ZeRO); use one of the two: "
            "configs/accelerate/multi_gpu.yaml, or model.offload=null"
        )


def offload_blocks(model: nn.Module, config: ModelConfig, device: torch.device | str | None) -> list[str]:
    """As ``model.offload`` says, takes the frozen weights of the blocks off the device and moves the rest to it.

    Args:
        model: on the CPU if it is to be offloaded; with its method applied, and final dtypes.
        config: the recipe's ``model``.
        device: which computes.

    Returns:
        What was done, as a note for the user; nothing if the recipe does not offload, or not on this device.

    Raises:
        ModelError: it has no blocks with frozen weights that could be moved one by one.
    """
    if config.offload is None or not is_offloaded(config, device):
        return []
    target = torch.device(device or "cpu")
    modules = find_all_blocks(model)
    tensors = block_tensors(model, modules)
    check_blocks(model, tensors)
    blocks = [BlockWeights(each, target.type) for each in tensors]
    pinned = target.type == "cuda"
    if config.offload.to == "cpu":
        store: HostStore | FileStore = HostStore(blocks, pinned=pinned)
        place = "host memory"
    else:
        store = FileStore(blocks, folder_of(resolve(config)), pinned=pinned)
        place = "a file in the cache" if store.copied else "the model's own files"
    stream = BlockStream(blocks, store, target)
    stream.place_rest(model)
    _OFFLOADED.add(unwrap(model))
    for number, module in enumerate(modules):
        module.register_forward_pre_hook(partial(stream.before_forward, number), with_kwargs=True)
        module.register_forward_hook(partial(stream.after_forward, number))
    total, largest = sum(block.nbytes for block in blocks), max(block.nbytes for block in blocks)
    return [
        f"frozen weights of {len(blocks)} blocks ({total / 1e6:,.1f} MB) are read from {place} when they are needed; "
        f"at most {AT_ONCE} blocks ({AT_ONCE * largest / 1e6:,.1f} MB) are on the device"
    ]


def has_offloaded_blocks(model: nn.Module) -> bool:
    """Whether weights of a (wrapped) model are off its device, so that they must not be changed."""
    return unwrap(model) in _OFFLOADED


class BlockStream:
    """Brings blocks to the device and lets them go, in the order of forward and backward passes."""

    def __init__(self, blocks: Sequence[BlockWeights], store: HostStore | FileStore, device: torch.device) -> None:
        self._blocks, self._store, self._device = blocks, store, device
        self._buffers: list[Tensor] = []
        self._on_device: list[list[Tensor]] = []
        for block in blocks:  # shrunk before the next one is made: all of them might not fit
            buffer = torch.empty(block.nbytes, dtype=torch.uint8, device=device)
            self._on_device.append(block.views(buffer))
            buffer.untyped_storage().resize_(0)
            self._buffers.append(buffer)
        self._coming: dict[int, Future[Any]] = {}
        """Blocks that are on the device, or on their way; with the end of the copy on a GPU's stream."""
        self._ready: set[int] = set()
        self._reads_back = [False] * len(blocks)
        """Whether a backward pass through the block follows its latest forward pass."""
        self._backward = -1
        """The latest backward pass, by torch's number for it."""
        self._worker: ThreadPoolExecutor | None = None
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._left: torch.cuda.Event | None = None
        """When computations with the block that left last have ended."""

    def place_rest(self, model: nn.Module) -> None:
        """Moves everything but the blocks' frozen weights to the device."""
        for block, tensors in zip(self._blocks, self._on_device):
            block.use(tensors)  # which are there already, and empty
        nn.Module.to(model, self._device)
        for block, views in zip(self._blocks, self._store.views):
            block.use(views)

    def before_forward(self, number: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        """The forward pre-hook of a block."""
        if is_replaced(module):
            return
        if _current_backward() >= 0:  # activation checkpointing repeats the forward pass
            self.bring(number, then=self._below(number))
        elif number + 1 < len(self._blocks):
            self.bring(number, then=number + 1)
        else:  # a backward pass begins with the last two
            self.bring(number, then=self._below(number) if torch.is_grad_enabled() else None)

    def after_forward(self, number: int, module: nn.Module, args: Any, output: Any) -> None:
        """The forward hook of a block: prepares its backward pass."""
        if is_replaced(module) or _current_backward() >= 0:
            return
        differentiable = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
        self._reads_back[number] = bool(differentiable)
        for tensor in differentiable:
            tensor.register_hook(partial(self.before_backward, number))
        if number + 1 == len(self._blocks) and not differentiable:  # else its backward pass is next
            self.evict_all()

    def before_backward(self, number: int, gradient: Tensor) -> None:
        """The hook of a block's output, called when its gradient is there."""
        if (current := _current_backward()) != self._backward:
            self._backward = current
            torch.autograd.Variable._execution_engine.queue_callback(self.evict_all)  # type: ignore[attr-defined]
        self.bring(number, then=self._below(number))

    def bring(self, number: int, *, then: int | None) -> None:
        """Returns when a block is on the device; evicts all others, and begins to bring another one."""
        for other in [each for each in self._coming if each not in (number, then)]:
            self._evict(other)
        self._start(number)
        if number not in self._ready:
            self._wait_for(number)
            self._blocks[number].use(self._on_device[number])
            self._ready.add(number)
        if then is not None:
            self._start(then)

    def evict_all(self) -> None:
        """Leaves no block on the device."""
        for number in list(self._coming):
            self._evict(number)

    def _below(self, number: int) -> int | None:
        """The block whose backward pass is next."""
        return number - 1 if number > 0 and self._reads_back[number - 1] else None

    def _start(self, number: int) -> None:
        if number not in self._coming:
            self._worker = self._worker or ThreadPoolExecutor(1, "offload")
            self._coming[number] = self._worker.submit(self._copy, number, self._left)

    def _copy(self, number: int, left: torch.cuda.Event | None) -> torch.cuda.Event | None:
        """Fills the buffer of a block, on a stream of its own; its memory was that of blocks that have left."""
        buffer = self._buffers[number]
        with torch.no_grad(), nullcontext() if self._copies is None else torch.cuda.stream(self._copies):
            if self._copies is not None and left is not None:
                self._copies.wait_event(left)
            buffer.untyped_storage().resize_(buffer.numel())
            self._store.read(number, buffer)
            return None if self._copies is None else self._copies.record_event()

    def _wait_for(self, number: int) -> None:
        """Returns when a block has been copied, or on a GPU, when its computations will wait for the copy."""
        try:
            copied = self._coming[number].result()
        except BaseException:  # such as memory that runs out
            self._let_go(number)
            raise
        if copied is not None:
            torch.cuda.current_stream(self._device).wait_event(copied)

    def _evict(self, number: int) -> None:
        if number not in self._ready:
            self._wait_for(number)
        self._let_go(number)
        if self._copies is not None:
            self._left = torch.cuda.current_stream(self._device).record_event()

    def _let_go(self, number: int) -> None:
        del self._coming[number]
        self._ready.discard(number)
        self._blocks[number].use(self._store.views[number])
        self._buffers[number].untyped_storage().resize_(0)


def _current_backward() -> int:
    """torch's number of the backward pass in which this is called; -1 outside of one."""
    return int(torch._C._current_graph_task_id())


def find_all_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks in the order in which a forward pass calls them; of an encoder–decoder, the encoder's first."""
    base = unwrap(model)
    try:
        if getattr(base.config, "is_encoder_decoder", False):
            return [*find_blocks(base.get_encoder())[1], *find_blocks(base.get_decoder())[1]]
        return list(find_blocks(base)[1])
    except ModelError as error:
        raise ModelError(f"model.offload moves weights block by block: {error}") from None


def block_tensors(model: nn.Module, modules: Sequence[nn.Module]) -> list[dict[str, list[Tensor]]]:
    """For each block: name → tensors that share their bytes, of its frozen weights and quantization constants.

    What several blocks share, or a block with the rest of the model, is left out: it stays on the device.
    """
    names = {module: name for name, module in model.named_modules()}
    blocks: list[dict[Any, tuple[str, list[Tensor]]]] = []
    for module in modules:
        tensors: dict[Any, tuple[str, list[Tensor]]] = {}
        for name, tensor in _named_tensors(names[module], module):
            if not tensor.requires_grad and tensor.is_contiguous() and not is_traceable_wrapper_subclass(tensor):
                tensors.setdefault(_address(tensor), (name, []))[1].append(tensor)
        blocks.append(tensors)
    uses = Counter(address for tensors in blocks for address in tensors)
    inside = {id(tensor) for tensors in blocks for _, owners in tensors.values() for tensor in owners}
    for _, tensor in _named_tensors("", model):
        if id(tensor) not in inside and not is_traceable_wrapper_subclass(tensor):
            uses[_address(tensor)] += 1
    return [
        dict(entry for address, entry in tensors.items() if uses[address] == 1 and entry[1][0].numel())
        for tensors in blocks
    ]


def _address(tensor: Tensor) -> tuple[int, int]:
    """Storage and first byte, which tensors without data have, too."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset()) * tensor.element_size()


def _named_tensors(prefix: str, top: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, quantization constants, and buffers that are saved: others may be computed anew in a forward pass."""
    for path, module in top.named_modules(prefix=prefix):
        yield from ((f"{path}.{name}", each) for name, each in module.named_parameters(recurse=False))
        yield from ((f"{path}.{name}", each) for name, each in quantization_constants(module))
        for name, each in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}", each


def check_blocks(model: nn.Module, tensors: Sequence[Mapping[str, list[Tensor]]]) -> None:
    """Raises ModelError unless offloading the result of ``block_tensors`` saves memory."""
    base = unwrap(model)
    kind = quantized_with(base.config)
    if kind not in (None, "bitsandbytes"):
        raise ModelError(
            f"model.offload moves unquantized weights and those of bitsandbytes, and this base is quantized with "
            f"{kind}; leave it out, or use the unquantized model with quantization.kind=nf4"
        )
    with_weights = sum(map(bool, tensors))
    if with_weights <= AT_ONCE:
        raise ModelError(
            f"model.offload keeps {AT_ONCE} blocks on the device, and {with_weights} of {type(base).__name__}'s "
            f"{len(tensors)} blocks have frozen weights that they share with no other; leave it out"
        )
