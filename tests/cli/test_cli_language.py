"""Language models from training to use, through the command line's doors: evaluate, generate, chat, export, marks."""

from __future__ import annotations

import io
import json
import re
import sys

import pytest
import torch
from safetensors.torch import load_file

import peftkit
from peftkit.cli import app
from peftkit.inference import trained_model
from tests import tiny, warm

OPENING = "the king said no to the oil company and"


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs ``peftkit …`` in this process; gives exit code, stdout and stderr."""

    def run(*arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", ["peftkit", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as stop:
            app.main()
        shown = capsys.readouterr()
        return int(stop.value.code or 0), shown.out, shown.err

    return run


def recipe(base, folder, source, **parts):
    whole = {
        "name": "tiny", "model": {"source": str(base), "dtype": "float32"}, "tracking": [],
        "training": {"epochs": 2, "batch_size": 8, "learning_rate": 1e-2, "threads": 1},
        "evaluation": {"generation": {"samples": 2, "max_new_tokens": 6}}, "output_dir": str(folder / "runs"),
        "data": {"source": str(source), "max_length": 64},
    }  # fmt: skip
    return peftkit.replace(peftkit.Recipe.parse(whole), **parts)


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory):
    """A run of instruction tuning, proof and all."""
    folder = tmp_path_factory.mktemp("chat")
    pairs = [(a, b) for a in tiny.WORDS[10:22] for b in tiny.WORDS[30:33]]
    rows = [{"instruction": f"what is {a}", "input": b, "output": f"the {b} is {a}"} for a, b in pairs]
    write(folder / "rows.jsonl", rows)
    made = recipe(tiny.tiny_llama(folder / "base"), folder, folder / "rows.jsonl", task={"kind": "instruction"})
    return peftkit.train(made, quiet=True)


@pytest.fixture(scope="module")
def style_run(tmp_path_factory):
    """A run of style in packed windows, without a proof."""
    folder = tmp_path_factory.mktemp("style")
    words = tiny.WORDS
    rows = [{"text": " ".join(words[start : start + 20 + start % 7])} for start in range(0, 60, 2)]
    write(folder / "rows.jsonl", rows)
    base = tiny.tiny_llama(folder / "base")
    made = recipe(base, folder, folder / "rows.jsonl", task={"kind": "style"}, export={"prove": False},
                  data={"cleaning": {"near_duplicates": "off"}})  # fmt: skip
    return peftkit.train(made, quiet=True)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def logits_of(run):
    with torch.no_grad():
        return run.model(**run.tokenizer(OPENING, return_tensors="pt")).logits


PLAIN = """
import json, sys, torch, transformers
from safetensors.torch import save_file
adapter, base, merged, opening, out = sys.argv[1:]
auto, found = transformers.AutoModelForCausalLM, {}
tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
inputs = tokenizer(opening, return_tensors="pt")
with torch.no_grad():
    whole = auto.from_pretrained(merged, dtype=torch.float32).eval()
    assert not any("lora" in name for name, _ in whole.named_parameters())
    found["merged"] = whole(**inputs).logits
    from peft import PeftModel
    plain = auto.from_pretrained(base, dtype=torch.float32)
    found["base"] = plain(**inputs).logits
    found["adapter"] = PeftModel.from_pretrained(plain, adapter).eval()(**inputs).logits
assert "peftkit" not in sys.modules
save_file(found, out)
"""


def test_adapter_and_merged_model_give_equal_logits_in_plain_libraries(chat_run, call, tmp_path):
    code, _, said = call("export", chat_run.path, "--to", tmp_path / "merged", "--merge")
    assert code == 0, said
    assert "(format peft, merged)" in said
    out = tmp_path / "logits.safetensors"
    folders = [chat_run.adapter, chat_run.recipe.model.source, tmp_path / "merged"]
    warm.run(
        [sys.executable, "-I", "-c", PLAIN, *map(str, folders), OPENING, str(out)], check=True, timeout=300,
        capture_output=True,
    )  # fmt: skip
    found, expected = load_file(out), logits_of(peftkit.load(chat_run.path))
    torch.testing.assert_close(found["adapter"], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["merged"], expected, rtol=1e-4, atol=1e-4)
    assert (found["base"] - expected).abs().max() > 0.1
    again = peftkit.load(tmp_path / "merged")
    assert again.generate(["oil"]) == peftkit.load(chat_run.path).generate(["oil"])


def test_the_proof_has_the_figures_of_a_fresh_process(chat_run):
    proof = json.loads((chat_run.adapter / "proof.json").read_text())
    assert proof["passed"]
    assert proof["relative"] <= proof["tolerance"]
    assert proof["same_choice"] == 1
    vocabulary = peftkit.load(chat_run.path).model.config.vocab_size
    assert proof["logits"] % vocabulary == 0 < proof["logits"]
    assert proof["versions"]["peft"]


def test_trained_texts_are_those_in_the_runs_table(chat_run):
    rows = lines((chat_run.path / "generations.jsonl").read_text())
    run = peftkit.load(chat_run.path)
    assert run.generate([row["prompt"] for row in rows]) == [row["finetuned"] for row in rows]
    with run.base():
        assert run.generate([row["prompt"] for row in rows]) == [row["base"] for row in rows]


@pytest.mark.parametrize("which", ["chat_run", "style_run"])
def test_evaluate_gives_the_runs_own_figures_again(which, request, call):
    run = request.getfixturevalue(which)
    for split in ("test", "validation"):
        code, out, said = call("evaluate", run.path, "--split", split, "--json")
        assert code == 0, said
        assert json.loads(out) == pytest.approx(run.metrics[split], rel=1e-4)
    file = run.recipe.data.source
    whole = json.loads(call("evaluate", run.path, "--file", file, "--json")[1])
    assert whole["tokens"] > run.metrics["test"]["tokens"]
    assert "perplexity" in call("evaluate", run.path)[1]


def test_generate_reads_every_kind_of_row_and_keeps_its_columns(chat_run, call, tmp_path):
    turns = [{"role": "user", "content": "what is oil"}]
    rows = [
        {"prompt": "what is oil", "id": 7},
        {"messages": turns},
        {"messages": [*turns, {"role": "assistant", "content": "known already"}]},
        {"instruction": "what is oil", "input": "", "output": "the oil"},
        {"conversations": [{"from": "human", "value": "what is oil"}]},
    ]
    code, out, said = call("generate", chat_run.path, "--file", write(tmp_path / "p.jsonl", rows))
    assert code == 0, said
    found = lines(out)
    assert {row["generated"] for row in found} == set(peftkit.load(chat_run.path).generate(turns))
    assert found[0]["prompt"] == "what is oil"
    assert found[0]["id"] == 7
    assert [row["prompt"] for row in found[1:]] == [turns] * 4
    assert found[3]["output"] == "the oil"


def test_generate_from_a_pipe_and_into_a_file_with_options(style_run, call, tmp_path):
    asked = {"max_new_tokens": 4, "temperature": 1.5, "top_k": 20, "top_p": 0.9, "seed": 3}
    flags = [text for name, value in asked.items() for text in (f"--{name.replace('_', '-')}", value)]
    code, out, _ = call("generate", style_run.path, *flags, stdin="the king\n\nthe day\n")
    expected = peftkit.load(style_run.path).generate(["the king", "the day"], **asked)
    assert (code, [row["generated"] for row in lines(out)]) == (0, expected)
    (tmp_path / "p.txt").write_text("the king\r\nthe day", encoding="utf-8")
    to = tmp_path / "out.jsonl"
    code, out, said = call("generate", style_run.path, "--file", tmp_path / "p.txt", "--out", to, *flags)
    assert (code, out) == (0, "")
    assert f"wrote 2 rows to {to}" in said
    assert lines(to.read_text()) == [
        {"prompt": "the king", "generated": expected[0]}, {"prompt": "the day", "generated": expected[1]},
    ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "p.txt"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": "a"}\n{"prompt": 3}\n', "line 2, column 'prompt': expected text, found int"),
        ('{"prompt": "a"}\n{"prompt": " "}\n', "line 2, column 'prompt': the prompt is empty"),
        ('{"messages": []}\n', "line 1, column 'messages': the conversation is empty"),
        ('{"messages": [{"role": "usr", "content": "a"}]}\n', "line 1, column 'messages': turn 1: unknown role 'usr'"),
        ('{"a": 1}\n{"b": 1}\n', "2 rows are wrong"),
        ('{"prompt": "a"}\nnonsense\n', "line 2"),
        ('{"prompt": "' + "oil " * 400 + '"}\n', r"line 1: the prompt has 1\d\d\d tokens, .* context of 256"),
    ],
)
def test_bad_prompts_are_named_before_the_model_is_loaded(chat_run, call, tmp_path, monkeypatch, text, said):
    monkeypatch.setattr(trained_model, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    (tmp_path / "p.jsonl").write_text(text, encoding="utf-8")
    code, out, told = call("generate", chat_run.path, "--file", tmp_path / "p.jsonl", "--out", tmp_path / "o.jsonl")
    assert (code, out) == (2, "")
    assert "p.jsonl" in told
    assert re.search(said, told)
    assert not (tmp_path / "o.jsonl").exists()


def test_what_generate_refuses(chat_run, call, tmp_path, monkeypatch):
    monkeypatch.setattr(trained_model, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    file = write(tmp_path / "p.jsonl", [{"prompt": "oil"}])
    for flags, said in (
        (["--file", file, "--out", file], "is the input file"),
        (["--file", tmp_path / "none.jsonl"], "no such file"),
        (["--file", file, "--out", tmp_path / "no" / "o.jsonl"], "there is no folder"),
        (["--file", file, "--temperature", -1], "temperature"),
        (["--file", chat_run.path / "recipe.yaml"], "cannot be read"),
    ):
        code, _, told = call("generate", chat_run.path, *flags)
        assert (code, said in told) == (2, True), told
    assert lines(file.read_text()) == [{"prompt": "oil"}]


def test_out_stays_as_it_was_when_writing_fails(style_run, call, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise peftkit.UserError("no more")

    monkeypatch.setattr(trained_model.LoadedRun, "generate", fail)
    to = write(tmp_path / "o.jsonl", [{"old": 1}])
    assert call("generate", style_run.path, "--out", to, stdin="a\n")[0] == 2
    assert lines(to.read_text()) == [{"old": 1}]
    assert [path.name for path in tmp_path.iterdir()] == ["o.jsonl"]


def test_chat_over_a_pipe_answers_a_line_a_turn_and_switches_adapters(chat_run, call, tmp_path):
    from tests.exporting import TaskInfo, exported

    other, _ = exported(
        tmp_path / "run", chat_run.recipe.model.source, TaskInfo("causal_lm"), task={"kind": "instruction"},
        export={"prove": False},
    )  # fmt: skip
    asked = "what is oil\n/adapter other\nwhat is oil\n/quit\nnever\n"
    code, out, said = call(
        "chat", chat_run.path, "--adapter", f"other={other}", "--system", "be good", "--max-new-tokens", 4, stdin=asked
    )
    assert (code, "switched to adapter 'other'" in said) == (0, True)
    run = peftkit.load(chat_run.path, adapters={"other": other}).configured(max_new_tokens=4)
    talk = [{"role": "system", "content": "be good"}, {"role": "user", "content": "what is oil"}]
    first = run.generate(talk)[0]
    talk += [{"role": "assistant", "content": first}, {"role": "user", "content": "what is oil"}]
    run.use_adapter("other")
    assert out == f"{first}\n{run.generate(talk)[0]}\n"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--adapter", "other"], "expected NAME=RUN"),
        (["--adapter", "../x=RUN"], "cannot name an adapter"),
        (["--adapter", "x=nowhere"], "no such folder"),
        (["--top-p", 0], "top_p"),
    ],
)
def test_what_chat_refuses_before_the_base_is_loaded(chat_run, call, monkeypatch, flags, said):
    monkeypatch.setattr(trained_model, "load_exported", lambda *_, **__: pytest.fail("the model was loaded"))
    flags = [str(flag).replace("RUN", str(chat_run.path)) for flag in flags]
    code, out, told = call("chat", chat_run.path, *flags, stdin="a\n")
    assert (code, out) == (2, "")
    assert said in told


def test_commands_for_the_other_kind_of_run_point_to_the_right_one(chat_run, call, tmp_path, bert):
    from tests.exporting import exported

    classifier, _ = exported(tmp_path / "run", bert, export={"prove": False})
    for name in ("generate", "chat"):
        code, _, told = call(name, classifier, stdin="a\n")
        assert (code, "use `peftkit predict`" in told) == (2, True)
    code, _, told = call("predict", chat_run.path, stdin="a\n")
    assert (code, "use `peftkit generate`" in told) == (2, True)


@pytest.mark.parametrize("which", ["chat_run", "style_run"])
def test_what_a_person_marked_good_is_the_next_training_set(which, request, call, tmp_path):
    run = request.getfixturevalue(which)
    rows = lines((run.path / "generations.jsonl").read_text())
    assert len(rows) == 2
    marked = write(tmp_path / "marked.jsonl", [{**rows[0], "mark": "good", "finetuned": "the oil"}, rows[1]])
    to = tmp_path / "next.jsonl"
    code, out, told = call("inspect", "--marked", marked, "--out", to)
    assert (code, out) == (0, "")
    assert f"wrote 1 of 2 generations (those marked good) to {to}" in told
    again = peftkit.replace(run.recipe, data={"source": str(to), "splits": {}, "validation_size": 1, "test_size": 0})
    (kept,) = lines(to.read_text())
    write(to, [kept, {**kept, **changed(kept)}])
    found = peftkit.inspect(again)
    assert sum(split.rows for split in found.splits) == 2
    assert "oil" in "".join(token.text for token in found.splits[0].shown[0].tokens)


def changed(row):
    """The row with other words, so that it is no duplicate."""
    if "text" in row:
        return {"text": row["text"] + " and the sad red star"}
    return {"messages": [{"role": "user", "content": "who"}, {"role": "assistant", "content": "oil"}]}


def test_marks_that_are_missing_or_files_that_would_be_overwritten(chat_run, call, tmp_path):
    marked = write(tmp_path / "marked.jsonl", [{"prompt": "a", "finetuned": "b"}])
    for arguments, said in (
        (["--marked", marked, "--out", tmp_path / "o.jsonl"], "no row is marked good"),
        (["--marked", marked, "--out", marked], "is the input file"),
        (["--marked", marked], "--marked FILE needs --out FILE"),
        (["--bad"], "--marked FILE needs --out FILE"),
        (["--marked", marked, "--bad", "--out", tmp_path / "o.jsonl"], "no row is marked good"),
        (["own_csv", "--marked", marked, "--out", tmp_path / "o.jsonl"], "takes no recipe"),
        ([], "expected a recipe"),
    ):
        code, _, told = call("inspect", *arguments)
        assert (code, said in told) == (2, True), told
    assert not (tmp_path / "o.jsonl").exists()
