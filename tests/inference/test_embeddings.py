"""Vectors of texts equal those computed by hand with plain transformers, whatever the batches."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

import peftkit
from peftkit.errors import DataError
from peftkit.inference import embed_file, embeddings
from tests import tiny
from tests.exporting import exported

TEXTS = ["the game of the team", "stock", "a market of money and oil " * 3, "red green blue", "Team Player"]


def by_hand(folder, texts, pooling, model=None):
    """One text at a time: no padding can matter."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = (model or AutoModel.from_pretrained(folder, dtype=torch.float32)).eval()
    made = []
    with torch.no_grad():
        for text in texts:
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            made.append({"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling].numpy())
    return np.stack(made)


@pytest.fixture
def in_fp32(monkeypatch):
    from peftkit.models import dtypes

    monkeypatch.setattr(dtypes, "dtype_for", lambda *_: torch.float32)


@pytest.mark.parametrize(
    ("maker", "mode", "pooling"),
    [
        (tiny.tiny_bert, "mean", "mean"),
        (tiny.tiny_bert, "cls", "cls"),
        (tiny.tiny_bert, None, "mean"),
        (tiny.tiny_roberta, None, "mean"),
        (tiny.tiny_llama, None, "last"),
        (tiny.tiny_gpt2, None, "last"),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_base_s_own_pooling_by_hand(maker, mode, pooling, batch_size, tmp_path, in_fp32):
    folder = maker(tmp_path / "base")
    if mode:
        tiny.add_pooling(folder, mode)
    found = embeddings.of_model(str(folder)).embed(TEXTS, batch_size=batch_size)
    expected = by_hand(folder, TEXTS, pooling)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_normalized_vectors_have_length_one_and_the_same_direction(bert, in_fp32):
    embedder = embeddings.of_model(str(bert))
    plain, unit = embedder.embed(TEXTS), embedder.embed(TEXTS, normalize=True)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(unit * np.linalg.norm(plain, axis=1, keepdims=True), plain, rtol=1e-4, atol=1e-5)
    assert embedder.embed([]).shape == (0, 32)
    assert embedder.embed("stock").shape == (1, 32)
    with pytest.raises(DataError, match=r"text 1: expected a text or .*, found int"):
        embedder.embed(["a", 3])


def test_a_run_s_adapter_is_in_its_vectors(bert, tmp_path):
    folder, made = exported(tmp_path, bert, method={"kind": "lora", "rank": 4}, model={"pooling": "mean"})
    run = peftkit.load(folder)
    found = run.embed(TEXTS)
    trained = by_hand(bert, TEXTS, "mean", made.loaded.model.get_base_model().base_model)
    np.testing.assert_allclose(found, trained, rtol=1e-3, atol=1e-3)
    assert np.abs(found - by_hand(bert, TEXTS, "mean")).max() > 0.01


def test_a_run_s_own_tokens_bound_the_batches(bert, tmp_path):
    folder, _ = exported(tmp_path, bert, method={"kind": "lora", "rank": 4}, training={"micro_batch_tokens": 12})
    embedder, sizes = embeddings.of_run(peftkit.load(folder)), []
    embedder.model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    embedder.embed(["red"] * 10)
    assert sizes == [(4, 3), (4, 3), (2, 3)]


def test_files_and_pipes(bert, tmp_path, monkeypatch, capsys, in_fp32):
    table, parquet, array = (tmp_path / name for name in ("in.csv", "out.parquet", "out.npy"))
    table.write_text("id,words\n" + "".join(f"{n},{text}\n" for n, text in enumerate(TEXTS)))
    expected = by_hand(bert, TEXTS, "mean")
    options = {"file": table, "column": "words", "normalize": False}
    assert embed_file.embed_file(str(bert), out=array, **options) == len(TEXTS)
    np.testing.assert_allclose(np.load(array), expected, rtol=1e-3, atol=1e-3)
    embed_file.embed_file(str(bert), out=parquet, **options)
    rows = pq.read_table(parquet).to_pylist()
    assert [row["words"] for row in rows] == TEXTS
    np.testing.assert_allclose(np.array([row["vector"] for row in rows]), expected, rtol=1e-3, atol=1e-3)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(TEXTS)))
    embed_file.embed_file(str(bert), file=None, column=None, out=None, normalize=False)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    np.testing.assert_allclose([line["vector"] for line in lines], expected, rtol=1e-3, atol=1e-3)


def test_what_cannot_be_read_or_written_is_told_before_the_model_is_loaded(tmp_path):
    table = tmp_path / "in.csv"
    table.write_text("words\na\n")
    with pytest.raises(DataError, match=r"must end in .npy, .parquet, .jsonl"):
        embed_file.embed_file("nowhere", file=table, column=None, out=tmp_path / "x.pt", normalize=False)
    with pytest.raises(DataError, match="column 'text'"):
        embed_file.embed_file("nowhere", file=table, column=None, out=tmp_path / "x.npy", normalize=False)


def test_pairs_are_read_together_with_their_token_types(bert, tmp_path, in_fp32):
    pairs = [("the game", "a team won"), ("stock", "a market of money and oil " * 2)]
    embedder = embeddings.of_model(str(bert))
    found = embedder.embed(pairs)
    tokenizer, model = AutoTokenizer.from_pretrained(bert), AutoModel.from_pretrained(bert, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = [model(**tokenizer(*pair, return_tensors="pt")).last_hidden_state[0].mean(0) for pair in pairs]
    np.testing.assert_allclose(found, np.stack(expected), rtol=1e-4, atol=1e-4)
    with pytest.raises(DataError, match="text 1: texts and"):
        embedder.embed([pairs[0], "a"])
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"text": a, "other": b}) + "\n" for a, b in pairs))
    out = tmp_path / "out.npy"
    options = {"file": file, "column": None, "out": out, "normalize": False, "pair": "other"}
    assert embed_file.embed_file(str(bert), **options) == 2
    np.testing.assert_allclose(np.load(out), found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ending", [".npy", ".parquet", ".jsonl"])
def test_a_file_is_written_as_it_is_embedded(bert, tmp_path, in_fp32, monkeypatch, ending):
    monkeypatch.setattr(embed_file, "CHUNK", 2)
    held = {"most": 0}
    real = embeddings.Embedder.embed

    def counted(self, texts, **options):
        held["most"] = max(held["most"], len(texts))
        return real(self, texts, **options)

    monkeypatch.setattr(embeddings.Embedder, "embed", counted)
    file, out = tmp_path / "texts.jsonl", tmp_path / f"out{ending}"
    lines = [{"text": text, "note": None if row < 2 else "late"} for row, text in enumerate(TEXTS)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert embed_file.embed_file(str(bert), file=file, column=None, out=out, normalize=False) == len(TEXTS)
    assert held["most"] == 2
    if ending == ".npy":
        found = np.load(out)
    elif ending == ".parquet":
        table = pq.read_table(out)
        assert table["note"].to_pylist() == [line["note"] for line in lines]
        found = np.array(table["vector"].to_pylist())
    else:
        found = np.array([json.loads(line)["vector"] for line in out.read_text().splitlines()])
    np.testing.assert_allclose(found, by_hand(bert, TEXTS, "mean"), rtol=1e-3, atol=1e-3)
