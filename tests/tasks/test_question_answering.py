"""Questions from rows of every form to windows of tokens, and what is refused on the way."""

import csv
import json

import pytest
from transformers import AutoTokenizer

from peftkit import Recipe
from peftkit.data.pipeline import encode, prepare
from peftkit.errors import DataError, RecipeError
from peftkit.schema.recipe import replace
from peftkit.schema.types import TaskInfo
from peftkit.tasks.question_answering import QuestionAnswering
from tests import tiny

CONTEXT = "Ada was born in London, and lived in London."
INFO = TaskInfo("question_answering", ("answer", "no answer"))


def recipe(source, **changes):
    values = {
        "name": "answers", "model": {"source": "no/model"}, "task": {"kind": "question_answering", "stride": 2},
        "data": {"source": str(source), "text": "question", "text_pair": "context", "label": "answers",
                 "max_length": 24, "cleaning": {"near_duplicates": "off"}},
    }  # fmt: skip
    return replace(Recipe.parse(values), **changes)


def squad_text(questions, context=CONTEXT, **fields):
    paragraphs = [
        {"context": f"{context} {n}", "qas": [{**one, "id": one.get("id", f"q{n}")}]} for n, one in enumerate(questions)
    ]
    return json.dumps({"version": "v2.0", "data": [{"title": "Ada", "paragraphs": paragraphs}], **fields}, indent=1)


def asked(start=16, text="London", question="where was Ada born"):
    return {"question": question, "answers": [{"text": text, "answer_start": start}]}


def many(row, count=12):
    """Rows that differ in their context."""
    return [{**row, "context": f"{CONTEXT} {n}"} for n in range(count)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


QUESTION = {"question": "where was Ada born", "context": CONTEXT}


@pytest.mark.parametrize(
    "answers",
    [
        {"text": ["London"], "answer_start": [16]},
        {"text": "London", "answer_start": 16},
        [{"text": "London", "answer_start": 16}],
    ],
)
def test_rows_of_every_form_are_read_as_the_same(answers, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", many({**QUESTION, "answers": answers}))
    row = next(iter(prepare(recipe(path)).splits["train"]))
    assert (row["answers"], row["starts"]) == (["London"], [16])
    nested = tmp_path / "squad.json"
    nested.write_text(squad_text([asked() for _ in range(12)]), encoding="utf-8")
    row = next(iter(prepare(recipe(nested)).splits["train"]))
    assert (row["question"], row["answers"], row["starts"]) == ("where was Ada born", ["London"], [16])
    spelled = write_csv(tmp_path / "rows.csv", many({**QUESTION, "answers": json.dumps(answers)}))
    row = next(iter(prepare(recipe(spelled)).splits["train"]))
    assert (row["answers"], row["starts"]) == (["London"], [16])


def test_an_answers_text_alone_is_looked_up_where_it_occurs_once(tmp_path):
    path = write_csv(tmp_path / "rows.csv", many({**QUESTION, "answers": "born"}))
    assert next(iter(prepare(recipe(path)).splits["train"]))["starts"] == [8]
    path = write_csv(tmp_path / "starts.csv", many({**QUESTION, "answers": "London", "answer_start": 37}))
    assert next(iter(prepare(recipe(path)).splits["train"]))["starts"] == [37]
    path = write_csv(tmp_path / "twice.csv", many({**QUESTION, "answers": "London"}))
    with pytest.raises(DataError, match=r"line 2, column 'answers': .*2 times .* at characters 16, 37; say which"):
        prepare(recipe(path))
    path = write_csv(tmp_path / "never.csv", many({**QUESTION, "answers": "Paris"}))
    with pytest.raises(DataError, match=r"'Paris' does not occur in the context"):
        prepare(recipe(path))


@pytest.mark.parametrize("none", [[], "", None, {"text": [], "answer_start": []}])
def test_a_question_may_have_no_answer_which_is_reported(none, tmp_path):
    answered, open_ones = many({**QUESTION, "answers": "born"}), many({**QUESTION, "answers": none}, 24)[12:]
    prepared = prepare(recipe(write_jsonl(tmp_path / "rows.jsonl", answered + open_ones)))
    assert prepared.info.labels == ("answer", "no answer")
    assert any("questions have no answer" in str(step.examples) for step in prepared.steps)
    prepared = prepare(recipe(write_jsonl(tmp_path / "answered.jsonl", answered)))
    assert prepared.info.labels == ("answer",)


def test_questions_about_one_context_stay_in_one_split(tmp_path):
    rows = [
        {**QUESTION, "question": f"question {n}", "context": f"{CONTEXT} {n % 6}", "answers": "born"} for n in range(60)
    ]
    splits = prepare(recipe(write_jsonl(tmp_path / "rows.jsonl", rows))).splits
    contexts = [set(split["context"]) for split in splits.values()]
    assert len(contexts) == 3
    assert sum(map(len, contexts)) == len(set.union(*contexts))


def test_near_duplicates_ask_the_same_of_nearly_the_same_text(tmp_path):
    words = " ".join(tiny.WORDS[:60])
    rows = [{"question": f"what is {n}", "context": f"{words} alike", "answers": "alike"} for n in range(12)]
    rows += [{"question": "what is it", "context": f"{' '.join(tiny.WORDS[n : n + 30])} {n}x", "answers": f"{n}x"}
             for n in range(12)]  # fmt: skip
    rows += [{"question": "what is 1", "context": f"{words} unlike", "answers": "unlike"}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    near = recipe(path, data={"cleaning": {"near_duplicates": "report"}, "validation_size": 1, "test_size": 1})
    steps = [step for step in prepare(near).steps if step.name == "near_duplicates"]
    assert [step.rows for step in steps] == [1]


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (asked(17), r"line 18, column 'data\[0\].paragraphs\[0\].qas\[0\].answers': .* not at character 17 .*'ondon,' "
                    r"stands; it occurs at 16, 37"),
        (asked(-3), "outside of its 46 characters"),
        (asked(99), "outside of its 46 characters"),
        (asked("x"), "expected the number of the answer's first character, found 'x'"),
        (asked(text=""), "expected an answer's text, found ''"),
        (asked(question=" "), r"paragraphs\[0\].qas\[0\].question': expected text, found an empty text"),
        ({"question": 5, "answers": []}, "expected text, found 5"),
        ({**asked(), "is_impossible": True}, "is_impossible is true, and there is an answer, 'London'"),
        ({"question": "q", "answers": [], "is_impossible": False}, "is_impossible is false, and there is no answer"),
        ({"question": "q", "answers": {"text": ["a", "b"], "answer_start": [1]}}, "2 texts and 1 values of"),
        ({"question": "q", "answers": 7}, "expected an answer's text, or"),
    ],
)  # fmt: skip
def test_a_bad_question_is_named_by_its_place_in_the_file(question, message, tmp_path):
    path = tmp_path / "squad.json"
    path.write_text(squad_text([question, *[asked() for _ in range(12)]]), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        prepare(recipe(path))


def test_an_id_that_occurs_twice_is_refused(tmp_path):
    path = tmp_path / "squad.json"
    path.write_text(squad_text([{**asked(), "id": "a"}, asked(), {**asked(), "id": "a"}]), encoding="utf-8")
    place = (
        r"column 'data\[0\].paragraphs\[2\].qas\[0\].id': the id 'a' is also that of data\[0\].paragraphs\[0\].qas\[0\]"
    )
    with pytest.raises(DataError, match=place):
        prepare(recipe(path))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"data": [{"paragraphs": [{"context": "a"}]}]}, r"'data\[0\].paragraphs\[0\]': .* list under 'qas'"),
        ({"data": [{"paragraphs": [{"context": "a", "qas": [3]}]}]}, r"qas\[0\]': expected an object with a question"),
        ({"data": [{"paragraphs": [{"qas": [asked()]}]}]}, r"context': expected text, found null"),
    ],
)
def test_a_file_that_is_only_nearly_squads_is_one_message(data, message, tmp_path):
    path = tmp_path / "squad.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        prepare(recipe(path))


def test_what_does_not_fit_the_recipe_is_one_message(tmp_path):
    rows = many({**QUESTION, "answers": "born"})
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    for changes, error, message in (
        ({"data": {"text_pair": None}}, RecipeError, "data.text_pair=context"),
        ({"data": {"text_pair": "contex"}}, DataError, "did you mean 'context'"),
        ({"data": {"label": ["answers", "question"]}}, RecipeError, "one column of answers"),
        ({"data": {"augmentation": {}}}, RecipeError, "would move answers"),
    ):
        with pytest.raises(error, match=message):
            prepare(recipe(path, **changes))
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "validation.jsonl", many({**QUESTION, "answers": []}))
    path.unlink()
    with pytest.raises(DataError, match="the validation split has questions without an answer, and training has none"):
        prepare(recipe(tmp_path))


# -- tokens ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["wordpiece", "distilbert", "roberta", "chatml"])
def tokenizer(request, tmp_path_factory):
    return AutoTokenizer.from_pretrained(tiny.tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), request.param))


LENGTH = 48


def encoded(tokenizer, rows, length=LENGTH, **fields):
    task = QuestionAnswering(**{"kind": "question_answering", "stride": 12, **fields})
    columns = {name: [row.get(name) for row in rows] for name in rows[0]}
    return task.encode(columns, tokenizer, recipe("x", data={"max_length": length}).data, INFO)


LONG = " ".join(["the good king was in the market", "of red stock", "and the bank of the lord"] * 3)


def row(text, answer):
    starts = [text.index(answer)] if answer else []
    return {"question": " who was it", "context": text, "answers": [answer] if answer else [], "starts": starts}


def test_one_window_is_what_the_tokenizer_makes_of_the_pair(tokenizer):
    columns = encoded(tokenizer, [row("the king of the bank", "king of")], 100)
    whole = tokenizer("who was it", "the king of the bank")
    assert columns["input_ids"] == [whole["input_ids"]]
    assert columns.get("token_type_ids", [None])[0] == whole.get("token_type_ids")
    ((first, last),) = columns["labels"]
    assert "the king of the bank"[columns["starts"][0][first] : columns["ends"][0][last]] == "king of"
    for start, end, part in zip(columns["starts"][0], columns["ends"][0], whole.sequence_ids(0)):
        assert start < end or (start, end) == (-1, -1)  # bare spaces, too
        assert part == 1 or start == -1


def test_windows_share_the_stride_and_learn_where_the_answer_is(tokenizer):
    columns = encoded(tokenizer, [row(LONG, "red stock")])
    assert len(columns["row"]) > 1
    assert max(map(len, columns["input_ids"])) <= LENGTH
    for number, ((first, last), starts, ends) in enumerate(zip(columns["labels"], columns["starts"], columns["ends"])):
        if first == columns["no_answer"][number]:
            assert first == last
        else:
            assert LONG[starts[first] : ends[last]] == "red stock"
        text, offset = columns["text"][number], columns["offset"][number]
        assert LONG[offset : offset + len(text)] == text
    assert any(first != none for (first, _), none in zip(columns["labels"], columns["no_answer"]))
    assert any(first == none for (first, _), none in zip(columns["labels"], columns["no_answer"]))
    ids = tokenizer(LONG, add_special_tokens=False)["input_ids"]
    letter = len(tokenizer("a", add_special_tokens=False)["input_ids"])
    room = LENGTH - len(tokenizer("who was it", "a")["input_ids"]) + letter
    assert len(columns["row"]) == 1 + -(-(len(ids) - room) // (room - 12))  # each further window adds all but 12
    assert encoded(tokenizer, [row(LONG, "red stock")], stride=room // 3) == encoded(
        tokenizer, [row(LONG, "red stock")], stride=None
    )
    apart = encoded(tokenizer, [row(LONG, "red stock")], stride=0)
    assert sum(map(len, apart["input_ids"])) < sum(map(len, columns["input_ids"]))


def test_windows_without_the_answer_can_be_left_out_of_training(tokenizer):
    learned = encoded(tokenizer, [row(LONG, "red stock"), row(LONG, "")])
    skipped = encoded(tokenizer, [row(LONG, "red stock"), row(LONG, "")], unanswered_windows="skip")
    weights = {number: [w for w, r in zip(skipped["weight"], skipped["row"]) if r == number] for number in (0, 1)}
    assert set(learned["weight"]) == {1.0}
    assert set(weights[0]) == {0.0, 1.0}
    assert set(weights[1]) == {1.0}  # a question without an answer is learned as such everywhere
    assert len(skipped["row"]) == len(learned["row"])  # evaluation reads every window


def test_training_leaves_skipped_windows_out_and_evaluation_does_not(tmp_path, bert):
    context = " ".join(tiny.WORDS[:60])
    for split in ("train", "validation"):
        answers = {"text": ["science"], "answer_start": [context.index("science")]}
        rows = [{"question": f"what {n}", "context": f"{context} {split} {n}", "answers": answers} for n in range(4)]
        write_jsonl(tmp_path / f"{split}.jsonl", rows)
    tokenizer = AutoTokenizer.from_pretrained(bert)
    sizes = {}
    for choice in ("no_answer", "skip"):
        made = recipe(tmp_path, task={"unanswered_windows": choice}, data={"test_size": 0})
        splits = encode(prepare(made), tokenizer, made).splits
        sizes[choice] = len(splits["train"].lengths), len(splits["validation"].lengths)
        assert min(splits["train"].weights) == 1.0
    assert sizes["skip"][0] < sizes["no_answer"][0]
    assert sizes["skip"][1] == sizes["no_answer"][1]


def test_a_question_without_room_for_its_context_is_named(tmp_path, bert):
    rows = [{"question": "how " * (20 if n == 3 else 1), "context": f"{LONG} {n}", "answers": []} for n in range(9)]
    rows[0]["answers"] = "0"
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "validation.jsonl", [{**rows[0], "context": f"{LONG} validation 0"}])
    made = recipe(tmp_path, data={"test_size": 0})
    with pytest.raises(DataError, match=r"train.jsonl, line 4: the question leaves 1 of a .* that share 2 need"):
        encode(prepare(made), AutoTokenizer.from_pretrained(bert), made)
