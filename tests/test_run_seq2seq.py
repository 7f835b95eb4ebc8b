"""Sequence-to-sequence from rows to texts: exact, learned, resumed, evaluated, exported, planned."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import sacrebleu
import torch
import transformers
from rouge_score import rouge_scorer

import peftkit
from peftkit import Recipe
from peftkit.data.pipeline import encode, prepare
from peftkit.errors import DataError, ExportError, Interrupted, MethodError, ModelError, RecipeError, RunError
from peftkit.experiments import scores
from peftkit.export import run_export
from peftkit.inference.evaluate import evaluate
from peftkit.inference.generate_file import generate_file
from peftkit.models.loading import build
from peftkit.models.tokenizer import load_tokenizer
from peftkit.planning import inspection
from peftkit.planning.devices import parse_device
from peftkit.planning.plan import make_plan
from peftkit.planning.workload import data_workload
from peftkit.schema.head import head_of
from peftkit.schema.recipe import replace
from tests import tiny

OFF = {"duplicates": "off", "near_duplicates": "off", "leakage": "off"}
MODELS = {
    "t5": tiny.tiny_t5, "mt5": tiny.tiny_mt5, "bart": tiny.tiny_bart, "mbart": tiny.tiny_mbart,
    "pegasus": tiny.tiny_pegasus,
}  # fmt: skip
QUANTIZED = (("t5", "int8"), ("bart", "nf4"), ("bart", "int8"))
WORDS = ("red", "green", "blue", "king")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in MODELS.items()}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Sources of many lengths, whose first word is the target."""
    draw, folder = random.Random(0), tmp_path_factory.mktemp("rows")
    for split, count in (("train", 48), ("validation", 8), ("test", 8)):
        lines = []
        for _ in range(count):
            word = draw.choice(WORDS)
            source = " ".join([word, *draw.choices(tiny.WORDS, k=draw.randint(1, 6))])
            lines.append({"article": source, "summary": " ".join([word] * draw.randint(1, 2))})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def recipe(base, rows, folder, **changes):
    values = {
        "name": "first", "model": {"source": str(base), "dtype": "float32"}, "method": {"kind": "lora", "rank": 4},
        "task": {"kind": "seq2seq", "prefix": "say: ", "max_target_length": 16},
        "data": {
            "source": str(rows), "text": "article", "label": "summary", "max_length": 32, "cleaning": OFF,
        },
        "training": {
            "epochs": 4, "batch_size": 8, "learning_rate": 0.02, "threads": 1, "save_every": 3, "log_every": 1,
        },
        "evaluation": {"baselines": ["zero_shot", "lead"],
                       "generation": {"samples": 4, "test_rows": "all", "max_new_tokens": 4}},
        "tracking": [], "output_dir": str(folder),
    }  # fmt: skip
    return replace(Recipe.parse(values), **changes)


@pytest.fixture(scope="module")
def run(bases, rows, tmp_path_factory):
    return peftkit.train(recipe(bases["t5"], rows, tmp_path_factory.mktemp("runs")), quiet=True)


@pytest.fixture(scope="module")
def bart(bases, rows, tmp_path_factory):
    return peftkit.train(recipe(bases["bart"], rows, tmp_path_factory.mktemp("runs")), quiet=True)


def log_of(run):
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("trained", ["adapter", "output layer"])
@pytest.mark.parametrize("name", [*MODELS, "untied t5", "biased bart"])
def test_loss_and_gradients_are_those_of_plain_transformers(name, trained, bases, rows, tmp_path):
    if name == "untied t5":
        base = tiny.tiny_t5(tmp_path / "base", tie_word_embeddings=False)
    elif name == "biased bart":
        base = tiny.tiny_bart(tmp_path / "base")
        biased = transformers.BartForConditionalGeneration.from_pretrained(base)
        biased.final_logits_bias.normal_(generator=torch.Generator().manual_seed(0))
        biased.save_pretrained(base)
    else:
        base = bases[name]
    method = {"kind": "lora", "rank": 4} if trained == "adapter" else {"kind": "full"}
    own = recipe(base, rows, tmp_path, method=method)
    tokenizer, prepared = load_tokenizer(own.model), prepare(own)
    split = encode(prepared, tokenizer, own).splits["test"]
    loaded, head = build(own, prepared.info, tokenizer), head_of(prepared.info, own.task)
    model = loaded.model.double().eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # which start at 0, and would hide those of lora_A
            parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    batch = split.batch(np.arange(6), tokenizer)
    summed = head.loss(model, batch, loaded.pooling)
    summed.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) > 10
    model.zero_grad()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    plain = model(**inputs).loss * (batch["labels"] != -100).sum()
    plain.backward()
    assert summed.item() == pytest.approx(plain.item(), rel=1e-9)
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(gradient, model.get_parameter(parameter).grad, rtol=1e-6, atol=1e-9)
    outputs = head.outputs(model, batch, loaded.pooling)
    assert outputs["loss"].sum().item() == pytest.approx(plain.item(), rel=1e-5)
    assert outputs["weight"].tolist() == (batch["labels"] != -100).sum(1).tolist() == batch["weight"].tolist()


@pytest.mark.parametrize("name", ["t5", "bart", "mbart"])
def test_the_target_is_the_tokenizers_with_its_end_and_padding_is_not_scored(name, bases, rows, tmp_path):
    own = recipe(bases[name], rows, tmp_path)
    tokenizer, prepared = load_tokenizer(own.model), prepare(own)
    split, row = encode(prepared, tokenizer, own).splits["test"], prepared.splits["test"][0]
    batch = split.batch(np.arange(8), tokenizer)
    wanted = tokenizer(text_target=row["target"])["input_ids"]
    labels = batch["labels"][0]
    assert labels[labels != -100].tolist() == wanted
    assert wanted[-2 if name == "mbart" else -1] == tokenizer.eos_token_id
    source = tokenizer("say: " + row["text"])["input_ids"]
    assert batch["input_ids"][0][batch["attention_mask"][0].bool()].tolist() == source


def test_it_learns_and_writes_as_plain_peft_does(run, bases, rows):
    assert run.metrics["test"]["loss"] < 0.75 * run.metrics["zero_shot"]["loss"]
    assert {"rouge1", "rougeL", "chrf", "bleu"} <= {*run.metrics["generation"]}
    assert run.metrics["test"]["token_accuracy"] > run.metrics["zero_shot"]["token_accuracy"]
    from peft import PeftModelForSeq2SeqLM

    texts = [json.loads(line)["article"] for line in (rows / "test.jsonl").read_text().splitlines()]
    own = peftkit.load(run.path, merge=False).generate(texts, max_new_tokens=5)
    base = transformers.AutoModelForSeq2SeqLM.from_pretrained(bases["t5"])
    model = PeftModelForSeq2SeqLM.from_pretrained(base, run.path / "adapter").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.path / "adapter")
    for text, answer in zip(texts, own, strict=True):
        inputs = tokenizer("say: " + text, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        assert tokenizer.decode(output[0], skip_special_tokens=True) == answer
    assert json.loads((run.path / "adapter" / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    assert json.loads((run.path / "adapter" / "proof.json").read_text())["passed"]


def test_test_rows_are_written_and_scored_with_intervals(run, rows):
    lines = [json.loads(line) for line in (rows / "test.jsonl").read_text().splitlines()]
    texts = peftkit.load(run.path).generate([line["article"] for line in lines], max_new_tokens=4)
    targets = [line["summary"] for line in lines]
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    expected = {
        "rougeL": np.mean([scorer.score(*pair)["rougeL"].fmeasure for pair in zip(targets, texts)]),
        "chrf": sacrebleu.corpus_chrf(texts, [targets]).score / 100,
        "bleu": sacrebleu.corpus_bleu(texts, [targets]).score / 100,
    }
    metrics = run.metrics["test"]
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert 0 < metrics["chrf"] != run.metrics["zero_shot"]["chrf"]
    entry = json.loads((run.path / "assessment.json").read_text())["test"]["metrics"]["chrf"]
    assert entry["interval"] == "bootstrap"
    assert entry["low"] <= entry["value"] <= entry["high"]
    assert "rougeL" in (run.path / "report.html").read_text(encoding="utf-8")
    stored = [json.loads(line) for line in (run.path / "predictions" / "test.jsonl").read_text().splitlines()]
    assert [(line["generated"], line["target"]) for line in stored] == list(zip(texts, targets))
    assert evaluate(run.path)["chrf"] == pytest.approx(metrics["chrf"])


def test_the_lead_of_a_source_is_scored_on_the_same_rows(run, rows):
    lines = [json.loads(line) for line in (rows / "test.jsonl").read_text().splitlines()]
    pairs = [(line["summary"], line["article"]) for line in lines]  # sources are one sentence
    scorer = rouge_scorer.RougeScorer(["rouge1"])
    expected = np.mean([scorer.score(*pair)["rouge1"].fmeasure for pair in pairs])
    assert run.metrics["lead"]["rouge1"] == pytest.approx(expected)
    head = peftkit.load(run.path).head
    sources = {"text": ["One. Two. Three. Four.", "", "Alone"]}
    texts, note = head.lead_texts({"target": ["A. B.", "C. D.", "E."]}, sources)
    assert (texts, note) == (["One. Two.", "", "Alone"], "the first 2 sentences")


def test_fewer_test_rows_are_a_part_of_all_and_other_runs_are_compared_on_them(run, bases, rows, tmp_path):
    fewer = recipe(bases["t5"], rows, tmp_path, training={"max_steps": 1}, evaluation={"generation": {"test_rows": 3}})
    other = peftkit.train(fewer, quiet=True)
    stored = [json.loads(line) for line in (other.path / "predictions" / "test.jsonl").read_text().splitlines()]
    assert sum("generated" in line for line in stored) == 3
    with_texts, without = (scores.read(one.path, "test") for one in (run, other))
    assert with_texts.rows == without.rows
    whole = peftkit.train(replace(fewer, evaluation={"generation": {"test_rows": "all"}}), quiet=True)
    result = scores.compare([with_texts], [scores.read(whole.path, "test")], "chrf", 0.95)
    assert result["difference"] == pytest.approx(run.metrics["test"]["chrf"] - whole.metrics["test"]["chrf"])


def test_bart_writes_as_plain_transformers_does(bart, rows, tmp_path):
    run_export(bart.path, tmp_path / "merged", merge=True)
    assert json.loads((tmp_path / "merged" / "proof.json").read_text())["passed"]
    texts = [json.loads(line)["article"] for line in (rows / "test.jsonl").read_text().splitlines()]
    own = peftkit.load(bart.path).generate(texts, max_new_tokens=5)
    assert own == peftkit.load(tmp_path / "merged").generate(texts, max_new_tokens=5, batch_size=1)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    for text, answer in zip(texts, own, strict=True):
        output = model.generate(**tokenizer("say: " + text, return_tensors="pt"), max_new_tokens=5, do_sample=False)
        assert tokenizer.decode(output[0], skip_special_tokens=True) == answer
    assert list(peftkit.load(bart.path).stream(texts[0], max_new_tokens=5)) != []


@pytest.mark.parametrize("name", ["mbart", pytest.param("pegasus", marks=pytest.mark.slow)])
def test_mbart_and_pegasus_train_export_and_write_as_plain_transformers_does(name, bases, rows, tmp_path):
    own = recipe(bases[name], rows, tmp_path / "runs", training={"max_steps": 3}, export={"prove": False},
                 evaluation={"generation": {"samples": 0, "test_rows": None}})  # fmt: skip
    done = peftkit.train(own, quiet=True)
    assert done.metrics["test"]["loss"] < done.metrics["zero_shot"]["loss"]
    run_export(done.path, tmp_path / "merged", merge=True)
    assert json.loads((tmp_path / "merged" / "proof.json").read_text())["passed"]
    texts = [json.loads(line)["article"] for line in (rows / "test.jsonl").read_text().splitlines()]
    written = peftkit.load(done.path).generate(texts, max_new_tokens=5)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    for text, answer in zip(texts, written, strict=True):
        output = model.generate(**tokenizer("say: " + text, return_tensors="pt"), max_new_tokens=5, do_sample=False)
        assert tokenizer.decode(output[0], skip_special_tokens=True) == answer
    assert evaluate(done.path)["loss"] == pytest.approx(done.metrics["test"]["loss"], rel=1e-3)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("t5", "nf4"), *(pytest.param(*one, marks=pytest.mark.slow) for one in QUANTIZED)],
)
def test_quantized_bases_train_reload_and_export(name, kind, bases, rows, tmp_path):
    own = recipe(bases[name], rows, tmp_path / "runs", quantization={"kind": kind}, training={"max_steps": 6},
                 evaluation={"generation": {"samples": 0, "test_rows": None}})  # fmt: skip
    done = peftkit.train(own, quiet=True)
    assert done.metrics["test"]["loss"] < done.metrics["zero_shot"]["loss"]
    assert json.loads((done.path / "adapter" / "proof.json").read_text())["passed"]
    again = peftkit.load(done.path)
    kinds = {type(module).__name__ for module in again.model.modules()}
    assert {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[kind] in kinds
    assert evaluate(done.path)["loss"] == pytest.approx(done.metrics["test"]["loss"], rel=1e-2)
    run_export(done.path, tmp_path / "merged", merge=True)
    assert json.loads((tmp_path / "merged" / "proof.json").read_text())["passed"]


def test_an_interrupted_run_ends_with_the_same_bytes(run, bases, rows, tmp_path):
    again = recipe(bases["t5"], rows, tmp_path)
    stops = iter([True])

    def stop_at_the_first(step, metrics):
        if next(stops, False):
            raise Interrupted("stopped", 15)

    with pytest.raises(Interrupted):
        peftkit.train(again, quiet=True, on_validation=stop_at_the_first)
    resumed = peftkit.train(again, resume=True, quiet=True)
    name = "adapter/adapter_model.safetensors"
    assert (resumed.path / name).read_bytes() == (run.path / name).read_bytes()
    assert resumed.metrics["test"] == run.metrics["test"]


def test_micro_batches_change_nothing(bases, rows, tmp_path):
    logs = []
    for micro in (8, 3):
        small = recipe(bases["bart"], rows, tmp_path / str(micro), training={"max_steps": 2, "micro_batch": micro},
                       model={"dropout": 0.0}, method={"dropout": 0.0})  # fmt: skip
        logs.append([line for line in log_of(peftkit.train(small, quiet=True, final=False)) if "learning_rate" in line])
    for one, other in zip(*logs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_evaluate_and_generate_on_files(run, rows, tmp_path):
    scored = evaluate(run.path)
    assert scored == pytest.approx(run.metrics["test"], rel=1e-3, abs=1e-4)
    assert evaluate(run.path, file=rows / "test.jsonl")["loss"] == pytest.approx(scored["loss"], abs=1e-6)
    (tmp_path / "prompts.txt").write_text("red world\n", encoding="utf-8")
    generate_file(run.path, file=tmp_path / "prompts.txt", out=tmp_path / "out.jsonl", options={"max_new_tokens": 3})
    (line,) = (tmp_path / "out.jsonl").read_text().splitlines()
    assert json.loads(line)["generated"] == peftkit.load(run.path).generate("red world", max_new_tokens=3)[0]


@pytest.mark.parametrize(
    "method", [pytest.param("full", marks=pytest.mark.slow), "ia3", pytest.param("ln_tuning", marks=pytest.mark.slow)]
)
def test_other_methods(method, bases, rows, tmp_path):
    small = recipe(bases["t5"], rows, tmp_path, method={"kind": method}, training={"max_steps": 2},
                   evaluation={"generation": {"samples": 0}})  # fmt: skip
    done = peftkit.train(small, quiet=True)
    assert evaluate(done.path)["loss"] == pytest.approx(done.metrics["test"]["loss"], rel=1e-3)


def test_every_field_counts(bases, rows, tmp_path):
    own = recipe(bases["t5"], rows, tmp_path)
    tokenizer = load_tokenizer(own.model)

    def ids(**task):
        changed = replace(own, task=task)
        return encode(prepare(changed), tokenizer, changed).splits["train"]

    assert sum(ids().lengths) - sum(ids(prefix="").lengths) > 48
    with pytest.raises(DataError, match=r"task\.max_target_length is 2") as error:
        ids(max_target_length=2)
    assert error.value.file.endswith("train.jsonl")
    assert error.value.line >= 1
    assert error.value.column == "summary"
    longest = max(ids().weights)
    dropped = ids(max_target_length=int(longest) - 1, too_long="drop")
    assert 0 < len(dropped.lengths) < 48
    assert max(dropped.weights) < longest


def test_what_is_wrong_is_one_message(run, bases, rows, tmp_path):
    own = recipe(bases["t5"], rows, tmp_path)
    with pytest.raises(DataError, match="summary") as error:
        prepare(replace(own, data={"label": "summry"}))
    assert error.value.column == "summry"
    (tmp_path / "empty.jsonl").write_text('{"article": "a", "summary": "b"}\n{"article": "c", "summary": " "}\n')
    with pytest.raises(DataError, match=r"empty.jsonl, line 2, column 'summary': the target is empty"):
        prepare(replace(own, data={"source": str(tmp_path / "empty.jsonl")}))
    for kind, message in (("prompt_tuning", "a source and a target"), ("bottleneck", "an encoder and a decoder")):
        with pytest.raises(RecipeError, match=f"task.kind=seq2seq has {message}"):
            replace(own, method={"kind": kind})
    with pytest.raises(ModelError, match="no encoder–decoders"):
        peftkit.train(replace(own, model={"source": str(tiny.tiny_gpt2(tmp_path / "gpt2"))}), quiet=True)
    with pytest.raises(ModelError, match="holds no conversation"):
        peftkit.load(run.path).generate([[{"role": "user", "content": "red"}]])
    for kind, message in (
        ("onnx", "ONNX is not written for task.kind=seq2seq"),
        ("gguf", "GGUF is written for decoders"),
    ):
        with pytest.raises((RunError, ExportError, MethodError, ModelError), match=message):
            run_export(run.path, tmp_path / kind, to_format=kind)


def test_inspect_and_plan_know_source_and_target(run, bases, rows, tmp_path):
    own = recipe(bases["t5"], rows, tmp_path)
    shown = inspection.inspect(own, examples=1).splits[0].shown
    assert [one.part for one in shown] == ["source", "target"]
    assert [any(token.supervised for token in one.tokens) for one in shown] == [False, True]
    encoded = encode(prepare(own), load_tokenizer(own.model), own)
    workload = data_workload(own, encoded, "cpu")
    assert sum(shape.scored for shape in workload.train) == encoded.splits["train"].weights.sum()
    plan = make_plan(own, parse_device("8GB"))
    assert plan.peak.total > 0
    assert plan.flops_per_token == pytest.approx(run.metrics["training"]["flops_per_token"], rel=0.3)
