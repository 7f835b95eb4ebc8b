"""Documents packed into one row: each one's logits are its own, and none sees another."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
)

from peftkit.errors import ModelError
from peftkit.models import packing
from peftkit.models.kernels import linear_cross_entropy

SMALL = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SMALL, attention_dropout=0.1),
    "qwen2": Qwen2Config(**SMALL),
    "mistral-window": MistralConfig(**SMALL, sliding_window=4),
    "gemma2": Gemma2Config(**SMALL, head_dim=8, sliding_window=4),
    "gpt2": GPT2Config(vocab_size=101, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3),
}
BLOOM = BloomConfig(vocab_size=101, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3)
MAMBA = MambaConfig(vocab_size=101, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.3)
COMBINATIONS = [(n, a) for n in CONFIGS for a in ("sdpa", "eager") if (n, a) != ("gemma2", "sdpa")]  # not supported
DOCUMENTS = [[(0, 7), (7, 10), (10, 16)], [(0, 5), (5, 13)]]


def make(config, attention: str = "sdpa") -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def packed_batch() -> dict[str, torch.Tensor]:
    """Two rows of 16 tokens, of which the second row's last three are padding."""
    ids = torch.randint(3, 101, (2, 16), generator=torch.Generator().manual_seed(3))
    positions, mask = torch.zeros_like(ids), torch.ones_like(ids)
    for row, documents in enumerate(DOCUMENTS):
        for start, end in documents:
            positions[row, start:end] = torch.arange(end - start)
    mask[1, 13:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "position_ids": positions, "attention_mask": mask, "labels": labels}


def logits(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**packing.inputs(batch, model), use_cache=False).logits


@pytest.mark.parametrize(("name", "attention"), COMBINATIONS)
def test_each_document_is_alone(name, attention):
    model, batch = make(CONFIGS[name], attention), packed_batch()
    assert packing.supports_packing(model) == (True, "")
    packed = logits(model, batch)
    for row, documents in enumerate(DOCUMENTS):
        for start, end in documents:
            alone = logits(model, {"input_ids": batch["input_ids"][row : row + 1, start:end]})[0]
            torch.testing.assert_close(packed[row, start:end], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "attention"), COMBINATIONS)
def test_changing_one_document_leaves_the_others_bit_for_bit(name, attention):
    model, batch = make(CONFIGS[name], attention), packed_batch()
    before = logits(model, batch)
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, 7:10] = torch.tensor([50, 51, 52])
    after = logits(model, changed)
    assert torch.equal(before[1], after[1])
    assert torch.equal(before[0, :7], after[0, :7])
    assert torch.equal(before[0, 10:], after[0, 10:])
    assert not torch.allclose(before[0, 7:10], after[0, 7:10])


def test_a_model_that_ignores_positions_in_its_mask_gets_a_mask_of_its_own(monkeypatch):
    """Where transformers finds no packed documents, a block-diagonal mask is built here."""
    from transformers import masking_utils

    model, batch = make(CONFIGS["llama"]), packed_batch()
    expected = logits(model, batch)
    assert "attention_mask" not in packing.inputs(batch, model)
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda positions: None)
    other = make(CONFIGS["llama"])
    assert packing.supports_packing(other) == (True, "")
    assert packing.inputs(batch, other)["attention_mask"].shape == (2, 1, 16, 16)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits(other, batch)[real], expected[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [BLOOM, MAMBA], ids=["bloom", "mamba"])
def test_models_that_cannot_say_why_and_refuse_packed_rows(config):
    model, batch = make(config, "eager"), packed_batch()
    works, reason = packing.supports_packing(model)
    assert not works
    assert config.model_type in reason
    with pytest.raises(ModelError, match="batches by length"):
        packing.inputs(batch, model)


def test_leaking_attention_is_found_out(monkeypatch):
    """An attention kernel that tells documents apart in one row only (or never) must not pass the trial."""
    monkeypatch.setattr(
        packing, "_block_mask", lambda positions, dtype: torch.zeros(len(positions), 1, 12, 12).to(dtype)
    )
    from transformers import masking_utils

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda positions: None)
    works, reason = packing.supports_packing(make(CONFIGS["llama"]))
    assert not works
    assert "see each other" in reason


def test_the_trial_leaves_modes_and_random_state_alone():
    model = make(CONFIGS["llama"]).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    packing.supports_packing(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)


def test_mask_over_right_padding_is_left_out_and_over_left_padding_kept():
    model = make(CONFIGS["llama"])
    ids = torch.randint(3, 101, (2, 8))
    right, left = torch.ones_like(ids), torch.ones_like(ids)
    right[0, 5:] = 0
    left[0, :3] = 0
    slim = packing.inputs({"input_ids": ids, "attention_mask": right}, model)
    assert set(slim) == {"input_ids"}
    kept = packing.inputs({"input_ids": ids, "attention_mask": left, "weight": torch.ones(2)}, model)
    assert set(kept) == {"input_ids", "attention_mask"}
    full = model(input_ids=ids, attention_mask=right).logits
    torch.testing.assert_close(model(**slim).logits[right.bool()], full[right.bool()], rtol=1e-4, atol=1e-5)


def test_a_learned_prompt_is_not_packed_and_keeps_its_mask():
    from peft import PrefixTuningConfig, get_peft_model

    model = get_peft_model(make(CONFIGS["llama"]), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    works, reason = packing.supports_packing(model)
    assert not works
    assert "learned prompt" in reason
    ids = torch.randint(3, 101, (1, 4))
    assert "attention_mask" in packing.inputs({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, model)


def test_packed_loss_equals_the_documents_own_losses():
    model, batch = make(CONFIGS["gpt2"]), packed_batch()
    alone = torch.tensor(0.0)
    for row, documents in enumerate(DOCUMENTS):
        for start, end in documents:
            ids = batch["input_ids"][row : row + 1, start:end]
            alone += linear_cross_entropy.loss(model, {"input_ids": ids, "labels": ids}).detach()
    torch.testing.assert_close(linear_cross_entropy.loss(model, batch).detach(), alone, rtol=1e-5, atol=1e-4)
