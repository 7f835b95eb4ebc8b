"""Labels read right or refused with their place; losses equal to torch's own modules; encoding exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from pydantic import ValidationError
from transformers import AutoTokenizer

from peftkit.errors import DataError, RecipeError
from peftkit.schema.head import head_of
from peftkit.schema.recipe import DataConfig, EvaluationConfig
from peftkit.schema.types import TaskInfo
from peftkit.tasks.classification import Classification
from tests.tiny import tiny_bert, tiny_roberta, tiny_tokenizer

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
TEXTS = ["good", "bad", "fine", "worst"]


def split(file="train.csv", features=None, **columns):
    rows = len(next(iter(columns.values())))
    made = Dataset.from_dict(columns, features=Features(features) if features else None)
    return made.add_column("_file", [file] * rows).add_column("_line", list(range(2, rows + 2)))


def describe(train, task=None, data=None, **others):
    config = DataConfig(source="x", **(data or {}))
    return (task or Classification()).describe({"train": train, **others}, config)


def labelled(labels, **columns):
    return split(text=TEXTS[: len(labels)], label=labels, **columns)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([10, 2, 1, 2], ("1", "2", "10")),
        (["10", "2", "1", "2"], ("1", "2", "10")),
        ([1.0, 0.0, 1.0, 1.0], ("0", "1")),
        ([True, False, True, True], ("False", "True")),
        (["b", "a", " b", "a"], ("a", "b")),
    ],
)
def test_names_are_found_and_sorted(labels, names):
    info = describe(labelled(labels))
    assert (info.problem_type, info.labels) == (SINGLE, names)


def test_a_class_label_keeps_its_names_and_order():
    features = {"text": Value("string"), "label": ClassLabel(names=["5", "1", "0"])}
    rows = split(text=TEXTS, label=[0, 1, 2, 0], features=features)
    info = describe(rows)
    data = DataConfig(source="x")
    assert info.labels == ("5", "1", "0")
    # the source's 0 is the id of "5", although a class is called "0"
    assert [Classification().canonical(row, data, info)["label"] for row in rows] == [0, 1, 2, 0]


def test_whole_numbers_are_ids_into_the_names_of_the_recipe():
    info = describe(labelled([3, 0, 1, 2]), data={"labels": ("World", "Sports", "Business", "Sci/Tech")})
    data = DataConfig(source="x")
    assert [Classification().canonical({"text": "a", "label": n}, data, info)["label"] for n in (3, "1", "Sports")] == [
        3,
        1,
        1,
    ]


@pytest.mark.parametrize("labels", [[0.5, 1.0, 2.0, 2.0], ["0.5", "1", "2", "2"]])
def test_fractions_make_a_regression(labels):
    assert describe(labelled(labels)) == TaskInfo(REGRESSION, ("label",))


def test_whole_numbers_are_a_regression_when_the_recipe_says_so():
    info = describe(labelled([1, 5, 3, 2]), Classification(problem_type=REGRESSION))
    assert info.problem_type == REGRESSION
    assert Classification().canonical({"text": "a", "label": 5}, DataConfig(source="x"), info)["label"] == 5.0


def test_a_list_of_names_makes_several_labels():
    info = describe(labelled([["b"], ["a", "b"], [], ["a"]]))
    row = {"text": "a", "label": ["b"]}
    assert (info.problem_type, info.labels) == (MULTI, ("a", "b"))
    assert Classification().canonical(row, DataConfig(source="x"), info)["label"] == [0.0, 1.0]


def test_a_list_of_class_labels_keeps_the_names():
    features = {"text": Value("string"), "label": Sequence(ClassLabel(names=["joy", "fear"]))}
    rows = split(text=TEXTS, label=[[0], [1], [0, 1], []], features=features)
    info = describe(rows)
    made = [Classification().canonical(row, DataConfig(source="x"), info)["label"] for row in rows]
    assert (info.labels, made) == (("joy", "fear"), [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])


def test_several_columns_of_0_and_1_make_several_labels():
    rows = split(text=TEXTS, joy=[0, 1, 1, 0], fear=[1, 0, 1, 0])
    info = describe(rows, data={"label": ("joy", "fear")})
    made = Classification().canonical(rows[2], DataConfig(source="x", label=("joy", "fear")), info)
    assert (info.labels, made["label"]) == (("joy", "fear"), [1.0, 1.0])


@pytest.mark.parametrize(
    ("labels", "names", "said"),
    [
        ([0, 1, None, 1], None, "train.csv, line 4, column 'label': no label in 1 of 4"),
        (["a", "b", " ", "a"], None, "train.csv, line 4, column 'label': no label"),
        ([["a"], ["b"], [None], []], None, "train.csv, line 4.*null"),
        (["a", "a", "a", "a"], None, "all 4 rows of the train split have the label 'a'"),
        (["a", "b", "1", "b"], None, "train.csv, line 4.*mixed kinds.*'1'"),
        (
            ["a", "b", "bb", "b"],
            ("a", "b"),
            "train.csv, line 4.*'bb' of the train split is not among the 2 labels.*did you mean 'b'",
        ),
        ([0, 1, 7, 1], ("a", "b"), "line 4.*label 7.*ids 0 to 1"),
    ],
)
def test_bad_labels_are_refused_with_their_place(labels, names, said):
    with pytest.raises(DataError, match=said):
        describe(labelled(labels), data={"labels": names})


@pytest.mark.parametrize(
    ("columns", "data", "said"),
    [
        (
            {"text": TEXTS, "labels": [0, 1, 0, 1]},
            {},
            r"column 'label': no such column: .*'labels'\? The columns are: text, labels; set data.label",
        ),
        ({"sentence": TEXTS, "label": [0, 1, 0, 1]}, {}, "column 'text': no such column: .* sentence"),
        ({"text": [1, 2, 3, 4], "label": [0, 1, 0, 1]}, {}, "column of text, found numbers"),
        (
            {"text": TEXTS, "p": [0, 1, 2, 0], "q": [0, 0, 1, 1]},
            {"label": ("p", "q")},
            "line 4, column 'p'.*0 or 1, found 2",
        ),
        ({"text": TEXTS, "p": [0, 1, 1, 0]}, {"label": ("p", "q")}, "column 'q': no such column"),
    ],
)
def test_bad_columns_are_refused(columns, data, said):
    with pytest.raises(DataError, match=said):
        describe(split(**columns), data=data)


def test_a_test_label_unseen_in_training_is_refused():
    test = split("test.csv", text=TEXTS, label=["a", "b", "A", "b"])
    with pytest.raises(DataError, match=r"test.csv, line 4.*'A' of the test split does not occur in training"):
        describe(labelled(["a", "b", "a", "b"]), test=test)


def test_a_known_class_without_training_rows_needs_the_names_listed():
    features = {"text": Value("string"), "label": ClassLabel(names=["a", "b", "c"])}
    train = split(text=TEXTS, label=[0, 1, 0, 1], features=features)
    test = split("test.csv", text=TEXTS, label=[0, 1, 2, 1], features=features)
    with pytest.raises(DataError, match=r"test.csv, line 4.*'c' .* no row in training"):
        describe(train, test=test)
    assert describe(train, test=test, data={"labels": ("a", "b", "c")}).labels == ("a", "b", "c")


def test_the_hidden_labels_of_a_hub_test_split_are_refused():
    features = {"text": Value("string"), "label": ClassLabel(names=["a", "b"])}
    train = split(text=TEXTS, label=[0, 1, 0, 1], features=features)
    test = split("test.parquet", text=TEXTS, label=[-1, -1, -1, -1], features=features)
    with pytest.raises(DataError, match=r"no label in 4 of 4 rows of the test split"):
        describe(train, test=test)


def test_differing_kinds_between_splits_are_refused():
    with pytest.raises(DataError, match="numbers in the test split and words in the train split"):
        describe(labelled(["a", "b", "a", "b"]), test=split("test.csv", text=TEXTS, label=[0, 1, 0, 1]))


def test_free_text_for_a_label_is_refused():
    with pytest.raises(DataError, match="60 different labels in 60 rows"):
        describe(split(text=["a"] * 60, label=[f"t{n}" for n in range(60)]))


def test_a_filtered_split_is_read_through_its_rows():
    rows = labelled(["a", None, "b", "a"]).filter(lambda row: row["label"] is not None)
    assert describe(rows).labels == ("a", "b")


@pytest.mark.parametrize(
    ("task", "labels", "field"),
    [
        ({"class_weights": "balanced"}, [0.5, 1.5, 2.5, 3.5], "class_weights"),
        ({"label_smoothing": 0.1}, [0.5, 1.5, 2.5, 3.5], "label_smoothing"),
        ({"label_smoothing": 0.1}, [["a"], ["b"], [], ["a"]], "label_smoothing"),
        ({"class_weights": {"spam": 2.0}}, ["spma", "ham", "ham", "ham"], "spam"),
    ],
)
def test_options_that_do_not_fit_are_refused(task, labels, field):
    with pytest.raises(RecipeError, match=field):
        describe(labelled(labels), Classification(**task))


def test_class_weights_must_be_positive():
    with pytest.raises(ValidationError):
        Classification(class_weights={"a": 0.0})


def test_balanced_weights_are_those_of_scikit_learn():
    from sklearn.utils.class_weight import compute_class_weight

    labels = ["a"] * 1 + ["b"] * 2 + ["c"] * 5
    info = describe(split(text=["x"] * 8, label=labels), Classification(class_weights="balanced"))
    expected = compute_class_weight("balanced", classes=np.array(["a", "b", "c"]), y=labels)
    np.testing.assert_allclose(info.class_weights, expected)


def test_named_weights_leave_the_others_at_one():
    info = describe(labelled(["a", "b", "a", "b"]), Classification(class_weights={"b": 3.0}))
    assert info.class_weights == (1.0, 3.0)


def test_balanced_weights_of_several_labels_are_negatives_over_positives():
    rows = split(text=TEXTS, p=[0, 1, 0, 0], q=[1, 1, 0, 0])
    info = describe(rows, Classification(class_weights="balanced"), data={"label": ("p", "q")})
    assert info.class_weights == (3.0, 1.0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, (0.5, 2.0, 1.0, 4.0)])
def test_cross_entropy_is_torchs_however_the_batch_is_cut(smoothing, weights):
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(13, 4, generator=generator), torch.randint(0, 4, (13,), generator=generator)
    head = head_of(TaskInfo(SINGLE, tuple("abcd"), weights), Classification(label_smoothing=smoothing))
    weight = torch.ones(4) if weights is None else torch.tensor(weights)
    total = sum(head.losses(logits[part], labels[part]).sum() for part in (slice(0, 5), slice(5, 6), slice(6, 13)))
    expected = torch.nn.CrossEntropyLoss(weight=weight, label_smoothing=smoothing)(logits, labels)
    torch.testing.assert_close(total / weight[labels].sum(), expected)


@pytest.mark.parametrize("weights", [None, (0.5, 2.0, 3.0)])
def test_several_labels_cost_torchs_binary_cross_entropy(weights):
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(7, 3, generator=generator), torch.randint(0, 2, (7, 3), generator=generator).float()
    each = head_of(TaskInfo(MULTI, tuple("abc"), weights)).losses(logits, labels)
    expected = torch.nn.BCEWithLogitsLoss(pos_weight=None if weights is None else torch.tensor(weights))(logits, labels)
    torch.testing.assert_close(each.sum() / 7, expected)


def test_a_number_costs_its_squared_error():
    logits, labels = torch.randn(7, 1, generator=torch.Generator().manual_seed(0)), torch.arange(7.0)
    each = head_of(TaskInfo(REGRESSION, ("score",))).losses(logits, labels)
    torch.testing.assert_close(each.mean(), torch.nn.MSELoss()(logits[:, 0], labels))


def test_loss_and_outputs_agree_with_transformers_own(tmp_path):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert(tmp_path / "bert"), num_labels=3).eval()
    ids = torch.randint(5, 90, (4, 6), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 2, 1, 2])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "weight": torch.ones(4)}
    head = head_of(TaskInfo(SINGLE, ("a", "b", "c")))
    expected = model(input_ids=ids, attention_mask=batch["attention_mask"], labels=labels)
    outputs = head.outputs(model, batch, "own")
    torch.testing.assert_close(head.loss(model, batch, "own") / 4, expected.loss)
    torch.testing.assert_close(outputs["logits"], expected.logits)
    torch.testing.assert_close(outputs["loss"].mean(), expected.loss)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path_factory.mktemp("tok") / "wordpiece"))


INFO = TaskInfo(SINGLE, ("a", "b"), (1.0, 3.0))


@pytest.mark.parametrize("pairs", [None, ["the king", "the king and the lord of the day and night"]])
def test_encoding_is_the_tokenizers_truncation_and_counts_what_it_cuts(tokenizer, pairs):
    texts = ["the game was great and the team is happy", "good"]
    rows = {"text": texts, "label": [1, 0]} | ({"text_pair": pairs} if pairs else {})
    data = DataConfig(source="x", max_length=9, text_pair="other" if pairs else None)
    made = Classification().encode(rows, tokenizer, data, INFO)
    cut = tokenizer(texts, pairs, truncation=True, max_length=9)
    whole = tokenizer(texts, pairs)
    assert made["input_ids"] == cut["input_ids"]
    assert made["truncated"] == [len(a) - len(b) for a, b in zip(whole["input_ids"], cut["input_ids"])]
    assert sum(made["truncated"]) > 0
    assert ("token_type_ids" in made) == bool(pairs)
    assert not pairs or made["token_type_ids"] == cut["token_type_ids"]
    assert (made["labels"], made["weight"], made["row"]) == ([1, 0], [3.0, 1.0], [0, 1])


def test_the_tokenizers_own_limit_holds_too(tokenizer):
    made = Classification().encode({"text": ["good " * 400]}, tokenizer, DataConfig(source="x", max_length=512), INFO)
    assert len(made["input_ids"][0]) == tokenizer.model_max_length == 128


def test_texts_without_labels_get_no_weight(tokenizer):
    made = Classification().encode({"text": ["good", "bad"]}, tokenizer, DataConfig(source="x"), INFO)
    assert (made["weight"], made["labels"]) == ([0.0, 0.0], [0, 0])


def test_token_types_are_left_out_where_the_model_has_none(tmp_path):
    roberta = AutoTokenizer.from_pretrained(tiny_roberta(tmp_path / "roberta"))
    rows = {"text": ["good"], "text_pair": ["bad"], "label": [0]}
    assert "token_type_ids" not in Classification().encode(rows, roberta, DataConfig(source="x", text_pair="b"), INFO)


def test_canonical_rows_refuse_what_the_data_does_not_hold():
    data, task = DataConfig(source="x"), Classification()
    with pytest.raises(DataError, match=r"column 'label': unknown label 'bb': did you mean 'b'"):
        task.canonical({"text": "t", "label": "bb"}, data, TaskInfo(SINGLE, ("a", "b")))
    with pytest.raises(DataError, match="column 'text': expected text, found 3"):
        task.canonical({"text": 3, "label": "b"}, data, INFO)
    with pytest.raises(DataError, match="finite number, found 'nan'"):
        task.canonical({"text": "t", "label": "nan"}, data, TaskInfo(REGRESSION, ("label",)))


def test_a_null_text_becomes_empty_for_the_cleaning_to_judge():
    assert Classification().canonical({"text": None, "label": "a"}, DataConfig(source="x"), INFO)["text"] == ""


def test_pairs_count_for_duplicates_and_labels_for_strata():
    task, data = Classification(), DataConfig(source="x", text_pair="other")
    rows = [task.canonical({"text": "t", "other": other, "label": "b"}, data, INFO) for other in ("u", "v")]
    assert task.text_of(rows[0]) != task.text_of(rows[1])
    assert task.stratum(rows[0]) == "1"
    assert task.with_text(rows[0], str.upper) == {"text": "T", "text_pair": "u", "label": 1}
    assert task.stratum({"label": 0.5}) == ""
    assert task.stratum({"label": [1.0, 0.0]}) != task.stratum({"label": [0.0, 1.0]})


def test_the_threshold_moves_multi_label_decisions():
    outputs = {
        "logits": np.array([[0.5, -3.0]]),
        "labels": np.array([[0.0, 0.0]]),
        "loss": np.ones(1),
        "weight": np.ones(1),
    }
    info, evaluation = TaskInfo(MULTI, ("a", "b")), EvaluationConfig(metrics=("exact_match",))
    heads = [head_of(info, Classification(threshold=level)) for level in (0.5, 0.9)]
    found = [head.metrics(outputs, evaluation)["exact_match"] for head in heads]
    assert found == [0.0, 1.0]


@pytest.mark.parametrize("problem", [SINGLE, MULTI, REGRESSION])
def test_the_best_metric_is_always_among_the_figures(problem):
    labels = np.eye(3) if problem == MULTI else np.array([0.0, 1.0, 2.0])
    logits = np.eye(3)[:, :1] if problem == REGRESSION else np.eye(3)
    outputs = {"logits": logits, "labels": labels, "loss": np.ones(3), "weight": np.full(3, 2.0)}
    head = head_of(TaskInfo(problem, ("a",) if problem == REGRESSION else ("a", "b", "c")), Classification())
    found = head.metrics(outputs, EvaluationConfig(metrics=()))
    assert set(found) == {"loss", head.best_metric}
    assert found["loss"] == 0.5


def test_describing_many_rows_reads_columns_not_rows():
    import time

    rows = 120_000
    many = Dataset.from_dict({"text": ["t"] * rows, "label": np.arange(rows) % 4})
    started = time.perf_counter()
    describe(many)
    assert time.perf_counter() - started < 1.0


@pytest.mark.parametrize(("text", "spelled"), [("a game [SEP] a team", "[SEP]"), ("a [MASK] of it", "[MASK]")])
def test_texts_that_spell_control_tokens_are_warned_of(text, spelled, bert, caplog):
    tokenizer = AutoTokenizer.from_pretrained(bert)
    rows = {"text": [text, "a plain one"], "label": [0, 1], "_file": ["rows.csv"] * 2, "_line": [2, 3]}
    task, info = Classification(), TaskInfo("single_label_classification", ("a", "b"))
    data = DataConfig(source="rows.csv")
    ids = task.encode(rows, tokenizer, data, info)["input_ids"][0]
    assert tokenizer.convert_tokens_to_ids(spelled) in ids[1:-1], "the tokenizer reads it as one"
    assert f"1 of 2 rows spell control tokens ({spelled}), which are read as such" in caplog.text
    assert "(rows.csv:2)" in caplog.text
    caplog.clear()
    task.encode({"text": [text]}, tokenizer, data, info)  # a text to predict is the user's own
    assert not caplog.text
