"""GGUF files in llama.cpp: every architecture and tokenizer gives what transformers gives; what does not is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from peftkit.errors import ExportError, MethodError, ModelError, RecipeError
from peftkit.export import run_export
from peftkit.export.gguf import modelfile, proof, types, vocabulary
from peftkit.export.gguf.architecture import ARCHITECTURES
from peftkit.export.gguf.architectures import llama as llama_family
from peftkit.models import chat_template
from peftkit.schema.types import TaskInfo
from tests import tiny
from tests.exporting import exported

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")
CAUSAL = TaskInfo("causal_lm")
LORA = {"kind": "lora", "rank": 4}
SIZES = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
THETA = {"rope_theta": 10000.0}
LLAMA3 = {**THETA, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
YARN = {**THETA, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LONGROPE = {**THETA, "rope_type": "longrope", "short_factor": [1 + 0.1 * n for n in range(8)],
            "long_factor": [2.0 + n for n in range(8)]}  # fmt: skip
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
FAMILIES = {
    "llama": ("Llama", {"tie_word_embeddings": False, "attention_bias": True, "rope_parameters": LLAMA3}),
    "mistral": ("Mistral", {"sliding_window": None, "rope_parameters": YARN}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma": ("Gemma", {"head_dim": 32}),
    "gemma2": ("Gemma2", GEMMA),
    "gemma3_text": ("Gemma3", {**GEMMA, "num_hidden_layers": 7}),
    "phi3": ("Phi3", {"pad_token_id": 0, "original_max_position_embeddings": 256, "rope_parameters": LONGROPE}),
}


def base(folder: Path, family: str, tokenizer: object = None, **changes: object) -> Path:
    """A base of one family, with more embedding rows than tokens where a tokenizer is given."""
    if family == "gpt2":
        return tiny.tiny_gpt2(folder)
    name, options = FAMILIES[family]
    if tokenizer is None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.tiny_tokenizer(folder, "chatml"))
    tokenizer.save_pretrained(folder)
    config = getattr(transformers, f"{name}{'TextConfig' if name == 'Gemma3' else 'Config'}")
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        sizes = {**SIZES, "initializer_range": 0.2, "vocab_size": len(tokenizer) + 5, **options, **changes}
        model = getattr(transformers, f"{name}ForCausalLM")(config(**sizes))
    model.eval().save_pretrained(folder)
    return folder


def run(folder: Path, source: Path, method: dict | None = None, task: str = "style", **parts: object) -> Path:
    """The exported adapter of a run on a base."""
    parts = {"method": method or LORA, "task": {"kind": task}, "export": {"prove": False}, **parts}
    return exported(folder, source, CAUSAL, **parts)[0]


def few_prompts(monkeypatch) -> None:
    """Proofs of two short prompts, which is what a test of something else needs."""
    monkeypatch.setattr(proof, "PROMPTS", proof.PROMPTS[:1])
    monkeypatch.setattr(proof, "NEW_TOKENS", 8)


@pytest.fixture(scope="module")
def llama_run(tmp_path_factory) -> Path:
    """A LoRA on the tiny Llama, for conversations."""
    folder = tmp_path_factory.mktemp("gguf")
    return run(folder / "run", tiny.tiny_llama(folder / "base"), task="instruction")


def test_every_family_has_a_test():
    assert set(ARCHITECTURES) == {*FAMILIES, "gpt2"}


QUICK = ("llama", "gpt2", "gemma3_text")


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in (*FAMILIES, "gpt2")]
)
def test_llama_cpp_computes_what_transformers_computes(family, tmp_path, monkeypatch):
    """In fp32; for some, base and adapter are files of their own, of which llama.cpp makes the sum."""
    few_prompts(monkeypatch)
    folder = run(tmp_path / "run", base(tmp_path / "base", family))
    content = "base+adapter" if family in {"llama", "gpt2", "phi3"} else "merged"
    said = run_export(folder, tmp_path / "out", to_format="gguf", type="f32", content=content)
    assert "(format gguf); llama.cpp gives the trained model's token ids for 10 of 10 texts" in said
    values = json.loads((tmp_path / "out" / "proof.json").read_text())
    assert values["passed"]
    assert values["kl"] < 5e-5
    assert values["same_choice"] > 0.9
    assert values["tokens"] >= 8


def test_greedy_continuations_are_those_of_generate(llama_run, tmp_path):
    """Judged by transformers and peft alone."""
    from peft import AutoPeftModelForCausalLM

    run_export(llama_run, tmp_path / "out", to_format="gguf", type="f32", prove=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama_run)
    prompts = [tokenizer(text)["input_ids"] for text in ("hello world", "the king said", "1 2 3")]
    job = {"model": str(tmp_path / "out" / "model.gguf"), "adapter": None, "context": 256, "threads": 1, "texts": [],
           "conversations": [], "prompts": prompts, "new_tokens": 12, "alternatives": 5, "stops": [],
           "plain_token": prompts[0][0]}  # fmt: skip
    (tmp_path / "job.json").write_text(json.dumps(job))
    subprocess.run([sys.executable, "-I", str(proof.WORKER), str(tmp_path)], check=True, capture_output=True)
    answers = json.loads((tmp_path / "answers.json").read_text())
    model = AutoPeftModelForCausalLM.from_pretrained(llama_run, dtype=torch.float32).eval()
    for ids, theirs in zip(prompts, answers["continuations"], strict=True):
        inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}
        ours = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        assert ours[0, len(ids) :].tolist() == theirs["ids"]


def sentencepiece(prefix: bool) -> transformers.PreTrainedTokenizerFast:
    """BPE over pieces with bytes as a fallback, like Llama 2's (with a space in front) or Gemma's."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    first = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>"]
    all_bytes = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special + all_bytes, show_progress=False)
    backend.train_from_iterator([" ".join(tiny.WORDS[start : start + 6]) for start in range(0, 60, 2)], trainer)
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in special]
    backend = Tokenizer.from_str(json.dumps(state))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    template = tiny.CHATML.replace("<|im_start|>", "<s>").replace("<|im_end|>", "</s>")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template,
        model_max_length=256,
    )  # fmt: skip


def unigram() -> transformers.PreTrainedTokenizerFast:
    """A unigram tokenizer that merges spaces, like T5's."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.Replace(Regex(" {2,}"), " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator([" ".join(tiny.WORDS[start : start + 6]) for start in range(0, 60, 2)], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", pad_token="<pad>", model_max_length=256
    )


@pytest.mark.parametrize(("kind", "model"), [("space", "llama"), ("no space", "llama"), ("unigram", "t5")])
def test_tokenizers_of_pieces_give_the_same_ids(kind, model, tmp_path, monkeypatch):
    few_prompts(monkeypatch)
    tokenizer = unigram() if kind == "unigram" else sentencepiece(kind == "space")
    folder = run(tmp_path / "run", base(tmp_path / "base", "llama", tokenizer, bos_token_id=None))
    run_export(folder, tmp_path / "out", to_format="gguf", type="f32")
    values = json.loads((tmp_path / "out" / "proof.json").read_text())
    assert values["same_token_ids"] == values["texts"] == 10
    assert values["same_template"] == values["conversations"] == (0 if kind == "unigram" else 3)
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    assert fields["tokenizer.ggml.model"].contents() == model
    assert fields["tokenizer.ggml.tokens"].contents()[-1] == f"[PAD{len(tokenizer) + 4}]"


@pytest.mark.parametrize(
    "kind", ["f16", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("q8_0", "q4_0")), "q4_k_m"]
)
def test_the_file_holds_the_weights_in_its_type(kind, llama_run, tmp_path, monkeypatch):
    few_prompts(monkeypatch)
    run_export(llama_run, tmp_path / "out", to_format="gguf", type=kind, max_kl=1.0)
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    names = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    expected = {"f16": "F16", "q8_0": "Q8_0", "q4_0": "Q4_0", "q4_k_m": "Q5_0"}[kind]  # rows of 32 are not 256
    assert names["blk.0.attn_q.weight"] == expected
    assert names["blk.0.attn_norm.weight"] == "F32"
    assert names["token_embd.weight"] == ("F16" if kind == "f16" else "Q8_0")
    assert "output.weight" not in names  # tied
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType[types.FILE_TYPES[kind]]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "In a fresh process, llama.cpp gives" in card
    assert "peftkit.load(" not in card
    assert ("rounded to" in card) == (kind != "f16")
    assert "merged" not in json.loads((tmp_path / "out" / "peftkit.json").read_text())["saves"]


@pytest.mark.parametrize(("kind", "bits"), [("Q4_K", 4), ("Q6_K", 6)])
def test_k_quants_are_ggml_s(kind, bits):
    values = np.random.default_rng(0).normal(size=(4, 512)).astype(np.float32)
    kind = gguf.GGMLQuantizationType[kind]
    encoded = types.encode(values, kind, "w")
    error = gguf.quants.dequantize(encoded, kind) - values
    assert np.abs(error).max() < 5 / 2**bits
    assert np.abs(error).max() > 0


def test_the_mixture_of_q4_k_m_gives_more_bits_to_some():
    def kind(name, width=512):
        return types.tensor_type("q4_k_m", name, (512, width), layers=16).name

    assert kind("blk.5.attn_q.weight") == "Q4_K"
    assert [kind(f"blk.{n}.ffn_down.weight") for n in (0, 1, 2, 3, 4, 15)] == ["Q6_K"] * 2 + ["Q4_K"] * 2 + ["Q6_K"] * 2
    assert kind("token_embd.weight") == kind("output.weight") == "Q6_K"
    assert kind("blk.5.attn_q.weight", 576) == "Q5_0"
    assert kind("blk.0.attn_v.weight", 576) == "Q8_0"
    assert kind("blk.0.attn_q.weight", 100) == "F16"


def test_a_weight_beyond_fp16_is_refused_and_not_written_as_infinite():
    with pytest.raises(ModelError, match=r"w holds 7e\+04, which fp16 cannot represent; export with type=bf16"):
        types.encode(np.array([[1.0, -7e4]], dtype=np.float32), gguf.GGMLQuantizationType.F16, "w")


def test_weights_in_another_order_are_refused(llama_run, tmp_path, monkeypatch):
    few_prompts(monkeypatch)
    monkeypatch.setattr(llama_family, "interleave", lambda tensor, heads: tensor)
    with pytest.raises(ExportError, match=r"distributions differ from the trained model's by .* 0.001 are allowed"):
        run_export(llama_run, tmp_path / "out", to_format="gguf")
    assert not (tmp_path / "out").exists()


def test_other_token_ids_are_refused(llama_run, tmp_path, monkeypatch):
    few_prompts(monkeypatch)
    real = gguf.GGUFWriter.add_token_merges
    monkeypatch.setattr(gguf.GGUFWriter, "add_token_merges", lambda self, merges: real(self, merges[:20]))
    with pytest.raises(ExportError, match=r"llama.cpp reads .* as other tokens: from token \d+ on \["):
        run_export(llama_run, tmp_path / "out", to_format="gguf", max_kl=100)


def test_another_template_and_another_stop_token_are_refused(llama_run, tmp_path, monkeypatch):
    few_prompts(monkeypatch)
    real = gguf.GGUFWriter.add_chat_template
    monkeypatch.setattr(gguf.GGUFWriter, "add_chat_template", lambda self, text: real(self, text + "!"))
    with pytest.raises(ExportError, match=r"llama.cpp renders a conversation of 1 turns otherwise: from token \d+"):
        run_export(llama_run, tmp_path / "out", to_format="gguf")
    made = vocabulary.stop_ids

    def with_one_more(model, tokenizer):
        return [*made(model, tokenizer), 9]

    monkeypatch.setattr(gguf.GGUFWriter, "add_chat_template", real)
    monkeypatch.setattr(proof.vocabulary, "stop_ids", with_one_more)
    monkeypatch.setattr(gguf.GGUFWriter, "add_eot_token_id", lambda self, index: None)
    with pytest.raises(ExportError, match=r"llama.cpp does not stop at .*, which ends an answer"):
        run_export(llama_run, tmp_path / "out", to_format="gguf")


def test_a_file_that_llama_cpp_cannot_load_is_reported_with_its_reason(llama_run, tmp_path):
    from peftkit.export.folder import open_export
    from peftkit.export.merged_model import merge_export

    loaded = merge_export(open_export(llama_run)).loaded
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(64))
    reference = proof.Reference(loaded.model, loaded.tokenizer, 256)
    with pytest.raises(ExportError, match=r"llama.cpp cannot run the file: \S"):
        proof.prove(reference, tmp_path / "model.gguf", "f16")


def test_the_divergence_is_that_of_the_whole_distribution_where_all_tokens_are_compared():
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(40, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum").item()
    order = q.argsort(descending=True).tolist()
    whole = [(token, q[token].item()) for token in order]
    assert proof.divergence(p, whole) == pytest.approx(expected, rel=1e-6)
    assert 0 < proof.divergence(p, whole[:20]) <= expected
    assert proof.divergence(q, whole) == pytest.approx(0, abs=1e-9)


def test_an_adapter_alone_has_no_modelfile_and_is_small(llama_run, tmp_path, monkeypatch):
    few_prompts(monkeypatch)
    run_export(llama_run, tmp_path / "out", to_format="gguf", content="adapter")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "adapter.gguf", "peftkit.json", "recipe.yaml", "metrics.json", "proof.json", "README.md",
    }  # fmt: skip
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    assert reader.fields["adapter.lora.alpha"].contents() == 8.0
    assert {tensor.name for tensor in reader.tensors} >= {"blk.0.attn_q.weight.lora_a", "blk.1.ffn_down.weight.lora_b"}
    assert "on another without a warning" in (tmp_path / "out" / "README.md").read_text()


def test_alphas_and_ranks_of_single_layers_reach_llama_cpp(llama, tmp_path, monkeypatch):
    few_prompts(monkeypatch)
    method = {**LORA, "alpha": 6, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 20}}
    folder = run(tmp_path / "run", llama, method)
    run_export(folder, tmp_path / "out", to_format="gguf", content="base+adapter", type="f32")
    assert json.loads((tmp_path / "out" / "proof.json").read_text())["kl"] < 5e-5
    assert "FROM ./base.gguf\nADAPTER ./adapter.gguf\n" in (tmp_path / "out" / "Modelfile").read_text()


@pytest.mark.parametrize(
    ("method", "problem"),
    [
        ({**LORA, "use_dora": True}, "DoRA's magnitudes; use content=merged"),
        ({**LORA, "init_lora_weights": "pissa"}, "pissa initialization was subtracted"),
        ({**LORA, "bias": "lora_only", "target_modules": ["c_attn"]}, r"this adapter has .*bias; use content=merged"),
        ({"kind": "oft", "block_size": 4}, "and this is OFT: export it with --format lora first"),
        ({"kind": "full"}, "'full' trained the base itself: there is no adapter; use content=merged"),
        ({"kind": "bitfit"}, "LoRA adapters only, not those of method 'bitfit'; use content=merged"),
    ],
)
def test_adapters_that_are_no_lora_are_refused(method, problem, llama, tmp_path):
    with_biases = "bias" in method or method["kind"] == "bitfit"
    folder = run(tmp_path / "run", tiny.tiny_gpt2(tmp_path / "base") if with_biases else llama, method)
    with pytest.raises(MethodError, match=problem):
        run_export(folder, tmp_path / "out", to_format="gguf", content="adapter")


def test_what_cannot_be_written_is_refused_with_what_can(bert, llama_run, tmp_path, monkeypatch):
    classifier, _ = exported(tmp_path / "a", bert, export={"prove": False})
    with pytest.raises(MethodError, match=r"not for task.kind=classification; export it with --format onnx"):
        run_export(classifier, tmp_path / "out", to_format="gguf")
    bottleneck = run(tmp_path / "b", tiny.tiny_gpt2(tmp_path / "gpt2"), {"kind": "prompt_tuning"})
    with pytest.raises(MethodError, match=r"llama.cpp only loads LoRA adapters unmerged"):
        run_export(bottleneck, tmp_path / "out", to_format="gguf")
    with pytest.raises(RecipeError, match="export format 'gguf': type: input should be 'f32', 'f16', "):
        run_export(llama_run, tmp_path / "out", to_format="gguf", type="q3_k")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "xllamacpp" else object())
    with pytest.raises(ModelError, match=r"run `pip install xllamacpp`, or export without a proof: prove=false"):
        run_export(llama_run, tmp_path / "out", to_format="gguf")
    with pytest.raises(ModelError, match=r"type=q4_k_m is rounded by ggml: run `pip install xllamacpp`"):
        run_export(llama_run, tmp_path / "out", to_format="gguf", type="q4_k_m", prove=False)
    said = run_export(llama_run, tmp_path / "out", to_format="gguf", prove=False)
    assert "nothing was proven (prove=false)" in said
    assert not (tmp_path / "out" / "proof.json").exists()


@pytest.mark.parametrize(
    ("family", "changes", "problem"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act=gelu, where llama.cpp computes silu"),
        ("llama", {"rope_parameters": {**THETA, "rope_type": "dynamic", "factor": 2.0}}, "rope_type=dynamic"),
        ("gemma2", {"query_pre_attn_scalar": 99}, "query_pre_attn_scalar=99, where llama.cpp takes 32"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "layer_types other than full attention in every 2th"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "soft caps on logits"),
    ],
)
def test_configs_that_llama_cpp_computes_otherwise_are_refused(family, changes, problem):
    from peftkit.export.gguf.architecture import architecture_of

    name, options = FAMILIES[family]
    config = getattr(transformers, f"{name}{'TextConfig' if name == 'Gemma3' else 'Config'}")
    with pytest.raises(MethodError, match=problem):
        architecture_of(config(**{**SIZES, **options, **changes}))


def test_other_architectures_are_refused_with_the_list():
    from peftkit.export.gguf.architecture import architecture_of

    with pytest.raises(MethodError, match=r"written for gemma, gemma2, .*qwen3; this base's model_type is 'bloom'"):
        architecture_of(transformers.BloomConfig())


def test_the_context_ends_where_llama_cpp_would_compute_otherwise():
    config = transformers.MistralConfig(sliding_window=1024, max_position_embeddings=4096)
    assert ARCHITECTURES.get("mistral")(config).context_length == 1024
    config = transformers.Qwen2Config(use_sliding_window=True, sliding_window=512, max_window_layers=1)
    assert ARCHITECTURES.get("qwen2")(config).context_length == 512


def backend(*steps: dict, **model: object) -> dict:
    return {"normalizer": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(steps)}, "model": model}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("steps", "options", "name"),
    [
        ([{**BYTES, "use_regex": True}], {}, "gpt-2"),
        ([{"type": "Digits", "individual_digits": True}, {**BYTES, "use_regex": True}], {}, "smollm"),
        ([{"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated"}, BYTES],
         {"ignore_merges": True}, "llama-bpe"),
        ([{"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated"}, BYTES], {}, "dbrx"),
        ([{"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN.replace("{1,3}", "")}, "behavior": "Isolated"}, BYTES],
         {}, "qwen2"),
    ],
)  # fmt: skip
def test_patterns_have_llama_cpp_s_names(steps, options, name):
    assert vocabulary.pattern_name(backend(*steps, **options)) == name


@pytest.mark.parametrize(
    "steps",
    [[{"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated"}], [{**BYTES, "add_prefix_space": True}]],
)
def test_unknown_patterns_are_refused_with_the_list(steps):
    with pytest.raises(ModelError, match=r"llama.cpp knows no pattern .* it is written for those of dbrx, gpt-2, "):
        vocabulary.pattern_name(backend(*steps))


@pytest.mark.parametrize("name", ["chatml", "llama2", "zephyr", "plain"])
def test_the_modelfile_s_turns_are_the_template_s(name, llama):
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    chat_template.install(tokenizer, name)
    turns = modelfile.read_turns(tokenizer)
    messages = [{"role": "system", "content": "Short."}, *proof.CONVERSATIONS[2]]
    for start in (0, 1):
        expected = chat_template.render(tokenizer, messages[start:], generate=True)
        assert turns.render(messages[start:]) == expected
    text = modelfile.text_of({"FROM": "model.gguf"}, tokenizer, [2], chat=True, system="Be brief.")
    assert text.count('"""') == 4
    assert 'SYSTEM """Be brief."""' in text
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert text.count("{{ end }}") == text.count("{{ if ") + text.count("{{ range ")


def test_a_template_that_changes_its_messages_is_left_to_ollama(llama):
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = tiny.CHATML.replace("message['content']", "message['content'] | upper")
    assert modelfile.read_turns(tokenizer) is None
    text = modelfile.text_of({"FROM": "model.gguf"}, tokenizer, [2], chat=True)
    assert "TEMPLATE" not in text
    assert "cannot be written in Go's template language" in text
    assert 'TEMPLATE """{{ .Prompt }}"""' in modelfile.text_of({"FROM": "model.gguf"}, tokenizer, [2], chat=False)


def test_phi_3_is_known_to_llama_cpp_by_name_only_where_its_tokenizer_is(llama):
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    assert vocabulary.model_name("my phi3 run", tokenizer) == "my phi_3 run"
    tokenizer.add_special_tokens({"additional_special_tokens": [
        transformers.AddedToken("<|end|>", rstrip=True, special=True), "<unk>", "<s>",
    ]})  # fmt: skip
    assert vocabulary.model_name("answers", tokenizer) == "answers (phi-3)"


def test_options_of_a_format_are_options_of_the_command(llama_run, tmp_path, monkeypatch, capsys):
    from peftkit.cli import app

    def export(*arguments: str) -> int:
        command = ["peftkit", "export", str(llama_run), "--to", str(tmp_path / "out"), "--format", "gguf", *arguments]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as stop:
            app.main()
        return int(stop.value.code or 0)

    assert export("--typ", "f32") == 2
    assert "unknown field 'typ': did you mean 'type'" in " ".join(capsys.readouterr().err.split())
    assert export("--type", "q8_0", "--prove=false", "--max-kl", "0.5") == 0
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    assert fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q8_0
    assert not (tmp_path / "out" / "proof.json").exists()
