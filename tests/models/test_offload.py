"""Blocks that are brought to the device when they are needed compute what blocks compute that are always there.

The store is a place that the device cannot compute from: its views are poisoned (bytes of 0xFF, NaN in every float
dtype), so that only what was brought into a block's buffer gives the right numbers.
"""

from __future__ import annotations

import gc
import itertools

import psutil
import pytest
import torch

from peftkit.data.batching import collate
from peftkit.errors import ModelError, RecipeError
from peftkit.models import dtypes, offload, offload_store
from peftkit.models.loading import build, load_language_model
from peftkit.models.tokenizer import load_tokenizer
from peftkit.schema.head import head_of
from peftkit.schema.types import TaskInfo
from peftkit.system import cache
from peftkit.system.memory import trim_heap
from peftkit.training import frozen_trunk
from peftkit.training.step import TaskModule
from tests import tiny
from tests.methods.every_method import INFOS, made_batch

WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
KINDS = {"encoder": "classification", "decoder": "style", "seq2seq": "seq2seq"}
INFO = INFOS | {"seq2seq": TaskInfo("seq2seq_lm")}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {
        "encoder": tiny.tiny_bert(root / "bert", **WIDE),
        "decoder": tiny.tiny_llama(root / "llama", **WIDE),
        "seq2seq": tiny.tiny_t5(root / "t5"),
    }


@pytest.fixture
def streams(monkeypatch):
    """Every stream that is made; its store cannot be computed from, and the bytes on the device are counted."""
    made = []
    real = offload.BlockStream.__init__

    def poisoned(self, blocks, store, device):
        store.views = [
            [torch.full((v.nbytes,), 255, dtype=torch.uint8).view(v.dtype).view(v.shape) for v in views]
            for views in store.views
        ]
        real(self, blocks, store, device)
        made.append(self)
        self.sizes, bring = [], self.bring

        def counted(number, *, then):
            bring(number, then=then)
            self.sizes.append((number, on_device(self)))

        self.bring = counted

    monkeypatch.setattr(offload.BlockStream, "__init__", poisoned)
    return made


def on_device(stream) -> int:
    """Bytes of the buffers that are there; one that is on its way is waited for."""
    for coming in stream._coming.values():
        coming.result()
    return sum(buffer.untyped_storage().nbytes() for buffer in stream._buffers)


def recipe_of(bases, kind, **parts):
    model = {"source": str(bases[kind]), "dtype": "float32", **parts.pop("model", {})}
    base = {"task": {"kind": KINDS[kind]}, "data": {"source": "none.csv", "max_length": 64}}
    return tiny.tiny_recipe(bases[kind], model=model, **base, **{"method": {"kind": "lora", "rank": 4}, **parts})


def module_of(recipe, kind):
    tokenizer = load_tokenizer(recipe.model)
    loaded = build(recipe, INFO[kind], tokenizer, "cpu")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return TaskModule(loaded, head_of(INFO[kind], recipe.task)), tokenizer, loaded.notes


def batch_of(tokenizer, kind):
    if kind != "seq2seq":
        batch = made_batch(tokenizer, kind)
        return batch | {"weight": torch.ones(len(batch["input_ids"]))}
    ids = torch.randint(5, len(tokenizer), (3, 9), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.flip(1), "weight": torch.ones(3)}


def computed(recipe, kind):
    """Losses and gradients of two micro-batches, and outputs of an evaluation between and after them."""
    module, tokenizer, _ = module_of(recipe, kind)
    batch, results = batch_of(tokenizer, kind), {}
    torch.manual_seed(1)
    for number in range(2):
        with dtypes.autocast(dtypes.dtype_for(recipe.model)):
            module.train()
            loss = module(batch)
            loss.backward()
            with torch.no_grad():
                outputs = module.eval()(batch, outputs=True)
        results |= {f"loss {number}": loss.detach()} | {f"{name} {number}": each for name, each in outputs.items()}
    gradients = {name: each.grad for name, each in module.named_parameters() if each.requires_grad}
    return results | {name: each for name, each in gradients.items() if each is not None}


def same(results, expected):
    assert results.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(results[name], expected[name])] == []


LAST_TWO = {"kind": "lora", "rank": 4, "layers": -2, "dropout": 0.1}
CASES = [
    ("encoder", None, "off", "float32", {}),
    ("decoder", "nf4", "full", "float32", {}),
    ("seq2seq", None, "full", "float32", {}),
    ("encoder", None, "off", "float32", LAST_TWO),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [
            ("encoder", None, "full", "float32", {}),
            ("encoder", None, "selective", "float32", {}),
            ("encoder", "nf4", "off", "float32", {}),
            ("encoder", "int8", "off", "float32", {}),
            ("encoder", "int8", "full", "float32", {}),
            ("encoder", None, "off", "float32", {"kind": "lora", "rank": 4, "use_dora": True}),
            ("encoder", None, "off", "float32", {"kind": "bitfit"}),
            ("decoder", None, "off", "bfloat16", {}),
            ("decoder", "nf4", "off", "float32", {}),
            ("decoder", "nf4", "full", "bfloat16", {}),
            ("decoder", None, "off", "float32", {"kind": "vera", "rank": 4}),
            ("decoder", None, "off", "float32", {"kind": "bottleneck", "variant": "parallel", "size": 4}),
            ("decoder", None, "off", "float32", {"kind": "prompt_tuning", "virtual_tokens": 3}),
            ("seq2seq", None, "off", "float32", {}),
        ]
    ),
]


@pytest.mark.parametrize(("kind", "quantization", "checkpointing", "dtype", "method"), CASES)
def test_losses_gradients_and_outputs_are_equal_to_the_bit(
    kind, quantization, checkpointing, dtype, method, bases, streams
):
    if quantization:
        pytest.importorskip("bitsandbytes", reason="the quantization extra is not installed")
    parts = {
        "quantization": quantization and {"kind": quantization},
        "method": method or {"kind": "lora", "rank": 4, "dropout": 0.1},
        "training": {"gradient_checkpointing": checkpointing},
    }
    expected = computed(recipe_of(bases, kind, model={"dtype": dtype}, **parts), kind)
    assert not streams
    results = computed(recipe_of(bases, kind, model={"dtype": dtype, "offload": "disk"}, **parts), kind)
    same(results, expected)
    (stream,) = streams
    sizes = [block.nbytes for block in stream._blocks]
    assert max(size for _, size in stream.sizes) <= max(map(sum, itertools.pairwise(sizes)))
    assert {number for number, _ in stream.sizes} == set(range(len(sizes)))
    assert on_device(stream) == 0, "the evaluation has ended"


def test_each_pass_reads_each_block_once_and_the_next_one_ahead(bases, streams, monkeypatch):
    module, tokenizer, _ = module_of(recipe_of(bases, "encoder", model={"offload": "disk"}), "encoder")
    (stream,) = streams
    read, real = [], stream._store.read
    monkeypatch.setattr(stream._store, "read", lambda block, buffer: (read.append(block), real(block, buffer)))
    loss = module.train()(batch_of(tokenizer, "encoder"))
    on_device(stream)
    assert read == [0, 1, 2, 3]
    assert set(stream._coming) == {2, 3}, "the backward pass begins with these"
    loss.backward()
    on_device(stream)
    assert read == [0, 1, 2, 3, 1, 0]
    assert on_device(stream) == 0


def test_a_model_is_prepared_with_one_block_at_a_time(bases, monkeypatch):
    empty, buffers, sizes = torch.empty, [], []

    def counted(*size, **options):
        tensor = empty(*size, **options)
        if options.get("dtype") == torch.uint8:
            buffers.append(tensor)
            sizes.append([each.untyped_storage().nbytes() for each in buffers])
        return tensor

    monkeypatch.setattr(torch, "empty", counted)
    recipe = recipe_of(bases, "decoder", model={"offload": "disk"})
    build(recipe, INFO["decoder"], load_tokenizer(recipe.model), "cpu")
    assert len(sizes) == WIDE["num_hidden_layers"]
    assert all(sum(map(bool, each)) == 1 for each in sizes)


def test_features_of_a_frozen_trunk_need_none_of_its_blocks(bases, streams):
    recipe = recipe_of(bases, "encoder", model={"offload": "disk"}, method={"layers": -1})
    module, tokenizer, _ = module_of(recipe, "encoder")
    batch, (stream,) = batch_of(tokenizer, "encoder"), streams
    module.eval()
    trunk, _ = frozen_trunk.find_frozen_trunk(
        module.model, lambda b: module(dict(b), outputs=True), batch, module.pooling
    )
    module.freeze_trunk(trunk)
    assert trunk.cut == 3
    with torch.no_grad():
        hidden = trunk.capture(lambda: module(dict(batch), outputs=True), batch)
    module.train()
    torch.manual_seed(0)
    whole = module(batch)
    whole.backward()
    gradients = {name: each.grad.clone() for name, each in module.named_parameters() if each.requires_grad}
    module.zero_grad()
    stream.sizes.clear()
    torch.manual_seed(0)
    entered = module({**trunk.reduced(batch), frozen_trunk.FEATURES: hidden})
    entered.backward()
    assert {number for number, _ in stream.sizes} == {3}
    same({name: each.grad for name, each in module.named_parameters() if each.requires_grad}, gradients)
    assert torch.equal(entered, whole)


def test_a_pass_that_fails_leaves_the_next_one_as_it_was(bases, streams, monkeypatch):
    """Memory that runs out in one pass is retried with fewer rows."""
    module, tokenizer, _ = module_of(recipe_of(bases, "decoder", model={"offload": "disk"}), "decoder")
    batch, (stream,) = batch_of(tokenizer, "decoder"), streams
    expected = module.train()(batch)

    def fails(block, buffer):
        raise MemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(stream._store, "read", fails)
        with pytest.raises(MemoryError):
            module(batch)
    assert torch.equal(module(batch), expected)


def test_weights_are_read_from_the_models_own_files_or_from_the_cache(bases, streams, tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTKIT_CACHE", str(tmp_path))
    _, _, notes = module_of(recipe_of(bases, "decoder", model={"offload": "disk"}), "decoder")
    assert any("the model's own files" in note for note in notes)
    assert not any((tmp_path / "offload").glob("*"))
    narrow = recipe_of(bases, "decoder", model={"offload": {"to": "disk"}, "dtype": "bfloat16"})
    _, _, notes = module_of(narrow, "decoder")
    assert any("a file in the cache" in note for note in notes)
    (entry,) = (path for path in (tmp_path / "offload").iterdir() if not path.name.startswith("."))
    written = (entry / offload_store.FILE).stat().st_mtime_ns
    expected = computed(recipe_of(bases, "decoder", model={"dtype": "bfloat16"}), "decoder")
    same(computed(narrow, "decoder"), expected)
    assert (entry / offload_store.FILE).stat().st_mtime_ns == written, "it was used again"
    damaged = bytearray((entry / offload_store.FILE).read_bytes())
    damaged[-100] ^= 1
    (entry / offload_store.FILE).write_bytes(damaged)
    same(computed(narrow, "decoder"), expected)
    assert cache.is_intact(entry)


def test_a_file_that_becomes_shorter_is_named(bases, tmp_path):
    tensors = {"a.weight": [torch.arange(512.0)]}
    store = offload_store.FileStore([offload_store.BlockWeights(tensors, "cpu")], tmp_path, pinned=False)
    place = store._places[0][0]
    with place.file._path.open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ModelError, match="has become shorter since training began"):
        store.read(0, torch.empty(2048, dtype=torch.uint8))


def test_host_memory_is_read_like_a_file(bases, streams, monkeypatch):
    """Between a GPU and the CPU; here both are the CPU, which recipes are refused."""
    expected = computed(recipe_of(bases, "decoder"), "decoder")
    monkeypatch.setattr(offload, "is_offloaded", lambda model, device: model.offload is not None)
    same(computed(recipe_of(bases, "decoder", model={"offload": "cpu"}), "decoder"), expected)
    assert isinstance(streams[0]._store, offload_store.HostStore)


def test_weights_leave_memory(tmp_path):
    """Of 100 MB in 6 blocks, resident memory has next to nothing after loading, and after a forward pass."""
    sizes = {"hidden_size": 640, "intermediate_size": 1600, "num_hidden_layers": 6, "initializer_range": 0.02}
    base = {"decoder": tiny.tiny_llama(tmp_path / "base", **sizes)}
    process, ids = psutil.Process(), torch.arange(40).view(2, 20)

    def growth(**model):
        """Of resident memory: after loading, and after a forward pass; and the weights' bytes."""
        gc.collect()  # what earlier tests left
        trim_heap()
        before = process.memory_info().rss
        recipe = recipe_of(base, "decoder", model=model)
        loaded = build(recipe, INFO["decoder"], load_tokenizer(recipe.model), "cpu").model
        gc.collect()
        trim_heap()
        sizes = [process.memory_info().rss - before]
        with torch.no_grad():
            loaded(ids)
        trim_heap()
        return [*sizes, process.memory_info().rss - before], sum(each.nbytes for each in loaded.parameters())

    growth(offload="disk")  # allocates what is kept for later
    sizes, weights = growth()
    assert sizes[-1] > 0.8 * weights
    sizes, _ = growth(offload="disk")
    assert max(sizes) < 0.3 * weights


def test_what_blocks_share_stays(bases):
    tokenizer = load_tokenizer(recipe_of(bases, "decoder").model)
    recipe = recipe_of(bases, "decoder", method={"kind": "vera", "rank": 4})
    model = build(recipe, INFO["decoder"], tokenizer, "cpu").model
    tensors = offload.block_tensors(model, offload.find_all_blocks(model))
    names = {name for block in tensors for name in block}
    assert any(name.endswith("q_proj.base_layer.weight") for name in names)
    assert not any("vera_" in name or "embed" in name or "lm_head" in name for name in names)


@pytest.mark.parametrize(
    ("base", "error", "message"),
    [
        ("two", ModelError, "2 of BertForSequenceClassification's 2 blocks"),
        ("albert", ModelError, "blocks have frozen"),
    ],
)
def test_models_without_several_blocks_are_refused(base, error, message, tmp_path):
    if base == "two":
        folder = tiny.tiny_bert(tmp_path / "two")
    else:
        from transformers import AlbertConfig, AlbertModel

        sizes = {"embedding_size": 16, "max_position_embeddings": 128, **WIDE, "num_attention_heads": 4}
        folder = tiny._save(tmp_path / "albert", "wordpiece", AlbertConfig, AlbertModel, sizes)
    with pytest.raises(ModelError, match=message):
        module_of(recipe_of({"encoder": folder}, "encoder", model={"offload": "disk"}), "encoder")


def test_checkpoints_of_other_quantizations_are_refused(bases, monkeypatch):
    model = build(recipe_of(bases, "encoder"), INFO["encoder"], load_tokenizer(recipe_of(bases, "encoder").model)).model
    monkeypatch.setattr(offload, "quantized_with", lambda config: "gptq")
    tensors = offload.block_tensors(model, offload.find_all_blocks(model))
    with pytest.raises(ModelError, match="quantized with gptq"):
        offload.check_blocks(model, tensors)


def test_devices_and_sharding_are_refused_by_name(bases):
    to_cpu = recipe_of(bases, "encoder", model={"offload": "cpu"}).model
    disk = recipe_of(bases, "encoder", model={"offload": "disk"}).model
    with pytest.raises(RecipeError, match=r"model\.offload=disk"):
        offload.check(to_cpu, "cpu")
    with pytest.raises(RecipeError, match="this run's device is mps"):
        offload.check(disk, "mps")
    with pytest.raises(RecipeError, match="FSDP, ZeRO"):
        offload.check(disk, "cuda", sharded=True)
    offload.check(to_cpu, "cuda")
    offload.check(disk, "cpu")
    assert not offload.is_offloaded(to_cpu, "cpu")


def test_recipes_that_do_not_fit_are_refused(bases):
    with pytest.raises(RecipeError, match=r"method\.kind=full trains the base's own weights"):
        recipe_of(bases, "encoder", model={"offload": "disk"}, method={"kind": "full"})
    with pytest.raises(RecipeError, match=r"set training\.compile=false"):
        recipe_of(bases, "encoder", model={"offload": "disk"}, training={"compile": True})
    with pytest.raises(RecipeError, match=r"model\.offload"):
        recipe_of(bases, "encoder", model={"offload": "tape"})


def test_a_plain_language_model_is_offloaded_too(bases, streams):
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        expected = load_language_model(recipe_of(bases, "decoder"), "cpu")(ids).logits
        offloaded = load_language_model(recipe_of(bases, "decoder", model={"offload": "disk"}), "cpu")
        assert torch.equal(offloaded(ids).logits, expected)
    assert on_device(streams[0]) == 0


def test_generation_with_a_cache_reads_blocks_for_every_token(bases, streams):
    module, _, _ = module_of(recipe_of(bases, "decoder"), "decoder")
    other, tokenizer, _ = module_of(recipe_of(bases, "decoder", model={"offload": "disk"}), "decoder")
    rows = collate({"input_ids": [[3, 4, 5, 6]], "labels": [[3, 4, 5, 6]]}, tokenizer)["input_ids"]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = module.eval().model.generate(input_ids=rows, **options)
    assert torch.equal(other.eval().model.generate(input_ids=rows, **options), expected)
    assert sum(number == 0 for number, _ in streams[0].sizes) == 5
