"""Runs that stand on earlier ones: an adapter trained further, or merged first; judged by peft and transformers."""

from __future__ import annotations

import json
import random
import shutil

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import peftkit
from peftkit import Recipe
from peftkit.data.pipeline import encode, prepare
from peftkit.errors import Interrupted, MethodError, ModelError, RecipeError, RunError
from peftkit.experiments import scores
from peftkit.export import run_export
from peftkit.export.formats.merged import Merged
from peftkit.models.loading import build
from peftkit.models.sources import folder_of, resolve
from peftkit.models.tokenizer import load_tokenizer
from peftkit.planning.devices import parse_device
from peftkit.planning.plan import make_plan
from peftkit.schema.head import head_of
from peftkit.schema.recipe import replace
from peftkit.training.reference import Reference
from peftkit.training.step import TaskModule
from tests import tiny

WEIGHTS = "adapter_model.safetensors"
OFF = {"duplicates": "off", "near_duplicates": "off", "leakage": "off"}
TARGETS = ("q_proj", "v_proj")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache of its own, so that what is merged here is merged for the first time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFTKIT_CACHE", str(tmp_path_factory.mktemp("stages")))
        yield


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Instructions, preferences, and texts under two sets of labels."""
    draw, root = random.Random(0), tmp_path_factory.mktemp("rows")

    def words(count):
        return " ".join(draw.choices(tiny.WORDS, k=count))

    makers = {
        "instruction": lambda number: {"instruction": f"{words(2)} {number}", "output": words(3)},
        "preference": lambda number: {"prompt": f"{words(2)} {number}", "chosen": "good great", "rejected": words(2)},
        "colours": lambda number: {"text": f"{words(3)} {number}", "label": ("red", "blue")[number % 2]},
        "moods": lambda number: {"text": f"{words(3)} {number}", "label": ("happy", "sad")[number % 2]},
    }
    for kind, make in makers.items():
        for split, count in (("train", 16), ("validation", 4), ("test", 4)):
            path = root / kind / f"{split}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(f"{json.dumps(make(n))}\n" for n in range(count)), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def recipes(rows, llama, bert, tmp_path_factory):
    """Recipes of one task on one kind of rows, merged with what is given."""
    folder = tmp_path_factory.mktemp("runs")

    def recipe(data, **changes):
        kind = data if data in ("instruction", "preference") else "classification"
        values = {
            "name": data, "model": {"source": str(bert if kind == "classification" else llama), "dtype": "float32"},
            "method": {"kind": "lora", "rank": 4, "target_modules": ["query", "value"]},
            "task": {"kind": kind}, "data": {"source": str(rows / data), "max_length": 64, "cleaning": OFF},
            "training": {"epochs": 2, "batch_size": 8, "learning_rate": 0.02, "threads": 1, "log_every": 1},
            "evaluation": {"baselines": [], "generation": {"samples": 0}}, "export": {"prove": False},
            "tracking": [], "output_dir": str(folder),
        }  # fmt: skip
        if kind != "classification":
            values["method"]["target_modules"] = list(TARGETS)
        return replace(Recipe.parse(values), **changes)

    return recipe


@pytest.fixture(scope="module")
def first(recipes):
    """A run that followed instructions."""
    return peftkit.train(recipes("instruction"), quiet=True)


@pytest.fixture(scope="module")
def classifier(recipes):
    return peftkit.train(recipes("colours"), quiet=True)


@pytest.fixture(scope="module")
def foreign(llama, tmp_path_factory):
    """An adapter that peft made and wrote on its own, with weights that are not its initial ones."""
    torch.manual_seed(5)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("foreign") / "theirs"
    model.save_pretrained(folder)
    return folder


def on(path, use):
    return {"adapter": str(path), "adapter_use": use}


def built(recipe):
    """The recipe's untrained model, and its data."""
    tokenizer = load_tokenizer(recipe.model)
    prepared = prepare(recipe)
    loaded = build(recipe, prepared.info, tokenizer, "cpu")
    return loaded, encode(prepared, tokenizer, recipe), head_of(prepared.info, recipe.task)


def manifest_of(run):
    return json.loads((run.adapter / "peftkit.json").read_text(encoding="utf-8"))


def log_of(run):
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def interrupted(recipe):
    """Trains the recipe, stops at the second validation, and resumes."""
    stops = iter([False, True])

    def stop(step, metrics):
        if next(stops, False):
            raise Interrupted("stopped", 15)

    with pytest.raises(Interrupted):
        peftkit.train(recipe, quiet=True, on_validation=stop)
    return peftkit.train(recipe, quiet=True, resume=True)


@pytest.fixture(scope="module")
def resumed(recipes, tmp_path_factory):
    """``first`` again, interrupted and resumed."""
    return interrupted(recipes("instruction", output_dir=str(tmp_path_factory.mktemp("resumed"))))


@pytest.mark.parametrize("use", ["continue", "merge"])
def test_two_stages_interrupted_in_each_end_with_the_same_bytes(use, first, resumed, recipes, tmp_path):
    second = recipes("preference", output_dir=str(tmp_path / "whole"), model=on(first.path, use))
    one, two = first, peftkit.train(second, quiet=True)
    second = recipes("preference", output_dir=str(tmp_path / "parts"), model=on(resumed.path, use))
    other, last = resumed, interrupted(second)
    assert (one.adapter / WEIGHTS).read_bytes() == (other.adapter / WEIGHTS).read_bytes()
    assert (two.adapter / WEIGHTS).read_bytes() == (last.adapter / WEIGHTS).read_bytes()
    assert (one.adapter / WEIGHTS).read_bytes() != (two.adapter / WEIGHTS).read_bytes()
    assert two.metrics["test"] == last.metrics["test"]
    assert two.metrics["test"]["reward_margin"] > 0.1


def test_loss_and_gradients_begin_as_those_of_peft(foreign, recipes, llama):
    loaded, encoded, head = built(recipes("instruction", model=on(foreign, "continue")))
    module = TaskModule(loaded, head).train()
    batch = encoded.splits["train"].batch(np.arange(16), loaded.tokenizer)
    loss = module(batch)
    loss.backward()
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), foreign, is_trainable=True)
    labels = batch["labels"]
    wanted = theirs(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
    wanted = wanted * (labels[:, 1:] != -100).sum()
    wanted.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
    gradients = {name: each.grad for name, each in loaded.model.named_parameters() if each.requires_grad}
    others = {name: each.grad for name, each in theirs.named_parameters() if each.requires_grad}
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], rtol=1e-4, atol=1e-5)


def test_an_adapter_of_peft_is_continued_and_exported_on_the_original_base(foreign, recipes, llama):
    done = peftkit.train(recipes("instruction", model=on(foreign, "continue"), export={"prove": True}), quiet=True)
    plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), done.adapter).eval()
    ids = torch.arange(5, 12)[None]
    ours = peftkit.load(done.path).model(input_ids=ids).logits
    torch.testing.assert_close(plain(input_ids=ids).logits, ours, rtol=1e-4, atol=1e-4)
    contents = manifest_of(done)
    assert contents["base"] == str(llama)
    (stage,) = contents["stages"]
    assert (stage["run"], stage["use"], stage["method"]) == ("theirs", "continued", "peft")
    assert "name of the base" in stage["checked"]
    assert "`theirs`" in (done.adapter / "README.md").read_text(encoding="utf-8")
    assert "theirs" in (done.path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("named", ["source", "run", "merge", "foreign"])
def test_the_merged_base_is_that_of_peft(named, first, foreign, recipes, llama):
    changes = {
        "source": {"source": str(first.path)}, "run": {"source": f"run:{first.path}"},
        "merge": on(first.path, "merge"), "foreign": on(foreign, "merge"),
    }[named]  # fmt: skip
    folder = folder_of(resolve(recipes("instruction", model=changes).model))
    base = AutoModelForCausalLM.from_pretrained(llama)
    adapter = foreign if named == "foreign" else first.adapter
    wanted = peft.PeftModel.from_pretrained(base, adapter).merge_and_unload().eval()
    ids = torch.arange(3, 20)[None]
    merged = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(merged(input_ids=ids).logits, wanted(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert json.loads((folder / "proof.json").read_text())["passed"]


def test_a_model_is_merged_once(first, recipes, monkeypatch):
    source = resolve(recipes("instruction", model={"source": str(first.path)}).model)
    folder = folder_of(source)
    monkeypatch.setattr(Merged, "write_base", lambda *_: pytest.fail("merged again"))
    assert folder_of(source) == folder
    assert folder_of(resolve(recipes("instruction", model=on(first.path, "merge")).model)) == folder


def test_a_run_on_a_run_remembers_all_stages_and_outlives_the_cache(first, recipes, tmp_path):
    second = peftkit.train(recipes("preference", name="second", model={"source": str(first.path)}), quiet=True)
    third = peftkit.train(recipes("instruction", name="third", model=on(second.path, "merge") | {
        "source": str(first.path)}, export={"prove": True}), quiet=True)  # fmt: skip
    contents = manifest_of(third)
    assert [stage["run"] for stage in contents["stages"]] == [first.path.name, second.path.name]
    assert [stage["use"] for stage in contents["stages"]] == ["merged", "merged"]
    card = (third.adapter / "README.md").read_text(encoding="utf-8")
    assert f"`{first.path.name}`" in card
    assert "--merge" in card
    prompt = "hello you"
    answer = peftkit.load(third.path).generate(prompt, max_new_tokens=5)
    shutil.rmtree(contents["base"])
    assert peftkit.load(third.path).generate(prompt, max_new_tokens=5) == answer
    run_export(third.path, tmp_path / "whole", merge=True)
    assert peftkit.load(tmp_path / "whole").generate(prompt, max_new_tokens=5) == answer
    assert json.loads((tmp_path / "whole" / "peftkit.json").read_text())["stages"] == contents["stages"]


def test_a_classifier_of_other_labels_gives_its_backbone_and_no_head(classifier, recipes, bert):
    loaded, *_ = built(recipes("moods", model={"source": str(classifier.path)}))
    assert any("this run's is new" in note for note in loaded.notes)
    plain = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    wanted = peft.PeftModel.from_pretrained(plain, classifier.adapter).merge_and_unload().state_dict()
    model = loaded.model.get_base_model()
    torch.testing.assert_close(
        model.bert.encoder.layer[0].attention.self.query.base_layer.weight,
        wanted["bert.encoder.layer.0.attention.self.query.weight"], rtol=1e-5, atol=1e-6,
    )  # fmt: skip
    head = model.classifier.modules_to_save["default"].weight
    assert not torch.allclose(head, wanted["classifier.weight"], atol=1e-3)
    assert head.std() < 0.5
    again, *_ = built(recipes("colours", model={"source": str(classifier.path)}))
    kept = again.model.get_base_model().classifier.modules_to_save["default"].weight
    torch.testing.assert_close(kept, wanted["classifier.weight"])
    assert any("head was kept" in note for note in again.notes)


def test_a_whole_model_is_taken_as_it_is(recipes, bert):
    full = peftkit.train(
        recipes("colours", name="full", method={"kind": "full"}, training={"max_steps": 2}), quiet=True
    )
    loaded, *_ = built(recipes("moods", model={"source": str(full.path)}))
    wanted = AutoModel.from_pretrained(full.path / "model").state_dict()["embeddings.word_embeddings.weight"]
    torch.testing.assert_close(loaded.model.get_base_model().bert.embeddings.word_embeddings.weight, wanted)
    assert [stage.use for stage in loaded.stages] == ["taken whole"]
    with pytest.raises(ModelError, match="holds a whole model"):
        built(recipes("colours", model=on(full.path, "continue")))


KINDS = [
    {"kind": "bitfit"}, {"kind": "bottleneck", "size": 4}, {"kind": "ia3"}, {"kind": "prompt_tuning"},
    {"kind": "ln_tuning"}, {"kind": "lora", "rank": 2, "use_dora": True, "target_modules": "all-linear"},
    {"kind": "lora", "rank": 2, "init_lora_weights": "pissa"}, {"kind": "frozen"},
]  # fmt: skip


def test_quantization_applies_to_the_merged_weights(first, foreign, recipes):
    pytest.importorskip("bitsandbytes")
    import bitsandbytes

    for model in ({"source": str(first.path)}, on(foreign, "continue")):
        recipe = recipes("instruction", model=model, quantization={"kind": "nf4"})
        layer = built(recipe)[0].model.get_base_model().model.layers[0].self_attn.q_proj
        plain = AutoModelForCausalLM.from_pretrained(folder_of(resolve(recipe.model)))
        exact = plain.model.layers[0].self_attn.q_proj.weight.detach()
        packed = layer.base_layer.weight
        rounded = bitsandbytes.functional.dequantize_4bit(packed.data, packed.quant_state)
        assert 0 < float((rounded.float() - exact).norm() / exact.norm()) < 0.15
    torch.testing.assert_close(
        layer.lora_A["default"].weight,
        load_file(foreign / WEIGHTS)["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"],
    )


@pytest.mark.parametrize("method", KINDS, ids=str)
def test_every_kind_continues_from_its_own_weights(method, recipes):
    method = {"virtual_tokens": 4, **method} if method["kind"] == "prompt_tuning" else method
    short = {"max_steps": 2}
    one = peftkit.train(recipes("colours", name="kinds", method=method, training=short), quiet=True)
    loaded, encoded, head = built(recipes("colours", method=method, model=on(one.path, "continue")))
    batch = encoded.splits["test"].batch(np.arange(4), loaded.tokenizer)
    with torch.no_grad():
        logits = TaskModule(loaded, head).eval()(batch, outputs=True)
        before = TaskModule(peftkit.load(one.path).loaded, head).eval()(batch, outputs=True)
    for name, values in logits.items():
        torch.testing.assert_close(values, before[name], rtol=1e-4, atol=1e-4)
    assert loaded.adapter


REFUSED = {
    "rank": ({"method": {"rank": 8, "alpha": 8}}, "method.rank=4"),
    "scale": ({"method": {"alpha": 32}}, "method.alpha=8"),
    "rslora": ({"method": {"use_rslora": True}}, "method.use_rslora=false"),
    "targets": ({"method": {"target_modules": "all-linear"}}, r"method.target_modules=\[query, value\]"),
    "kind": ({"method": {"kind": "ia3"}}, "method.kind=lora"),
    "native": ({"method": {"kind": "bitfit"}}, "method.kind=lora"),
    "initialization": ({"method": {"init_lora_weights": "olora"}}, "changes the base's weights"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_recipe_of_another_adapter_names_the_fields_to_set(name, classifier, recipes):
    changes, message = REFUSED[name]
    recipe = recipes("colours", model=on(classifier.path, "continue"), **changes)
    with pytest.raises(MethodError, match=message) as refused:
        built(recipe)
    assert "model.adapter_use=merge" in str(refused.value)
    with pytest.raises(MethodError, match=message):
        make_plan(recipe, parse_device("8GB"))


def test_what_cannot_be_continued_is_refused_before_anything_is_read(recipes):
    for method in (
        {"kind": "full"},
        {"kind": "adalora"},
        {"kind": "p_tuning"},
        {"kind": "lora", "init_lora_weights": "eva"},
    ):
        with pytest.raises(RecipeError, match="adapter_use"):
            recipes("colours", method=method, model=on("nowhere", "continue"))
    with pytest.raises(RecipeError, match="projection=false"):
        recipes("instruction", method={"kind": "prefix_tuning", "projection": True}, model=on("nowhere", "continue"))


def test_the_use_of_an_adapter_is_a_stated_choice(recipes):
    with pytest.raises(RecipeError, match="adapter_use=continue trains the same adapter further"):
        recipes("colours", model={"adapter": "runs/one"})
    with pytest.raises(RecipeError, match=r"needs model\.adapter"):
        recipes("colours", model={"adapter_use": "merge"})


@pytest.mark.parametrize("use", ["continue", "merge"])
def test_another_base_is_refused(use, first, foreign, recipes, tmp_path):
    other = tiny.tiny_llama(tmp_path / "other", rope_theta=500.0)
    with pytest.raises(ModelError, match="is another base"):
        built(recipes("instruction", model=on(first.path, use) | {"source": str(other)}))
    with pytest.raises(ModelError, match="was trained on"):
        built(recipes("instruction", model=on(foreign, use) | {"source": str(other)}))
    copy = shutil.copytree(foreign, tmp_path / "moved")
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/elsewhere/llama"}))
    loaded, *_ = built(recipes("instruction", model=on(copy, use)))
    assert any("checked: shapes only" in note for note in loaded.notes)


def test_other_labels_and_folders_without_a_result_are_refused(classifier, foreign, recipes, tmp_path):
    with pytest.raises(ModelError, match=r"has a head for \w+, \w+, and this task's is for happy, sad"):
        built(recipes("moods", model=on(classifier.path, "continue")))
    with pytest.raises(ModelError, match="there is no folder"):
        built(recipes("colours", model=on(tmp_path / "none", "continue")))
    with pytest.raises(ModelError, match="is not a run of peftkit"):
        resolve(recipes("colours", model={"source": f"run:{tmp_path}"}).model)
    unfinished = tmp_path / "unfinished"
    (unfinished / "checkpoints").mkdir(parents=True)
    (unfinished / "recipe.yaml").write_text("name: x\n")
    with pytest.raises(RunError, match="has not finished"):
        resolve(recipes("colours", model={"source": str(unfinished)}).model)
    pickled = shutil.copytree(foreign, tmp_path / "pickled")
    (pickled / WEIGHTS).rename(pickled / "adapter_model.bin")
    with pytest.raises(ModelError, match="expected safetensors"):
        built(recipes("instruction", model=on(pickled, "merge")))
    prompt = peftkit.train(recipes("colours", name="prompt", method={"kind": "prompt_tuning", "virtual_tokens": 4},
                                   training={"max_steps": 1}), quiet=True)  # fmt: skip
    with pytest.raises(ModelError, match="cannot stand on this run"):
        folder_of(resolve(recipes("colours", model={"source": str(prompt.path)}).model))


def test_a_changed_adapter_refuses_to_resume(foreign, recipes, tmp_path):
    copy = shutil.copytree(foreign, tmp_path / "copy")
    recipe = recipes("instruction", model=on(copy, "continue"), output_dir=str(tmp_path))
    done = peftkit.train(recipe, quiet=True, final=False)
    tensors = load_file(copy / WEIGHTS)
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, copy / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(RunError, match="these changed: adapter"):
        peftkit.train(recipe, quiet=True, resume=done.path)


def test_the_reference_is_the_adapter_that_training_starts_from(first, foreign, recipes, llama):
    recipe = recipes("preference", name="reference", model=on(first.path, "continue"), training={"max_steps": 2})
    done = peftkit.train(recipe, quiet=True)
    assert log_of(done)[0]["loss"] == pytest.approx(0.693147, abs=1e-5)  # no margin at all
    loaded, encoded, head = built(recipe)
    other, *_ = built(recipes("preference", model=on(foreign, "continue")))
    split = encoded.splits["test"]

    def key(model):
        session = type("Session", (), {"dtype": torch.float32, "device": torch.device("cpu")})
        return Reference(model, TaskModule(model, head), recipe, model.tokenizer, session)._key(split)

    assert key(loaded) != key(other)
    example = split.examples[1]
    length = example["chosen_tokens"]
    ids, labels = (torch.tensor(example[name][:length]) for name in ("input_ids", "labels"))
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), first.adapter).eval()
    with torch.no_grad():
        chances = theirs(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
    wanted = chances.gather(1, ids[1:, None])[:, 0][labels[1:] != -100].sum()
    with torch.no_grad():
        stored = TaskModule(loaded, head).eval()(split.batch(np.array([1]), loaded.tokenizer), use="reference_outputs")
    values = stored["reference"].flatten()
    count = int((labels[1:] != -100).sum())
    torch.testing.assert_close(values[:count].sum(), wanted, rtol=1e-4, atol=1e-4)


def test_stages_are_planned_and_compared(first, recipes):
    second = recipes("instruction", name="compared", model=on(first.path, "continue"))
    plan = make_plan(second, parse_device("8GB"))
    assert plan.peak.total > 0
    both = [scores.read(run.path, "test") for run in (first, peftkit.train(second, quiet=True))]
    assert scores.interval([both[1]], "loss", 0.95)[0] > 0
    assert (both[0].stored.gold == both[1].stored.gold).all()
