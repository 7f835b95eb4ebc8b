"""What a selection of weights misses is named: fused experts, blocks of another kind, weights that modules share."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from peftkit.errors import MethodError
from peftkit.methods import missed
from peftkit.models.loading import build
from peftkit.models.tokenizer import load_tokenizer
from peftkit.schema.types import TaskInfo
from tests import tiny

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "head_dim": 8, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory):
    """Folders of tiny mixtures of experts, by their type."""
    folder = tmp_path_factory.mktemp("mixtures")
    return {kind: saved(kind, folder / kind) for kind in ("mixtral", "qwen2_moe", "gpt_oss", "jamba")}


def saved(kind, folder):
    tokens = len(AutoTokenizer.from_pretrained(tiny.tiny_tokenizer(folder, "chatml")))
    extra = {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False} if kind == "jamba" else {}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=tokens, **SIZES, **extra))
    model.save_pretrained(folder)
    return folder


def loaded(folder, **method):
    recipe = tiny.tiny_recipe(folder, method=method, task={"kind": "style"})
    return build(recipe, TaskInfo("causal_lm"), load_tokenizer(recipe.model))


def base(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def remarks(folder, **method):
    return [note for note in loaded(folder, **method).notes if "pad token" not in note]


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_the_fused_weights_of_experts_are_named(kind, mixtures):
    (remark,) = remarks(mixtures[kind])
    model = base(mixtures[kind])
    fused = {name: p for name, p in model.named_parameters() if p.ndim == 3}
    assert len(fused) == 4
    for name, parameter in fused.items():
        assert f"{name.replace('.0.', '.*.').replace('.1.', '.*.')} (2 of {list(parameter.shape)})" in remark
    linear = {m.weight for m in model.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Embedding))}
    others = [p for p in model.parameters() if p.ndim > 1 and p not in linear]
    assert f"{len(others)} other weights" in remark
    # the adapters count as well
    share = sum(p.numel() for p in others) / sum(p.numel() for p in loaded(mixtures[kind]).model.parameters())
    assert f"({share:.0%} of" in remark


def test_the_remedy_adapts_them(mixtures):
    (remark,) = remarks(mixtures["mixtral"])
    parameters = remark.split("target_parameters: [")[1].split("]")[0].split(", ")
    arguments = {"peft_type": "LORA", "arguments": {"target_parameters": parameters}}
    assert remarks(mixtures["mixtral"], kind="peft", **arguments) == []
    plain = get_peft_model(base(mixtures["mixtral"]), LoraConfig(target_modules=[], target_parameters=parameters))
    count = sum(p.numel() for n, p in plain.named_parameters() if p.requires_grad and ".mlp." in n)
    model = loaded(mixtures["mixtral"], kind="peft", **arguments).model
    assert count == sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and ".mlp." in n) > 0


def test_a_name_that_fits_a_linear_layer_and_a_fused_weight(mixtures):
    names = [n for n, _ in base(mixtures["qwen2_moe"]).named_parameters() if n.endswith("down_proj")]
    assert names == ["model.layers.0.mlp.experts.down_proj", "model.layers.1.mlp.experts.down_proj"]
    (remark,) = remarks(mixtures["qwen2_moe"], target_modules=["down_proj"])
    assert "2 other weights" in remark
    assert "model.layers.*.mlp.experts.down_proj" in remark
    assert remarks(mixtures["qwen2_moe"], target_modules=["q_proj"]) == []
    (remark,) = remarks(mixtures["qwen2_moe"], target_modules=["down_proj"], layers=-1)
    assert "1 other weight stays frozen" in remark
    with pytest.raises(MethodError, match=r"weights that belong to none, such as model.layers.0.mlp.experts.down_proj"):
        loaded(mixtures["mixtral"], target_modules=["down_proj"])


def test_biases_of_fused_experts(mixtures):
    model = base(mixtures["gpt_oss"])
    fused = [name for name, p in model.named_parameters() if name.endswith("bias") and p.ndim == 2]
    (remark,) = remarks(mixtures["gpt_oss"], kind="bitfit")
    assert len(fused) == 4
    assert all(name.replace(".0.", ".*.").replace(".1.", ".*.") in remark for name in fused)


def test_a_name_that_some_blocks_lack(mixtures):
    model = base(mixtures["jamba"])
    blocks = [n for n, layer in enumerate(model.model.layers) if hasattr(layer, "self_attn")]
    assert blocks == [1]
    remark = remarks(mixtures["jamba"], target_modules=["q_proj"])[-1]
    assert "'q_proj' matches in 1 of 2 blocks. The linear layers of block 0 are" in remark
    assert "mamba.in_proj" in remark
    whole = "model.layers.1.self_attn.q_proj"
    assert not any("blocks" in r for r in remarks(mixtures["jamba"], target_modules=[whole]))
    assert not any("blocks" in r for r in remarks(mixtures["jamba"], target_modules=r".*\.q_proj"))


def test_gpt2s_layers_are_linear(tmp_path):
    folder = tiny.tiny_gpt2(tmp_path)
    layers = [name for name, module in base(folder).named_modules() if isinstance(module, Conv1D)]
    model = loaded(folder).model
    adapted = [name for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")]
    assert adapted == layers
    assert remarks(folder) == []


@pytest.mark.parametrize(
    "arguments", [{"target_modules": ["wte"]}, {"target_modules": ["c_attn"], "modules_to_save": ["wte"]}]
)
def test_an_embedding_tied_to_the_output_head(arguments, tmp_path):
    folder = tiny.tiny_gpt2(tmp_path)
    (remark,) = remarks(folder, kind="peft", peft_type="LORA", arguments=arguments)
    assert "only transformer.wte is adapted: lm_head uses the same weight" in remark
    plain = get_peft_model(base(folder), LoraConfig(**arguments))
    assert type(plain.get_base_model().lm_head) is torch.nn.Linear, "peft leaves the head as it is"


@pytest.mark.parametrize(
    "arguments",
    [{"target_modules": ["embed_tokens"]}, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}],
)
def test_an_embedding_that_peft_keeps_tied(arguments, llama):
    options = {"kind": "peft", "peft_type": "LORA"}
    assert len(remarks(llama, **options, arguments=arguments)) == 1
    assert remarks(llama, **options, arguments={**arguments, "ensure_weight_tying": True}) == []
    assert remarks(llama, kind="trainable_tokens") == []


class Twins(torch.nn.Module):
    """Two users of one weight, and one module under two names."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.other = (torch.nn.Linear(4, 4, bias=False) for _ in range(3))
        self.second.weight = self.first.weight
        self.again = torch.nn.ModuleDict({"other": self.other})


def test_two_users_of_one_weight():
    plain = Twins()
    model = get_peft_model(plain, LoraConfig(target_modules=["first"], init_lora_weights=False))
    assert torch.equal(plain.second(torch.eye(4)), plain.first.base_layer(torch.eye(4)))
    assert not torch.allclose(plain.second(torch.eye(4)), plain.first(torch.eye(4)))
    (remark,) = missed.shared_weights(model)
    assert "only first is adapted: second uses the same weight" in remark
    assert missed.shared_weights(get_peft_model(Twins(), LoraConfig(target_modules=["first", "second"]))) == []


def test_one_module_under_two_names():
    plain = Twins()
    model = get_peft_model(plain, LoraConfig(target_modules=["other"], init_lora_weights=False))
    assert plain.again["other"] is not plain.other, "peft wraps it under its first name only"
    (remark,) = missed.shared_weights(model)
    assert "only other is adapted: again.other uses the same weight" in remark


@pytest.mark.parametrize("maker", [tiny.tiny_bert, tiny.tiny_distilbert, tiny.tiny_roberta])
def test_encoders_miss_nothing(maker, tmp_path):
    recipe = tiny.tiny_recipe(maker(tmp_path))
    info = TaskInfo("single_label_classification", ("a", "b"))
    assert build(recipe, info, load_tokenizer(recipe.model)).notes == []
