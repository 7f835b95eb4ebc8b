"""The chunked loss against torch's cross_entropy over the model's own full logits, value and gradients, in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GPT2Config, GraniteConfig, LlamaConfig

from peftkit.models.kernels import linear_cross_entropy
from peftkit.planning import traced_model

VOCABULARY = 97
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip
CONFIGS = {
    "llama": lambda: LlamaConfig(**SMALL),
    "llama-tied": lambda: LlamaConfig(**SMALL, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
    ),
    "gemma2-capped": lambda: Gemma2Config(**SMALL, final_logit_softcapping=2.0, attn_implementation="eager"),
    "granite-scaled": lambda: GraniteConfig(**SMALL, logits_scaling=3.0),
    "cohere-scaled": lambda: CohereConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"}, logit_scale=0.25),
}  # fmt: skip


def make(name: str, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager").to(dtype)


def batch_of(mask: str = "some", rows: int = 3, tokens: int = 12) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
    attention = torch.ones_like(ids)
    attention[1, 8:] = 0
    labels = ids.masked_fill(attention == 0, -100)
    if mask == "some":
        labels = labels.masked_fill(torch.rand(ids.shape, generator=generator) < 0.5, -100)
    elif mask == "none":
        labels = torch.full_like(ids, -100)
    elif mask == "one":
        labels = torch.full_like(ids, -100)
        labels[2, 5] = ids[2, 5]
    return {"input_ids": ids, "attention_mask": attention, "labels": labels, "weight": torch.ones(rows)}


def reference(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")


def gradients(model: torch.nn.Module, value: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunk", [1, 3 * 4 * VOCABULARY, 2**25], ids=["row", "three-rows", "whole"])
@pytest.mark.parametrize("mask", ["all", "some", "one"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen-head", "trained-head"])
def test_value_and_gradients_equal_cross_entropy(monkeypatch, chunk, mask, frozen):
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(linear_cross_entropy, "SLICE_BYTES", 2 * 4 * VOCABULARY)
    model, batch = make("llama"), batch_of(mask)
    model.get_output_embeddings().requires_grad_(not frozen)
    expected = reference(model, batch)
    wanted = gradients(model, expected)
    got = linear_cross_entropy.loss(model, batch)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    found = gradients(model, got)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen-head", "trained-head"])
def test_every_architecture(monkeypatch, name, frozen):
    """Tied heads, soft-capped and scaled logits: found by trial, exact, and never through whole logits."""
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_BYTES", 5 * 4 * VOCABULARY)
    model, batch = make(name), batch_of()
    model.get_output_embeddings().weight.requires_grad_(not frozen)
    assert linear_cross_entropy._shaping(model, batch["input_ids"]) is not None
    expected = reference(model, batch)
    wanted = gradients(model, expected)
    got = linear_cross_entropy.loss(model, batch)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    found = gradients(model, got)
    for parameter in wanted:
        torch.testing.assert_close(found[parameter], wanted[parameter], rtol=1e-8, atol=1e-11, msg=parameter)
    torch.testing.assert_close(model(input_ids=batch["input_ids"]).logits.shape[-1], VOCABULARY)  # the head is back


@pytest.mark.parametrize("name", ["llama", "gemma2-capped", "granite-scaled"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen-head", "trained-head"])
def test_each_token_s_loss_equals_cross_entropy_with_any_weights(monkeypatch, name, frozen):
    """A loss that is not linear in the rows' sums, as those over preferences are not."""
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_BYTES", 5 * 4 * VOCABULARY)
    monkeypatch.setattr(linear_cross_entropy, "SLICE_BYTES", 2 * 4 * VOCABULARY)
    model, batch = make(name), batch_of()
    model.get_output_embeddings().weight.requires_grad_(not frozen)

    def of_rows(losses, rows):
        return losses.new_zeros(3).index_add(0, rows, losses).mul(torch.tensor([0.1, -0.2, 0.05])).sigmoid().log().sum()

    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].flatten(0, 1)
    targets = batch["labels"][:, 1:]
    every = F.cross_entropy(logits, targets.flatten(), reduction="none", ignore_index=-100)
    keep = targets.flatten() != -100
    wanted = gradients(model, of_rows(every[keep], torch.arange(3).repeat_interleave(11)[keep]))
    losses, rows = linear_cross_entropy.token_losses(model, batch)
    torch.testing.assert_close(losses, every[keep], rtol=1e-12, atol=1e-12)
    found = gradients(model, of_rows(losses, rows))
    assert found.keys() == wanted.keys()
    for parameter in wanted:
        torch.testing.assert_close(found[parameter], wanted[parameter], rtol=1e-8, atol=1e-12, msg=parameter)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy.token_losses(model, batch)[0], every[keep])


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen-head", "trained-head"])
def test_gradcheck(monkeypatch, cap, scale, frozen):
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_BYTES", 2 * 4 * 11)
    torch.manual_seed(0)
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    module = torch.nn.Linear(4, 11, dtype=torch.float64).requires_grad_(not frozen)
    head = linear_cross_entropy.OutputLayer(module, module.forward, linear_cross_entropy.Shaping(scale, cap), 11)
    targets = torch.tensor([0, 10, 3, 3, 7])
    trained = [] if frozen else [module.weight, module.bias]
    assert torch.autograd.gradcheck(lambda h, *_: linear_cross_entropy._sum(h, targets, head), (hidden, *trained))


def test_no_scored_token_gives_zero_and_still_a_graph():
    model, batch = make("llama"), batch_of("none")
    value = linear_cross_entropy.loss(model, batch)
    value.backward()
    assert value.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_first_token_of_a_packed_document_is_not_scored():
    model, batch = make("llama"), batch_of("all")
    batch["attention_mask"].fill_(1)
    batch["labels"] = batch["input_ids"].clone()
    batch["position_ids"] = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]] * 3)
    alone = sum(
        F.cross_entropy(model(input_ids=ids[:, a:b]).logits[0, :-1], ids[0, a + 1 : b], reduction="sum")
        for ids in batch["input_ids"].split(1)
        for a, b in ((0, 5), (5, 12))
    )
    # transformers computes rotary cosines in fp32; AVX2's vectorized ones differ in the last bit between lengths
    torch.testing.assert_close(linear_cross_entropy.loss(model, batch), alone, rtol=1e-7, atol=1e-7)
    assert linear_cross_entropy.row_outputs(model, batch)["weight"].tolist() == [10, 10, 10]


def test_row_outputs_agree_with_the_loss_and_with_argmax():
    model, batch = make("gemma2-capped", torch.float32), batch_of()
    rows = linear_cross_entropy.row_outputs(model, batch)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").sum(1)
    torch.testing.assert_close(rows["loss"], losses.detach(), rtol=1e-5, atol=1e-5)
    assert rows["weight"].tolist() == (targets != -100).sum(1).tolist()
    assert rows["correct"].tolist() == ((logits.argmax(-1) == targets) & (targets != -100)).sum(1).tolist()
    assert {value.dtype for value in rows.values()} == {torch.float32}


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": "all-linear"},
    ],
    ids=["lora-on-head", "saved-head", "all-linear"],
)
def test_through_peft(monkeypatch, settings):
    from peft import LoraConfig, get_peft_model

    monkeypatch.setattr(linear_cross_entropy, "CHUNK_BYTES", 4 * 4 * VOCABULARY)
    config = LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    model, batch = get_peft_model(make("llama"), config).double(), batch_of()
    expected = reference(model, batch)
    wanted, got = gradients(model, expected), linear_cross_entropy.loss(model, batch)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    found = gradients(model, got)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-8, atol=1e-11, msg=name)


def test_learned_prompt_stands_before_the_tokens():
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(make("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).double()
    batch = batch_of()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 3:-1]
    expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(linear_cross_entropy.loss(model, batch), expected, rtol=1e-12, atol=1e-12)


def test_inside_distributed_data_parallel(tmp_path):
    """The loss is formed within the wrapper's forward pass, so its reducer sees the gradients."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, batch = make("llama-tied"), batch_of()
        wanted = gradients(model, reference(model, batch))
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        found = gradients(model, linear_cross_entropy.loss(wrapped, batch))
    finally:
        dist.destroy_process_group()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-11, msg=name)


def test_unknown_shaping_falls_back_to_whole_logits(caplog):
    model, batch = make("llama"), batch_of()
    plain = model.forward

    def odd(*args, **kwargs):
        output = plain(*args, **kwargs)
        output.logits = output.logits.sign() * output.logits.abs().sqrt()
        return output

    model.forward = odd
    torch.testing.assert_close(linear_cross_entropy.loss(model, batch), reference(model, batch), rtol=1e-12, atol=1e-12)
    assert "not in chunks" in caplog.text
    torch.testing.assert_close(
        linear_cross_entropy.row_outputs(model, batch)["loss"].sum().double(), reference(model, batch)
    )


def test_nothing_as_wide_as_tokens_times_vocabulary_is_held(monkeypatch):
    """The largest tensor autograd saves, and the largest the head ever forms, do not grow with tokens × vocabulary."""
    from torch.utils._python_dispatch import TorchDispatchMode

    monkeypatch.setattr(linear_cross_entropy, "CHUNK_BYTES", 4 * 4000 * 8)

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                Largest.elements = max(Largest.elements, out.numel())
            return out

    torch.manual_seed(0)
    config = LlamaConfig(**{**SMALL, "vocab_size": 4000})
    model = AutoModelForCausalLM.from_config(config)
    model.get_output_embeddings().requires_grad_(False)
    ids = torch.randint(3, 4000, (4, 64))
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    linear_cross_entropy.loss(model, batch)  # the trial of the model is over
    saved: list[int] = []
    with Largest(), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        linear_cross_entropy.loss(model, batch).backward()
    weight, whole = 32 * 4000, 4 * 63 * 4000
    assert Largest.elements == weight  # a chunk of 8 rows is far smaller, whole logits are 8 times larger
    assert max(saved) <= weight < whole


def test_a_cpu_takes_its_softmax_by_slices_and_a_gpu_by_whole_chunks(monkeypatch):
    monkeypatch.setattr(linear_cross_entropy, "SLICE_BYTES", 2 * 4 * 11)
    chunk, layer = torch.zeros(5, 11), torch.nn.Linear(4, 11)
    output = linear_cross_entropy.OutputLayer(layer, layer.forward, linear_cross_entropy.Shaping(), 11)
    assert output.rows(chunk.device) == 32 * 2**20 // (4 * 11)
    assert [(piece.start, piece.stop) for piece in linear_cross_entropy._slices(chunk)] == [(0, 2), (2, 4), (4, 5)]
    with traced_model.as_on_a_gpu():  # in the plan of a GPU
        assert [(piece.start, piece.stop) for piece in linear_cross_entropy._slices(chunk)] == [(0, 5)]
        assert output.rows(chunk.device) == 128 * 2**20 // (4 * 11)
    assert len(list(linear_cross_entropy._slices(chunk))) == 3
