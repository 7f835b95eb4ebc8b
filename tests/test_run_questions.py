"""Question answering from rows to answers: learned, resumed, exported and read by plain transformers and peft."""

import json
import random

import numpy as np
import pytest
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

import peftkit
from peftkit import Recipe
from peftkit.data.pipeline import encode_rows
from peftkit.errors import DataError, Interrupted, RunError
from peftkit.evaluation import squad
from peftkit.experiments import scores
from peftkit.export import run_export
from peftkit.schema.recipe import replace
from tests import tiny

PLACES = ("world", "market", "bank", "team")
CONTEXT = "the good king was in the market of oil"
WHERE, HOW = "where was the king", "how much money"


def squad_file(path, count, draw, *, version=2):
    """Paragraphs of a sentence about a place, with two questions each: where, and (version 2) one without an answer."""
    paragraphs = []
    for number in range(count):
        place = draw.choice(PLACES)
        adjective, noun = draw.choice(["good", "bad", "new"]), draw.choice(["king", "lord", "player"])
        context = f"the {adjective} {noun} was in the {place} {draw.choice(tiny.WORDS)} {number}"
        known = [{"text": place, "answer_start": context.index(f"{place} ")}]
        questions = [{"id": f"{path.stem}-{number}", "question": f"where was the {noun}", "answers": known}]
        if version == 2:
            questions[0]["is_impossible"] = False
            questions.append({"id": f"{path.stem}-{number}-none", "question": f"how much {draw.choice(tiny.WORDS)}",
                              "answers": [], "is_impossible": True})  # fmt: skip
        paragraphs.append({"context": context, "qas": questions})
    articles = [{"title": "one", "paragraphs": paragraphs[: count // 2]},
                {"title": "two", "paragraphs": paragraphs[count // 2 :]}]  # fmt: skip
    path.write_text(json.dumps({"version": f"v{version}.0", "data": articles}, indent=1), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A folder with the three splits of a small SQuAD 2.0."""
    folder, draw = tmp_path_factory.mktemp("rows"), random.Random(0)
    for split, count in (("train", 60), ("validation", 12), ("test", 16)):
        squad_file(folder / f"{split}.json", count, draw)
    return folder


def recipe(base, rows, folder, **changes):
    values = {
        "name": "answers", "model": {"source": str(base), "dtype": "float32", "dropout": 0.0},
        "method": {"kind": "lora", "rank": 4}, "task": {"kind": "question_answering", "stride": 8},
        "data": {"source": str(rows), "text": "question", "text_pair": "context", "label": "answers", "max_length": 40,
                 "cleaning": {"duplicates": "off", "near_duplicates": "off", "leakage": "off"}},
        "training": {"epochs": 4, "batch_size": 8, "learning_rate": 0.02, "threads": 1, "save_every": 8},
        "tracking": [], "output_dir": str(folder),
    }  # fmt: skip
    return replace(Recipe.parse(values), **changes)


@pytest.fixture(scope="module")
def run(bert, rows, tmp_path_factory):
    return peftkit.train(recipe(bert, rows, tmp_path_factory.mktemp("runs")), quiet=True)


def test_it_learns_to_answer_and_not_to(run):
    test = run.metrics["test"]
    assert test["f1"] > 0.8
    assert test["has_answer_f1"] > 0.6
    assert test["no_answer_accuracy"] > 0.8
    assert run.metrics["majority"]["exact_match"] == 0.5  # half of the questions have no answer
    assert 0 < run.metrics["best_sentence"]["f1"] < test["f1"]
    lines = [json.loads(line) for line in (run.path / "predictions" / "test.jsonl").read_text().splitlines()]
    assert len(lines) == 32
    assert lines[0]["id"] == "test-0"
    again = squad.Scores.of([line["gold"] for line in lines], [line["predicted"] for line in lines], 2).metrics()
    assert again == pytest.approx({name: test[name] for name in squad.names(2)})
    stored = scores.read(run.path, "test")
    assert stored.stored.statistics(slice(None))["f1"] == pytest.approx(test["f1"])
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert "no answer" in page


def places(answers):
    return [(answer.text, answer.start, answer.end) for answer in answers]


def test_answers_point_into_the_context_and_plain_transformers_gives_the_same_logits(run):
    loaded = peftkit.load(run.path, merge=False)
    answer, none = loaded.predict([(WHERE, CONTEXT), (HOW, CONTEXT)])
    assert (answer.text, CONTEXT[answer.start : answer.end]) == ("market", "market")
    assert (none.text, none.start, none.end) == ("", None, None)
    assert none.no_answer_probability > answer.no_answer_probability
    assert loaded.predict(question=WHERE, context=CONTEXT) == [answer]
    assert loaded.predict(question=[WHERE, HOW], context=[CONTEXT] * 2) == [answer, none]
    # a threshold of 1 leaves no question without an answer, one of 0 each
    assert loaded.predict([(HOW, CONTEXT)], threshold=1.0)[0].text in CONTEXT
    assert loaded.predict([(WHERE, CONTEXT)], threshold=0.0)[0].text == ""
    encoded = loaded.tokenizer(WHERE, CONTEXT, return_tensors="pt", return_offsets_mapping=True)
    offsets, sequences = encoded.pop("offset_mapping")[0].tolist(), encoded.sequence_ids(0)
    with torch.no_grad():
        outputs = loaded.model(**encoded)
    start, end = outputs.start_logits[0], outputs.end_logits[0]
    context = [number for number, part in enumerate(sequences) if part == 1]
    first, last = max(
        ((one, other) for one in context for other in context if one <= other < one + 30),
        key=lambda span: float(start[span[0]] + end[span[1]]),
    )
    assert (answer.start, answer.end) == (offsets[first][0], offsets[last][1])
    allowed = torch.tensor([part == 1 or number == 0 for number, part in enumerate(sequences)])
    chances = [side.masked_fill(~allowed, -torch.inf).softmax(-1) for side in (start, end)]
    assert answer.score == pytest.approx(float(chances[0][first] * chances[1][last]), rel=1e-4)
    difference = float(start[0] + end[0] - start[first] - end[last])
    assert answer.no_answer_probability == pytest.approx(1 / (1 + np.exp(-difference)), rel=1e-4)


def test_what_is_no_question_with_a_context_is_one_message(run):
    loaded = peftkit.load(run.path)
    for texts in (WHERE, [(WHERE, " ")], [("", CONTEXT)]):
        with pytest.raises(DataError, match=r"expected \(question, context\) pairs"):
            loaded.predict(texts)
    with pytest.raises(DataError, match="expected question and context, found question"):
        loaded.predict(question=WHERE)
    with pytest.raises(DataError, match="expected question and context, found nothing"):
        run.predict()
    with pytest.raises(DataError, match="found treshold besides the texts"):
        loaded.predict([(WHERE, CONTEXT)], treshold=0.5)
    with pytest.raises(DataError, match="found 1 of question, 2 of context"):
        loaded.predict(question=WHERE, context=[CONTEXT] * 2)
    with pytest.raises(RunError, match="scores words, not texts"):
        loaded.logits([(WHERE, CONTEXT)])
    assert loaded.predict([]) == []


@pytest.mark.parametrize("form", ["merged", pytest.param("onnx", marks=pytest.mark.slow)])
def test_exports_give_the_same_answers(run, tmp_path, form):
    if form == "onnx":
        pytest.importorskip("onnxscript", reason="the onnx extra is not installed")
    run_export(run.path, tmp_path / form, **({"merge": True} if form == "merged" else {"to_format": "onnx"}))
    again, before = peftkit.load(tmp_path / form), peftkit.load(run.path, merge=False)
    pairs = [(WHERE, CONTEXT), (HOW, CONTEXT)]
    ours, theirs = before.predict(pairs), again.predict(pairs)
    assert places(ours) == places(theirs)
    assert [answer.score for answer in ours] == pytest.approx([answer.score for answer in theirs], abs=1e-4)
    if form == "merged":
        plain = AutoModelForQuestionAnswering.from_pretrained(tmp_path / form).eval()
        encoded = AutoTokenizer.from_pretrained(tmp_path / form)(WHERE, CONTEXT, return_tensors="pt")
        with torch.no_grad():
            logits, ours = plain(**encoded).start_logits, before.model(**encoded).start_logits
        torch.testing.assert_close(logits, ours, atol=1e-4, rtol=1e-4)


def test_the_threshold_is_chosen_on_validation_rows_and_stored(run, bert, rows, tmp_path):
    manifest = json.loads((run.path / "adapter" / "peftkit.json").read_text(encoding="utf-8"))
    threshold = manifest["tuned"]["no_answer_threshold"]
    loaded = peftkit.load(run.path)
    assert loaded.head.no_answer_threshold == threshold
    from peftkit.inference.evaluate import evaluate

    again = evaluate(run.path, split="validation", merge=False)
    assert again == pytest.approx(run.metrics["validation"], abs=1e-5)
    silent = recipe(bert, rows, tmp_path, task={"no_answer_threshold": -100.0}, training={"epochs": 1})
    answers = peftkit.train(silent, quiet=True)
    assert answers.metrics["test"]["no_answer_accuracy"] == 1.0
    assert answers.metrics["test"]["has_answer_f1"] == 0.0
    assert json.loads((answers.path / "adapter" / "peftkit.json").read_text(encoding="utf-8"))["tuned"] == {}


def test_the_length_of_an_answer_is_limited(run):
    from dataclasses import replace as with_fields

    loaded = peftkit.load(run.path)
    rows = [loaded.recipe.task.input_row((WHERE, CONTEXT))]
    batch = encode_rows(rows, loaded.tokenizer, loaded.recipe, loaded.info).batch(np.array([0]), loaded.tokenizer)

    class Spread(torch.nn.Module):
        """Wants the whole context as the answer."""

        def forward(self, input_ids, attention_mask):
            inside = (batch["starts"] >= 0).nonzero()[:, 1]
            logits = torch.zeros(*input_ids.shape, 2)
            logits[0, inside[0], 0] = logits[0, inside[-1], 1] = 9.0
            logits[0, inside[0], 1] = 1.0
            return type("Outputs", (), {"logits": logits})

    for most, text in ((30, CONTEXT), (1, "the")):
        head = with_fields(loaded.head, max_answer_length=most)
        outputs = {name: value.numpy() for name, value in head.outputs(Spread(), batch, "own").items()}
        assert head.answers(outputs, rows, None, threshold=1.0)[0].text == text
    short = replace(loaded.recipe, task={"max_answer_length": 3})
    assert peftkit.schema.head.head_of(loaded.info, short.task).max_answer_length == 3


def test_a_long_context_is_read_in_windows_and_joined(run):
    context = "the new lord was in the star of oil and the blue night " * 6 + CONTEXT
    loaded = peftkit.load(run.path)
    split = encode_rows([loaded.recipe.task.input_row((WHERE, context))], loaded.tokenizer, loaded.recipe, loaded.info)
    assert len(split.lengths) > 3
    assert max(split.lengths) <= 40
    covered = {start for starts in split.examples["starts"] for start in starts if start >= 0}
    assert covered >= {place + 1 for place in range(len(context)) if context[place] == " "}
    (answer,) = loaded.predict([(WHERE, context)], threshold=1.0)
    assert context[answer.start : answer.end] == answer.text != ""


def test_an_interrupted_run_ends_with_the_same_bytes(run, bert, rows, tmp_path):
    again = recipe(bert, rows, tmp_path)
    with pytest.raises(Interrupted):
        peftkit.train(replace(again, training={"max_time": 1e-6}), quiet=True)
    resumed = peftkit.train(again, resume=True, quiet=True)
    for name in ("adapter/adapter_model.safetensors", "adapter/peftkit.json"):
        assert (resumed.path / name).read_bytes() == (run.path / name).read_bytes()
    assert resumed.metrics["test"] == run.metrics["test"]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "method",
    ["prefix_tuning"]
    + [pytest.param(name, marks=SLOW) for name in ("bottleneck", "full", "frozen", "top_k", "prompt_tuning")],
)
def test_other_methods_train_and_export_with_proof(method, bert, rows, tmp_path):
    fields = {"kind": method, **({"k": 1} if method == "top_k" else {})}
    small = recipe(bert, rows, tmp_path, method=fields, training={"epochs": 1})
    finished = peftkit.train(small, quiet=True)
    (proof,) = finished.path.glob("*/proof.json")
    assert json.loads(proof.read_text(encoding="utf-8"))["passed"]
    assert len(peftkit.load(finished.path).predict([(WHERE, CONTEXT)])) == 1


@pytest.mark.parametrize("kind", ["nf4", pytest.param("int8", marks=SLOW)])
def test_a_quantized_base_is_trained_and_its_head_is_not_quantized(kind, bert, rows, tmp_path):
    pytest.importorskip("bitsandbytes")
    small = recipe(bert, rows, tmp_path, quantization={"kind": kind}, training={"epochs": 1})
    finished = peftkit.train(small, quiet=True)
    assert json.loads((finished.path / "adapter" / "proof.json").read_text(encoding="utf-8"))["passed"]
    head = peftkit.load(finished.path).model.get_submodule("base_model.model.qa_outputs.modules_to_save.default")
    assert type(head) is torch.nn.Linear


def tiny_encoder(kind, folder):
    """Encoders that ``tests.tiny`` lacks."""
    import transformers

    configs = {
        "deberta": ("DebertaV2Config", "DebertaV2Model", {"relative_attention": True, "position_biased_input": False,
                    "pos_att_type": ["p2c", "c2p"], "max_position_embeddings": 128}),
        "modernbert": ("ModernBertConfig", "ModernBertModel", {"max_position_embeddings": 128, "cls_token_id": 2,
                       "sep_token_id": 3, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
                       "global_attn_every_n_layers": 2, "local_attention": 16}),
    }  # fmt: skip
    config, model, sizes = configs[kind]
    tiny.tiny_tokenizer(folder, "distilbert")
    words = len(AutoTokenizer.from_pretrained(folder))
    common = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    getattr(transformers, model)(getattr(transformers, config)(vocab_size=words, **common, **sizes)).save_pretrained(
        folder
    )
    return folder


@pytest.mark.parametrize(
    "kind", ["deberta", *(pytest.param(kind, marks=SLOW) for kind in ("roberta", "distilbert", "modernbert"))]
)
def test_other_architectures_train_and_export_with_proof(kind, rows, tmp_path):
    known = {"roberta": tiny.tiny_roberta, "distilbert": tiny.tiny_distilbert}
    base = known[kind](tmp_path / "base") if kind in known else tiny_encoder(kind, tmp_path / "base")
    small = recipe(base, rows, tmp_path / "runs", training={"epochs": 1}, data={"max_length": 64})
    finished = peftkit.train(small, quiet=True)
    assert json.loads((finished.path / "adapter" / "proof.json").read_text(encoding="utf-8"))["passed"]
    loaded = peftkit.load(finished.path)
    pairs = [(WHERE, CONTEXT), (HOW, f"{CONTEXT} and the good king was in the market")]
    together, alone = loaded.predict(pairs), [loaded.predict([pair])[0] for pair in pairs]
    assert places(together) == places(alone)
    assert [one.score for one in together] == pytest.approx([one.score for one in alone], abs=1e-4)


@torch.no_grad()
def test_the_loss_is_that_of_plain_transformers(bert):
    """The loss summed over windows equals transformers' mean loss times their number; padding changes nothing."""
    from peftkit.heads.question_answering import QuestionAnswering
    from peftkit.schema.types import TaskInfo

    model = AutoModelForQuestionAnswering.from_pretrained(bert).eval()
    tokenizer = AutoTokenizer.from_pretrained(bert)
    encoded = tokenizer(["the king", "the lord"], ["was in the market", "was in the world"], return_tensors="pt")
    labels = torch.tensor([[7, 7], [0, 0]])
    head = QuestionAnswering(TaskInfo("question_answering", ("answer", "no answer")))
    loss = head.loss(model, {**encoded, "labels": labels}, "own")
    plain = model(**encoded, start_positions=labels[:, 0], end_positions=labels[:, 1]).loss
    assert float(loss) == pytest.approx(2 * float(plain), rel=1e-5)
    padded = tokenizer(["the king", "the lord"], ["was in the market", "was in the world"], return_tensors="pt",
                       padding="max_length", max_length=20)  # fmt: skip
    assert float(head.loss(model, {**padded, "labels": labels}, "own")) == pytest.approx(float(loss), rel=1e-4)
    skipped = head.loss(model, {**encoded, "labels": torch.tensor([[7, 7], [-100, -100]])}, "own")
    alone = {name: tensor[:1] for name, tensor in encoded.items()}
    assert float(skipped) == pytest.approx(float(head.loss(model, {**alone, "labels": labels[:1]}, "own")), rel=1e-5)
