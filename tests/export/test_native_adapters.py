"""Adapters in our own format: proven in a fresh process, refused by peft and on another base, exchanged by name."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import peftkit
from peftkit import replace
from peftkit.errors import Interrupted, MethodError, ModelError, RecipeError, RunError
from peftkit.export import loading, run_export
from peftkit.models.inventory import trainable_table
from peftkit.schema.types import TaskInfo
from tests import tiny
from tests.exporting import TEXTS, exported

TEXT = TaskInfo("causal_lm")
BOTTLENECK = {"kind": "bottleneck", "variant": "houlsby", "size": 6, "nonlinearity": "gelu"}
BITFIT = {"kind": "bitfit"}
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return tiny.tiny_gpt2(tmp_path_factory.mktemp("models") / "gpt2")


def language(folder, **parts):
    return {"info": TEXT, "task": {"kind": "style"}, "model": {"source": str(folder), "dtype": "float32"}, **parts}


def proof(folder):
    return json.loads((folder / "proof.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", [BOTTLENECK, {**BOTTLENECK, "variant": "parallel", "scaling": "learned"}, BITFIT],
                         ids=["houlsby", "parallel", "bitfit"])  # fmt: skip
def test_an_encoder_s_export_is_proven_and_loads(bert, tmp_path, method, dtype):
    folder, made = exported(tmp_path / "run", bert, method=method, model={"dtype": dtype})
    assert proof(folder)["passed"]
    assert proof(folder)["relative"] < 1e-4
    saved = load_file(folder / WEIGHTS)
    trained = {name: one for name, one in made.loaded.model.named_parameters() if one.requires_grad}
    assert saved.keys() == trained.keys()
    assert all(torch.equal(saved[name], trained[name]) for name in saved)
    run = peftkit.load(folder)
    model = run.model
    assert {str(model.get_parameter(name).dtype) for name in saved} == {"torch.float32"}
    frozen = {one.dtype for name, one in model.named_parameters() if name.endswith("query.weight")}
    assert frozen == {getattr(torch, dtype)}
    batch = made.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        expected = made.loaded.model.eval()(**batch).logits.float().numpy()
    assert run.logits(TEXTS) == pytest.approx(expected, abs=1e-5 if dtype == "float32" else 0.15)


@pytest.mark.parametrize("quantization", [None, {"kind": "nf4"}, {"kind": "int8"}], ids=["none", "nf4", "int8"])
def test_a_decoder_s_adapters_are_proven_on_quantized_bases_too(llama, tmp_path, quantization):
    folder, _ = exported(tmp_path / "run", llama, **language(llama, method=BOTTLENECK, quantization=quantization))
    assert proof(folder)["passed"]
    run = peftkit.load(folder)
    assert len(run.generate(["the world"], max_new_tokens=4)) == 1


def test_biases_need_nothing_but_transformers_and_can_be_merged(gpt2, tmp_path):
    folder, made = exported(tmp_path / "run", gpt2, **language(gpt2, method=BITFIT, export={"merge": True}))
    assert proof(folder)["passed"]
    saved = load_file(folder / WEIGHTS)
    assert all(name.endswith("bias") for name in saved)
    plain = AutoModelForCausalLM.from_pretrained(gpt2, dtype=torch.float32)
    assert not plain.load_state_dict(saved, strict=False).unexpected_keys
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged", dtype=torch.float32)
    assert proof(tmp_path / "run" / "merged")["passed"]
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = made.loaded.model.eval()(input_ids=ids).logits
        assert torch.allclose(plain.eval()(input_ids=ids).logits, expected, atol=1e-5)
        assert torch.allclose(merged.eval()(input_ids=ids).logits, expected, atol=1e-5)
    assert "load_state_dict" in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("method", [BOTTLENECK, BITFIT], ids=["bottleneck", "bitfit"])
def test_the_lines_on_the_card_run(bert, tmp_path, method, monkeypatch, capsys):
    folder, made = exported(tmp_path / "run", bert, method=method)
    card = (folder / "README.md").read_text(encoding="utf-8")
    code = card.partition("```python\n")[2].partition("```")[0]
    exec(compile(code.replace("path/to/this/folder", str(folder)), "card", "exec"), {})  # the card is ours
    said = capsys.readouterr().out
    assert any(label in said for label in made.prepared.info.labels)


def test_peft_refuses_it_and_says_where_to_go(bert, tmp_path):
    from peft import PeftModel

    folder, _ = exported(tmp_path / "run", bert, method=BOTTLENECK, export={"prove": False})
    base = AutoModelForSequenceClassification.from_pretrained(bert, config=AutoConfig.from_pretrained(folder))
    with pytest.raises((KeyError, ValueError), match=r"USE_peftkit\.load"):
        PeftModel.from_pretrained(base, folder)


@pytest.mark.parametrize("method", [BOTTLENECK, BITFIT], ids=["bottleneck", "bitfit"])
def test_another_base_or_damaged_files_are_refused(bert, tmp_path, method):
    own = tiny.tiny_bert(tmp_path / "own")
    folder, _ = exported(tmp_path / "run", own, method=method, export={"prove": False})
    saved = load_file(folder / WEIGHTS)
    name = next(name for name in saved if "classifier" not in name)
    save_file({**saved, name: saved[name][:1]}, folder / WEIGHTS)
    with pytest.raises(ModelError, match=r"does not fit its base.*shape"):
        loading.load_exported(folder)
    save_file({("else." + one if one == name else one): value for one, value in saved.items()}, folder / WEIGHTS)
    with pytest.raises(ModelError, match="does not fit its base"):
        loading.load_exported(folder)
    save_file(saved, folder / WEIGHTS)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    for change, said in (({"format": 9}, "newer peftkit"), ({"adapters": [{"size": 3}]}, "not as peftkit writes it")):
        (folder / "adapter_config.json").write_text(json.dumps({**config, **change}), encoding="utf-8")
        with pytest.raises(ModelError, match=said):
            loading.load_exported(folder)
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    loading.load_exported(folder)
    tiny.tiny_bert(own, initializer_range=0.1)
    with pytest.raises(ModelError, match="is another one"):
        loading.load_exported(folder)


def test_bottlenecks_are_not_merged(bert, tmp_path):
    with pytest.raises(RecipeError, match=r"export.merge: method 'bottleneck' cannot be merged.*nonlinear"):
        tiny.tiny_recipe(bert, method=BOTTLENECK, export={"merge": True})
    folder, _ = exported(tmp_path / "run", bert, method=BOTTLENECK, export={"prove": False})
    with pytest.raises(MethodError, match="nonlinear"):
        run_export(folder, tmp_path / "merged", merge=True)
    assert not (tmp_path / "merged").exists()
    assert "(format peft)" in run_export(folder, tmp_path / "copy")
    assert peftkit.load(tmp_path / "copy").adapters == ("default",)


@pytest.mark.parametrize(("method", "other"), [(BOTTLENECK, {**BOTTLENECK, "variant": "parallel", "size": 3}),
                                               (BITFIT, BITFIT)], ids=["bottleneck", "bitfit"])  # fmt: skip
def test_adapters_are_exchanged_by_name_and_taken_off(bert, tmp_path, method, other):
    first, made = exported(tmp_path / "one", bert, method=method, export={"prove": False})
    second, _ = exported(tmp_path / "two", bert, method=other, training={"seed": 5}, export={"prove": False})
    alone = [peftkit.load(folder).logits(TEXTS) for folder in (first, second)]
    assert abs(alone[0] - alone[1]).max() > 1e-3
    run = peftkit.load(first, adapters={"two": second})
    assert (run.adapters, run.adapter) == (("default", "two"), "default")
    assert (run.logits(TEXTS) == alone[0]).all()
    run.use_adapter("two")
    assert (run.logits(TEXTS) == alone[1]).all()
    with run.base() as base:
        assert base.adapter is None
        names = {name for name, _ in run.model.named_parameters()}
        plain = AutoModelForSequenceClassification.from_pretrained(bert, config=made.loaded.model.config)
        assert names == {name for name, _ in plain.named_parameters()}
        for name, parameter in plain.bert.named_parameters():
            if "pooler" not in name:
                assert torch.equal(run.model.bert.get_parameter(name), parameter), name
    assert (run.logits(TEXTS) == alone[1]).all()
    run.use_adapter("default")
    assert (run.logits(TEXTS) == alone[0]).all()
    with pytest.raises(RunError, match="no adapter is called 'tow'"):
        run.use_adapter("tow")
    if method is BOTTLENECK:
        with pytest.raises(ModelError, match="cannot share a base"):
            run.add_adapter(exported(tmp_path / "three", bert, method=BITFIT, export={"prove": False})[0], "three")


@pytest.mark.parametrize(
    "method", [BOTTLENECK, pytest.param(BITFIT, marks=pytest.mark.slow)], ids=["bottleneck", "bitfit"]
)
def test_a_whole_run_changes_its_own_parameters_only_and_resumes_to_the_same_bytes(small_recipe, monkeypatch, method):
    from peftkit.training.interruptions import StopRequest

    recipe = replace(small_recipe, method=method, export={"prove": True})
    whole = peftkit.train(recipe, quiet=True)
    assert proof(whole.adapter)["passed"]
    assert whole.metrics["test"]["accuracy"] > whole.metrics["majority"]["accuracy"]
    run = peftkit.load(whole.path)
    source = small_recipe.model.source
    tokenizer, plain = AutoTokenizer.from_pretrained(source), AutoModelForSequenceClassification.from_pretrained(source)
    changed = set(load_file(whole.adapter / WEIGHTS))
    assert len(tokenizer) > 0
    for name, parameter in plain.named_parameters():
        if name not in changed:
            assert torch.equal(run.model.get_parameter(name), parameter), name
    if method is BOTTLENECK:
        assert any("(bottleneck)" in row.part for row in trainable_table(run.model))
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "code", property(lambda self: 15 if (asked.append(1), len(asked) == 5)[1] else 0))
        with pytest.raises(Interrupted):
            peftkit.train(recipe, quiet=True)
    again = peftkit.train(recipe, resume=True, quiet=True)
    assert os.path.samefile(again.path.parent, whole.path.parent)
    assert (again.adapter / WEIGHTS).read_bytes() == (whole.adapter / WEIGHTS).read_bytes()
