"""Rows of tagged words: both forms, all schemes, what is refused, and windows over long texts."""

import csv
import itertools
import json

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from transformers import AutoTokenizer

from peftkit import Recipe
from peftkit.data.batching import IGNORE
from peftkit.data.pipeline import prepare
from peftkit.errors import DataError, RecipeError
from peftkit.tasks.long_texts import windows
from peftkit.tasks.tagged_words import from_spans, words_of
from peftkit.tasks.token_classification import TokenClassification
from tests import tiny

NAMES = [(["the", "good", "king", "lord", "of", "world"], ["O", "O", "B-PER", "I-PER", "O", "B-LOC"]),
         (["market", "of", "the", "king"], ["B-LOC", "O", "O", "B-PER"]),
         (["the", "day", "was", "new"], ["O", "O", "O", "O"])]  # fmt: skip
LABELS = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")


def recipe(bert, folder, task=None, **data):
    fields = {"source": str(folder), "text": "tokens", "label": "tags", "max_length": 32,
              "validation_size": 1, "test_size": 1, "stratify": False,
              "cleaning": {"duplicates": "off", "near_duplicates": "off"}}  # fmt: skip
    return Recipe.parse({
        "name": "tags", "model": {"source": str(bert)}, "method": {"kind": "lora"},
        "task": {"kind": "token_classification", **(task or {})}, "data": {**fields, **data},
    })  # fmt: skip


def write(file, rows, key="tags"):
    lines = [json.dumps({"tokens": tokens, key: tags}) for tokens, tags in rows]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def tagged(bert, file, **fields):
    """Words with their tags of every row, and the tags by id."""
    prepared = prepare(recipe(bert, file, **fields))
    rows = sorted((row for split in prepared.splits.values() for row in split), key=lambda row: row["_line"])
    words = [[row["text"][a:b] for a, b in zip(row["starts"], row["ends"])] for row in rows]
    return [(words[n], row["labels"]) for n, row in enumerate(rows)], prepared.info.labels


def refused(bert, file, **fields):
    with pytest.raises(DataError) as caught:
        prepare(recipe(bert, file, **fields))
    return str(caught.value)


def test_every_form_and_scheme_is_the_same_task(bert, tmp_path):
    expected = (NAMES * 4, LABELS)
    assert tagged(bert, write(tmp_path / "bio.jsonl", NAMES * 4)) == expected
    for name, change in {
        "bioes": {"B-PER": "S-PER", "B-LOC": "S-LOC"}, "iob1": {"B-PER": "I-PER", "B-LOC": "I-LOC"},
    }.items():  # fmt: skip
        rows = [(tokens, [change.get(tag, tag) for tag in tags]) for tokens, tags in NAMES]
        if name == "bioes":
            rows[0] = (rows[0][0], ["O", "O", "B-PER", "E-PER", "O", "S-LOC"])
        assert tagged(bert, write(tmp_path / f"{name}.jsonl", rows * 4)) == expected
    columns = ["\n".join(f"{word} x {tag}" for word, tag in zip(*row)) for row in NAMES * 4]
    conll = tmp_path / "rows.conll"
    conll.write_text("-DOCSTART- x O\n\n# a comment\n" + "\n\n".join(columns), encoding="utf-8")
    assert tagged(bert, conll) == expected
    for name, cell in {"words": " ".join, "json": json.dumps, "python": repr}.items():
        with (tmp_path / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("tokens", "tags"), *((cell(words), cell(tags)) for words, tags in NAMES * 4)])
        assert tagged(bert, tmp_path / f"{name}.csv") == expected, name
    spans = [
        ("the good king lord of world", [(9, 18, "PER"), (22, 27, "LOC")]),
        ("market of the king", [(0, 6, "LOC"), (14, 18, "PER")]), ("the day was new", []),
    ]  # fmt: skip
    lines = [
        json.dumps({"text": text, "spans": [dict(zip(("start", "end", "label"), span)) for span in entities]})
        for text, entities in spans * 4
    ]
    (tmp_path / "spans.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert tagged(bert, tmp_path / "spans.jsonl", text="text", label="spans") == expected


def test_ids_are_read_by_the_names_that_a_file_lists(bert, tmp_path):
    names = ["O", "B-PER", "I-PER", "B-LOC"]
    features = Features({"tokens": List(Value("string")), "tags": List(ClassLabel(names=names))})
    columns = {
        "tokens": [row[0] for row in NAMES * 4],
        "tags": [[names.index(tag) for tag in row[1]] for row in NAMES * 4],
    }
    Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "rows.parquet")
    assert tagged(bert, tmp_path / "rows.parquet") == (NAMES * 4, (*names, "I-LOC"))
    ids = [(tokens, [1] * len(tokens)) for tokens, _ in NAMES * 4]
    assert "the number 1, whose name the file does not tell" in refused(bert, write(tmp_path / "ids.jsonl", ids))


def test_parts_of_speech_are_tags_without_prefixes(bert, tmp_path):
    nouns = ("king", "day", "movie", "film", "player", "team")
    rows = [(["the", noun, "was", "good"], ["DET", "NOUN", "VERB", "ADJ"]) for noun in nouns]
    assert tagged(bert, write(tmp_path / "pos.jsonl", rows)) == (rows, ("ADJ", "DET", "NOUN", "VERB"))


@pytest.mark.parametrize(("rows", "message"), [
    ([*NAMES, (["a", "king"], ["O"])], "rows.jsonl, line 4, column 'tags': expected a tag for each of 2"),
    ([*NAMES, (["a", ""], ["O", "O"])],  "rows.jsonl, line 4, column 'tokens': expected words, found '' among them"),
    ([*NAMES, (["a", "king"], ["O", "I-PER"])], "tags mix two schemes"),
    ([*NAMES, (["a", "king"], ["O", None])], "rows.jsonl, line 4, column 'tags': expected tags as text, found None"),
    ([(["a", "king"], ["O", "O"])] * 4, "no word of training has a tag other than O"),
])  # fmt: skip
def test_wrong_rows_are_one_message_with_their_place(bert, tmp_path, rows, message):
    assert message in refused(bert, write(tmp_path / "rows.jsonl", rows))


@pytest.mark.parametrize(("tags", "message"), [
    (["O", "E-PER"], "rows.jsonl:1 (O B-PER) begins an entity with B-, {} (O E-PER) without"),
    (["S-PER", "I-PER"], "rows.jsonl:1 (O B-PER) begins an entity with B-, {} (S-PER I-PER) without"),
    (["B-PER", "O"], "rows.jsonl:1 (E-PER) marks the last word of an entity, as BIOES does, and {} (B-PER O) ends one"),
    (["B-PER", "B-PER"], "and {} (B-PER B-PER) ends one without"),
    (["S-PER", "PER"], "rows.jsonl:1 (B-PER) has a prefix, {} (PER) has none"),
])  # fmt: skip
def test_an_inconsistent_sequence_is_one_message_with_its_place(bert, tmp_path, tags, message):
    rows = [([good, "king"], ["B-PER", "E-PER"]) for good in ("good", "bad", "new", "the")]
    assert tagged(bert, write(tmp_path / "good.jsonl", rows))[1] == ("O", "B-PER", "I-PER")  # without it all is well
    write(tmp_path / "rows.jsonl", [*rows, (["a", "king"], tags)])
    text = refused(bert, tmp_path / "rows.jsonl")
    assert message.format("rows.jsonl:5") in text.replace(f"{tmp_path}/", "")


@pytest.mark.parametrize(("text", "words"), [
    ("Ada's cat_2, ok", ["Ada", "'", "s", "cat_2", ",", "ok"]), ("Jose\u0301 was", ["Jose\u0301", "was"]),
    ("दिल्ली में", ["दिल्ली", "में"]), ("กรุงเทพ", ["กรุงเทพ"]),
    ("北京タx1", ["北", "京", "タ", "x1"]), ("❤\ufe0f!", ["❤\ufe0f", "!"]),
])  # fmt: skip
def test_words_keep_their_marks_and_chinese_characters_are_words(text, words):
    starts, ends = words_of(text)
    assert [text[start:end] for start, end in zip(starts, ends)] == words


def test_spans_of_chinese_are_read():
    read = from_spans("我在北京工作", [{"start": 2, "end": 4, "label": "LOC"}], "spans")
    assert read.tags == ["O", "O", "B-LOC", "I-LOC", "O", "O"]


@pytest.mark.parametrize(("span", "message"), [
    ((4, 12, "PER"), "cuts a word of 'good king'"), ((4, 40, "PER"), "is not within the text, which has 18 characters"),
    ((4, 4, "PER"), "is not within the text"), ((0, 8, "O"), "expected entities such as"),
])  # fmt: skip
def test_wrong_spans_are_one_message_with_their_place(bert, tmp_path, span, message):
    good = {"text": "the good king was", "spans": [{"start": 9, "end": 13, "label": "PER"}]}
    bad = {"text": "the good king wasn", "spans": [dict(zip(("start", "end", "label"), span))]}
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [good, good, good, bad])), encoding="utf-8")
    text = refused(bert, tmp_path / "rows.jsonl", text="text", label="spans")
    assert message in text
    assert "rows.jsonl, line 4, column 'spans'" in text


def test_a_split_with_an_unknown_tag_is_refused_by_place(bert, tmp_path):
    write(tmp_path / "train.jsonl", NAMES)
    write(tmp_path / "validation.jsonl", [*NAMES, (["a", "king"], ["O", "B-PRE"])])
    message = refused(bert, tmp_path)
    assert (
        "validation.jsonl, line 4, column 'tags': the validation split has a tag that training lacks: B-PRE" in message
    )
    assert "did you mean 'PER'" in message


def test_scheme_labels_and_weights_change_what_is_learned(bert, tmp_path):
    mixed = write(tmp_path / "mixed.jsonl", [*NAMES, (["a", "king"], ["O", "I-PER"])] * 3)
    rows, _ = tagged(bert, mixed, task={"scheme": "iob1"})
    assert rows[3] == (["a", "king"], ["O", "B-PER"])
    file = write(tmp_path / "rows.jsonl", NAMES * 4)
    assert tagged(bert, file, labels=["PER", "LOC"])[1] == ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
    assert "does not name LOC" in refused(bert, file, labels=["PER"])
    weights = prepare(recipe(bert, file, {"class_weights": {"O": 0.25}})).info.class_weights
    assert weights == (0.25, 1.0, 1.0, 1.0, 1.0)
    balanced = prepare(recipe(bert, file, {"class_weights": "balanced"})).info.class_weights
    assert balanced[0] < 1 < balanced[1]
    assert balanced[1] == balanced[2]
    with pytest.raises(RecipeError, match="no tag 'LCO': did you mean 'LOC'"):
        prepare(recipe(bert, file, {"class_weights": {"LCO": 2.0}}))
    assert "task.scheme=bio begins each entity with B-" in refused(bert, mixed, task={"scheme": "bio"})


@pytest.mark.parametrize("stride", [0, 1, 6])
@pytest.mark.parametrize("tokens", [1, 10, 11, 25, 40])
def test_windows_score_every_token_once_and_share_their_stride(tokens, stride):
    cut = list(windows(tokens, 10, stride))
    assert [token for _, _, scored in cut for token in scored] == list(range(tokens))
    assert all(begin <= scored.start and scored.stop <= end <= begin + 10 for begin, end, scored in cut)
    assert all(right[0] == left[1] - stride for left, right in itertools.pairwise(cut))


@pytest.mark.parametrize("kind", ["wordpiece", "roberta", "gpt2"])
def test_each_word_is_learned_at_its_first_token(kind, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny.tiny_tokenizer(tmp_path / kind, kind))
    tokens, tags = (part * 4 for part in NAMES[0])
    row = {"text": " ".join(tokens), "starts": [], "ends": [], "labels": tags}
    for token in tokens:
        row["starts"].append(row["ends"][-1] + 1 if row["ends"] else 0)
        row["ends"].append(row["starts"][-1] + len(token))
    task, info = TokenClassification(stride=4), prepare_info()
    data = recipe("base", "rows", max_length=14).data
    columns = task.encode({name: [value] for name, value in row.items()}, tokenizer, data, info)
    scored = {}
    for ids, labels, words in zip(columns["input_ids"], columns["labels"], columns["words"]):
        assert len(ids) == len(labels) == len(words) <= 14
        for token, label, word in zip(ids, labels, words):
            assert (label == IGNORE) == (word < 0)
            if word >= 0:
                assert word not in scored
                scored[word] = (token, LABELS[label])
    assert [scored[word][1] for word in range(len(tokens))] == tags
    assert sum(columns["weight"]) == len(tokens)
    for word, (token, _) in scored.items():
        assert tokens[word].startswith(tokenizer.decode([token]).strip().removeprefix("##"))


def test_stride_is_what_the_windows_of_a_text_share(bert):
    tokenizer, data = AutoTokenizer.from_pretrained(bert), recipe("base", "rows", max_length=14).data
    row = TokenClassification().input_row((" ".join(["king"] * 36),))
    rows = {name: [value] for name, value in row.items()}
    cut = {}
    for stride in (0, 3, 6, None):
        ids = TokenClassification(stride=stride).encode(rows, tokenizer, data, prepare_info())["input_ids"]
        cut[stride] = [len(each) - 2 for each in ids]
    assert cut == {0: [12] * 3, 3: [12, 12, 12, 9], 6: [12] * 5, None: cut[3]}  # None is a quarter of 12
    with pytest.raises(RecipeError, match=r"task\.stride=12 leaves nothing of a window of 12 tokens"):
        TokenClassification(stride=12).encode(rows, tokenizer, data, prepare_info())


def prepare_info():
    from peftkit.schema.types import TaskInfo

    return TaskInfo("token_classification", LABELS)


def test_a_word_without_a_token_is_warned_of_where_it_has_a_tag(bert, caplog):
    tokenizer = AutoTokenizer.from_pretrained(bert)
    text = "king \u200d day"
    row = {"text": [text], "starts": [[0, 5, 7]], "ends": [[4, 6, 10]], "labels": [["B-PER", "B-LOC", "O"]]}
    data = recipe("base", "rows").data
    columns = TokenClassification().encode(row, tokenizer, data, prepare_info())
    read = {word for word in columns["words"][0] if word >= 0}
    lost = set(columns["unread"][0])
    assert read | lost == {0, 1, 2}
    assert not read & lost
    assert "1 words with a tag have no token of their own" in caplog.text
    caplog.clear()
    TokenClassification().encode(row | {"labels": [["B-PER", "O", "O"]]}, tokenizer, data, prepare_info())
    assert not caplog.text
