"""``peftkit quantize``: a base in NF4, calibrated on rows, that transformers loads and that runs are trained over."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import peftkit
from peftkit.cli.app import app
from peftkit.errors import ExportError, MethodError, ModelError, RecipeError, RunError
from peftkit.quantize import command as quantization
from peftkit.quantize.command import METRICS_FILE, quantize
from peftkit.quantize.gptq import quantize_blocks
from peftkit.schema.recipe import replace
from tests import tiny

pytest.importorskip("bitsandbytes")

SIZES = {"hidden_size": 64, "intermediate_size": 128}


def rows(folder):
    words = tiny.WORDS
    texts = [" ".join(words[(k * (i + 3) + 5 * i) % len(words)] for k in range(6 + i % 9)) for i in range(90)]
    (folder / "rows.csv").write_text(
        "text,label\n" + "".join(f"{text} {i},{'ab'[i % 2]}\n" for i, text in enumerate(texts)), encoding="utf-8"
    )
    return str(folder / "rows.csv")


def recipe_on(model, folder, task="style", **parts):
    columns = {"style": {}, "classification": {"text": "text", "label": "label"}}[task]
    return tiny.tiny_recipe(
        model,
        task={"kind": task},
        data={"source": rows(folder), "columns": columns, "max_length": 32},
        quantization={"kind": "nf4"},
        training={"max_steps": 3, "batch_size": 4, "threads": 1},
        evaluation={"generation": {"samples": 0}, "baselines": []},
        output_dir=str(folder / "runs"),
        **parts,
    )


BASES = {
    "llama": (lambda to: tiny.tiny_llama(to, **SIZES), "style"),
    "gpt2": (lambda to: tiny.tiny_gpt2(to, n_embd=64), "style"),
    "bert": (lambda to: tiny.add_pooling(tiny.tiny_bert(to, **SIZES)), "classification"),
    "llama that classifies": (lambda to: tiny.tiny_llama(to, **SIZES), "classification"),
}


LATE = ("gpt2", "llama that classifies")


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.slow if name in LATE else ()) for name in BASES]
)
def made(request, tmp_path_factory):
    """(recipe, folder, figures) of a base that was quantized."""
    build, task = BASES[request.param]
    folder = tmp_path_factory.mktemp("quantize")
    recipe = recipe_on(build(folder / "base"), folder, task)
    return recipe, folder / "nf4", quantize(recipe, folder / "nf4", rows=40, tune_rows=1024)


def test_it_loses_less_than_nf4_as_it_is(made):
    recipe, folder, found = made
    plain, calibrated = found["lost"]["nf4"], found["lost"]["calibrated nf4"]
    assert found["lost"]["unquantized"]["error"] == 0
    assert 0 < calibrated["error"] < 0.85 * plain["error"]
    assert found["lost"]["tuned nf4"]["error"] < calibrated["error"]
    assert found["tuned_rows"] > found["rows"]  # all training rows, as they are fewer than 1,024
    assert ("loss" in plain) == (recipe.task.kind == "style")
    assert json.loads((folder / METRICS_FILE).read_text()) == found
    assert f"{found['lost']['tuned nf4']['error']:.4f}" in (folder / "README.md").read_text()


def test_transformers_alone_finds_the_figures_that_were_written(made):
    recipe, folder, found = made
    auto = AutoModelForCausalLM if recipe.task.kind == "style" else AutoModel
    whole, packed = (auto.from_pretrained(one, dtype="float32").eval() for one in (recipe.model.source, folder))
    assert sum(type(one).__name__ == "Linear4bit" for one in packed.modules()) == found["layers"]
    assert packed.get_memory_footprint() == found["bytes"] < whole.get_memory_footprint()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("the king said no to the red ball of the new world", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        a, b = (one.base_model(input_ids=ids).last_hidden_state for one in (whole, packed))
    assert 0 < float((a - b).norm() / a.norm()) < 2 * found["lost"]["tuned nf4"]["error"]


@pytest.mark.parametrize("made", ["llama", "bert"], indirect=True)
def test_a_run_is_trained_over_it_proven_and_loaded(made):
    recipe, folder, _ = made
    run = peftkit.train(replace(recipe, model={"source": str(folder)}, quantization=None), quiet=True)
    assert json.loads((run.adapter / "proof.json").read_text())["passed"]
    if recipe.task.kind == "classification":
        assert len(peftkit.load(run.path).predict(["the king said no"])) == 1
        assert (folder / "modules.json").is_file() == (tiny.Path(recipe.model.source) / "modules.json").is_file()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return recipe_on(tiny.tiny_llama(folder / "base", **SIZES), folder)


def test_the_command_prints_what_was_lost_and_how_to_go_on(llama, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(llama.to_yaml(), encoding="utf-8")
    arguments = ["quantize", str(tmp_path / "mine.yaml"), "--to", str(tmp_path / "nf4"), "--rows", "3", "--json"]
    with pytest.raises(SystemExit) as stop:
        app(
            args=[*arguments, "--tune-rows", "6", "--keep", "k_proj", "quantization.double=false", "data.max_length=24"]
        )
    out = capsys.readouterr()
    assert not stop.value.code
    found = json.loads(out.out)
    assert (found["rows"], found["tuned_rows"], found["layers"]) == (3, 6, 12)
    assert f"model.source={(tmp_path / 'nf4').resolve()} quantization=null data.max_length=24`" in out.err
    held = json.loads((tmp_path / "nf4" / "config.json").read_text())["quantization_config"]
    assert held["bnb_4bit_use_double_quant"] is False


@pytest.mark.slow
def test_smaller_blocks_take_more_bytes_and_lose_less(llama, tmp_path):
    wide, narrow = (quantize(llama, tmp_path / str(size), rows=40, block_size=size) for size in (64, 32))
    assert narrow["lost"]["calibrated nf4"]["error"] < wide["lost"]["calibrated nf4"]["error"]
    assert (tmp_path / "32" / "model.safetensors").stat().st_size > (
        tmp_path / "64" / "model.safetensors"
    ).stat().st_size


@pytest.mark.slow
def test_tokens_count_by_what_the_loss_makes_of_them(llama, tmp_path, monkeypatch):
    guided = quantize(llama, tmp_path / "guided", rows=40)
    monkeypatch.setattr(quantization.linear_cross_entropy, "loss", None)
    alike = quantize(llama, tmp_path / "alike", rows=40)
    assert guided["lost"]["nf4"] == alike["lost"]["nf4"]
    assert guided["lost"]["calibrated nf4"] != alike["lost"]["calibrated nf4"]


def test_layers_that_are_to_stay_whole_stay_whole_in_the_runs_over_them_too(llama, tmp_path):
    found = quantize(llama, tmp_path / "nf4", rows=8, keep=["v_proj", "o_proj"])
    assert (found["kept"], found["layers"]) == (["v_proj", "o_proj"], 10)
    names = {}
    for source in (llama.model.source, tmp_path / "nf4"):
        with safe_open(f"{source}/model.safetensors", "pt") as held:
            names[source] = held.get_tensor("model.layers.1.self_attn.v_proj.weight").float()
    assert torch.equal(*names.values())
    run = peftkit.train(replace(llama, model={"source": str(tmp_path / "nf4")}, quantization=None), quiet=True)
    assert json.loads((run.adapter / "proof.json").read_text())["passed"]


def test_a_layer_to_keep_that_is_not_there_is_told_with_the_nearest(llama, tmp_path):
    with pytest.raises(RecipeError, match=r"--keep v_prj: the blocks have no linear layer of that name; .*'v_proj'"):
        quantize(llama, tmp_path / "nf4", keep=["v_prj"])


def test_rows_to_judge_by_are_never_learned_from(llama, tmp_path, monkeypatch):
    seen, real = [], quantization._draw_rows

    def choose(splits, *others):
        seen.append(real({name: split for name, split in splits.items() if name == "train"}, *others))
        return seen[0]

    monkeypatch.setattr(quantization, "_draw_rows", choose)
    found = quantize(llama, tmp_path / "nf4", rows=4, tune_rows=1024)
    learned, judged = (
        {
            tuple(row[mask.bool()].tolist())
            for one in batches
            for row, mask in zip(one["input_ids"], one["attention_mask"])
        }
        for batches in seen[0][1:]
    )
    assert found["held_out_rows"] == len(judged) > 0
    assert not learned & judged


def test_no_scales_are_trained_unasked(llama, tmp_path):
    found = quantize(llama, tmp_path / "nf4", rows=8)
    assert "tuned nf4" not in found["lost"]
    assert found["tuned_rows"] == 0
    with safe_open(tmp_path / "nf4" / "model.safetensors", "pt") as written:
        norm = written.get_tensor("model.norm.weight")
    assert torch.equal(norm, torch.ones_like(norm))
    assert "norms trained" not in (tmp_path / "nf4" / "README.md").read_text()


@pytest.mark.slow
def test_other_rows_give_other_codes_and_the_same_seed_the_same(llama, tmp_path):
    def codes(name, **training):
        quantize(replace(llama, training=training), tmp_path / name, rows=8)
        return (tmp_path / name / "model.safetensors").read_bytes()

    assert codes("a") == codes("b")
    assert codes("a2", seed=7) != codes("b2")


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        ({"quantization": None}, {}, "quantization=null; set quantization.kind=nf4"),
        ({"quantization": {"kind": "int8"}}, {}, "quantization=int8"),
        ({}, {"rows": 0}, "--rows 0: expected at least 1 row"),
        ({}, {"tune_rows": -1}, "--tune-rows -1: expected 0"),
        ({}, {"block_size": 63}, "--block-size 63: known names: 128, 32, 64"),
    ],
)
def test_what_it_cannot_do_is_said_before_anything_is_loaded(changes, options, said, llama, tmp_path, monkeypatch):
    monkeypatch.setattr(quantization, "load_plain", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(RecipeError, match=said):
        quantize(replace(llama, **changes), tmp_path / "nf4", **options)


def test_a_folder_that_holds_something_and_a_base_that_is_quantized_are_refused(llama, tmp_path):
    quantize(llama, tmp_path / "nf4", rows=2)
    with pytest.raises(RunError, match="not an empty folder"):
        quantize(llama, tmp_path / "nf4", rows=2)
    with pytest.raises(ModelError, match="already quantized with bitsandbytes"):
        quantize(replace(llama, model={"source": str(tmp_path / "nf4")}), tmp_path / "again", rows=2)


def test_a_folder_that_loads_as_another_model_is_not_left_behind(llama, tmp_path, monkeypatch):
    write = quantization._write

    def damaged(stage, quantized, *others):
        with torch.no_grad():
            quantized.model.norm.weight.mul_(2)
        write(stage, quantized, *others)
        with torch.no_grad():
            quantized.model.norm.weight.div_(2)

    monkeypatch.setattr(quantization, "_write", damaged)
    with pytest.raises(ExportError, match="gives other outputs once saved and loaded"):
        quantize(llama, tmp_path / "nf4", rows=2)
    assert not (tmp_path / "nf4").exists()


def test_blocks_that_do_not_read_what_the_one_before_made_are_refused():
    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            for block in self.blocks:
                x = x + block(x)
            return x

    model = Skipping()
    with pytest.raises(ModelError, match="is not just the output of the block before it"):
        quantize_blocks(model, model, [{"x": torch.ones(1, 4)}], lambda one, batch: one(**batch))


LOFTQ = {"kind": "lora", "rank": 6, "init_lora_weights": "loftq", "rank_pattern": {"o_proj": 3}}


@pytest.fixture(scope="module")
def completed(llama, tmp_path_factory):
    """(recipe, folder, figures) of a base that was quantized together with LoRA's start."""
    to = tmp_path_factory.mktemp("loftq") / "nf4"
    recipe = replace(llama, method={**LOFTQ, "exclude_modules": ["down_proj"]})
    return recipe, to, quantize(recipe, to, rows=40, tune_rows=8)


def test_lora_starts_from_what_rounding_took(completed):
    from peft import PeftModel

    recipe, folder, found = completed
    lost = found["lost"]
    names = list(lost)
    assert names[2:] == ["calibrated nf4", "and LoRA's start", "tuned nf4"]
    assert lost[names[3]]["error"] < 0.9 * lost["calibrated nf4"]["error"]
    assert "LoRA of rank 6 in `loftq_init`" in (folder / "README.md").read_text()
    # peft alone puts the start over the base, and gets nearer to the whole model
    whole, packed = (
        AutoModelForCausalLM.from_pretrained(one, dtype="float32").eval() for one in (recipe.model.source, folder)
    )
    ids = torch.arange(5, 45).view(4, 10)
    with torch.no_grad():
        wanted, bare = (one.base_model(input_ids=ids).last_hidden_state for one in (whole, packed))
        started = PeftModel.from_pretrained(packed, folder / "loftq_init").base_model.model
        near = started.base_model(input_ids=ids).last_hidden_state
    assert float((near - wanted).norm()) < 0.95 * float((bare - wanted).norm())


@pytest.mark.parametrize("scaling", [{}, {"alpha": 3}, {"use_rslora": True}])
def test_a_run_starts_from_the_factors_whatever_its_scale(completed, scaling):
    from peftkit.models.loading import build
    from peftkit.models.tokenizer import load_tokenizer
    from peftkit.schema.types import TaskInfo

    recipe, folder, _ = completed
    over = replace(recipe, model={"source": str(folder)}, quantization=None, method=scaling)
    model = build(over, TaskInfo("causal_lm"), load_tokenizer(over.model)).model
    layers = {name: one for name, one in model.get_base_model().named_modules() if hasattr(one, "lora_A")}
    with safe_open(folder / "loftq_init" / "adapter_model.safetensors", "pt") as held:
        assert len(list(held.keys())) == 2 * len(layers) == 2 * 12
        for name, layer in layers.items():
            a, b = (held.get_tensor(f"base_model.model.{name}.lora_{one}.weight") for one in "AB")
            own = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            assert len(a) == layer.r["default"] == (3 if name.endswith("o_proj") else 6)
            torch.testing.assert_close(own, b @ a)


def test_a_run_over_base_and_start_is_trained_and_proven(completed):
    recipe, folder, _ = completed
    over = replace(recipe, model={"source": str(folder)}, quantization=None)
    run = peftkit.train(over, quiet=True)
    assert json.loads((run.adapter / "proof.json").read_text())["passed"]


def test_a_base_made_for_a_start_is_not_used_without_it_unsaid(completed, llama, tmp_path):
    recipe, folder, _ = completed
    over = replace(recipe, model={"source": str(folder)}, quantization=None)
    with pytest.raises(MethodError, match=r"quantized for a rank of [36] at model\.layers\.0"):
        peftkit.train(replace(over, method={"rank": 4}), quiet=True)
    with pytest.raises(MethodError, match="this method has 0"):
        peftkit.train(replace(over, method={"exclude_modules": ["down_proj", "k_proj"]}), quiet=True)
    run = peftkit.train(replace(over, method={"init_lora_weights": "default"}), quiet=True)
    said = json.loads((run.path / "about.json").read_text())["notes"]
    assert any("set method.init_lora_weights=loftq method.rank=6" in note for note in said)
    quantize(llama, tmp_path / "bare", rows=3)
    with pytest.raises(MethodError, match="has no folder loftq_init"):
        peftkit.train(replace(over, model={"source": str(tmp_path / "bare")}), quiet=True)
