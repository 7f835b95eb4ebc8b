"""Adapters computed from others: any method as the LoRA of least error, and several LoRAs as one."""

from __future__ import annotations

import csv
import json
import sys

import numpy as np
import pytest
import torch

import peftkit
from peftkit.errors import ExportError, MethodError, RecipeError
from peftkit.export import low_rank, run_export
from peftkit.export.formats.combined import Combined
from peftkit.schema.types import TaskInfo
from tests import tiny
from tests.exporting import INFO, TEXTS, exported

PLAIN = {"prove": False}
CAUSAL = TaskInfo("causal_lm")
LORA = {"kind": "lora", "rank": 4}
OFT = {"kind": "oft", "block_size": 4}
LOHA = {"kind": "peft", "peft_type": "LOHA", "arguments": {"r": 4}}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Labelled rows with a test split, and a text for language models."""
    folder = tmp_path_factory.mktemp("rows")
    (folder / "labels").mkdir()
    for split, count in (("train", 24), ("validation", 6), ("test", 12)):
        with (folder / "labels" / f"{split}.csv").open("w", newline="") as stream:
            lines = csv.writer(stream)
            lines.writerow(["text", "label"])
            lines.writerows((TEXTS[n % len(TEXTS)] + f" {split} {n}", INFO.labels[n % 3]) for n in range(count))
        for name in ("one", "two"):
            asked = [{"instruction": f"{name} {split} {n}", "output": TEXTS[n % len(TEXTS)]} for n in range(count)]
            (folder / name).mkdir(exist_ok=True)
            (folder / name / f"{split}.jsonl").write_text("\n".join(map(json.dumps, asked)))
    return folder


def computed(folder):
    return json.loads((folder / "proof.json").read_text())


@pytest.mark.parametrize("method", [OFT, pytest.param(LOHA, marks=pytest.mark.slow)])
def test_a_lora_of_full_rank_gives_the_method_s_outputs(method, bert, rows, tmp_path):
    folder, _ = exported(tmp_path / "run", bert, method=method, export=PLAIN, data={"source": str(rows / "labels")})
    said = run_export(folder, tmp_path / "lora", to_format="lora", rank=32)
    values = computed(tmp_path / "lora")
    assert values["passed"]
    assert values["computed"]["relative_error"] < 1e-5
    assert values["computed"]["before"] == pytest.approx(values["computed"]["after"], abs=1e-4)
    assert "on 12 rows of the test split: " in said
    ours, theirs = (peftkit.load(path).logits(TEXTS) for path in (tmp_path / "lora", folder))
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"] == 32


def test_the_factors_are_those_of_peft_s_own_conversion(bert, tmp_path):
    from peft import convert_to_lora
    from safetensors.torch import load_file

    folder, made = exported(tmp_path / "run", bert, method=LOHA, export=PLAIN)
    run_export(folder, tmp_path / "lora", to_format="lora", rank=3, rows=0)
    _, theirs = convert_to_lora(made.loaded.model, rank=3)
    ours = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    names = [name.removesuffix(".lora_A.weight") for name in theirs if name.endswith("lora_A.weight")]
    assert len(names) == 13  # the pooler is one of them
    for name in names:
        products = [one[f"{name}.lora_B.weight"] @ one[f"{name}.lora_A.weight"] for one in (ours, theirs)]
        torch.testing.assert_close(products[0], products[1], rtol=1e-3, atol=1e-5)


def test_auto_takes_the_smallest_rank_that_meets_the_error(bert, tmp_path):
    folder, _ = exported(tmp_path / "run", bert, method={**LORA, "use_rslora": True}, export=PLAIN)
    run_export(folder, tmp_path / "exact", to_format="lora", rows=0)
    assert computed(tmp_path / "exact")["computed"]["rank"] == 4
    run_export(folder, tmp_path / "rough", to_format="lora", rows=0, max_error=0.6)
    rough = computed(tmp_path / "rough")["computed"]
    assert rough["rank"] < 4
    assert 0.1 < rough["relative_error"] <= 0.6
    assert rough["split"] is None


def test_what_a_lora_cannot_hold_is_named_and_the_head_is_kept(bert, rows, tmp_path):
    folder, _ = exported(
        tmp_path / "run", bert, method={"kind": "full"}, export=PLAIN, data={"source": str(rows / "labels")}
    )
    said = run_export(folder, tmp_path / "lora", to_format="lora", rank=32, rows=5)
    values = computed(tmp_path / "lora")["computed"]
    assert "bert.embeddings.word_embeddings.weight" in values["left_out"]
    assert f"{len(values['left_out'])} other parameters that were trained are left out" in said
    assert "on 5 rows" in said
    assert values["before"] != values["after"]
    ours, theirs = (peftkit.load(path).model.state_dict() for path in (tmp_path / "lora", folder))
    head = next(value for name, value in ours.items() if "modules_to_save.default.weight" in name)
    torch.testing.assert_close(head, theirs["classifier.weight"])


def test_gpt_2_s_transposed_weights_and_plain_peft(tmp_path):
    from transformers import AutoModelForCausalLM

    base = tiny.tiny_gpt2(tmp_path / "base")
    folder, made = exported(
        tmp_path / "run", base, CAUSAL, method={"kind": "top_k", "k": 1}, task={"kind": "style"}, export=PLAIN
    )
    run_export(folder, tmp_path / "lora", to_format="lora", rank=32, rows=0)
    from peft import PeftModel

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, tmp_path / "lora")
    trained = dict(made.loaded.model.named_parameters())
    merged = dict(model.merge_and_unload().named_parameters())
    for part in ("attn.c_attn", "mlp.c_fc", "mlp.c_proj"):
        name = f"transformer.h.1.{part}.weight"
        torch.testing.assert_close(merged[name], trained[name], rtol=1e-4, atol=1e-5)


def test_large_matrices_are_decomposed_at_random_to_the_same_error(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(96, 12, generator=generator) @ torch.randn(12, 80, generator=generator)
    delta += 0.01 * torch.randn(96, 80, generator=generator)
    exact = low_rank.factorize(delta, 12)
    monkeypatch.setattr(low_rank, "EXACT", 16)
    close = low_rank.factorize(delta, 12)
    assert len(close.s) == 20
    a, b = close.lora(12)
    error = low_rank.relative_error({"w": exact}, 12)
    assert float((delta - b @ a).norm() / delta.norm()) == pytest.approx(error, rel=0.05)
    assert low_rank.relative_error({"w": close}, 12) == pytest.approx(error, rel=0.05)


def test_methods_without_a_change_of_linear_weights_are_refused(bert, llama, tmp_path):
    folder, _ = exported(tmp_path / "a", bert, method={"kind": "bitfit"}, export=PLAIN)
    with pytest.raises(MethodError, match=r"holds changes of linear layers, and this training changed only bert"):
        run_export(folder, tmp_path / "out", to_format="lora", rows=0)
    folder, _ = exported(
        tmp_path / "b", llama, CAUSAL, method={"kind": "prompt_tuning"}, task={"kind": "style"}, export=PLAIN
    )
    with pytest.raises(MethodError, match="no change of weights that a LoRA could hold"):
        run_export(folder, tmp_path / "out", to_format="lora")


def test_an_adapter_that_peft_loads_otherwise_is_refused(bert, tmp_path, monkeypatch):
    folder, _ = exported(tmp_path / "run", bert, method=LORA, export=PLAIN)
    real = low_rank.attach

    def scaled_after_saving(loaded, factors, rank):
        real(loaded, factors, rank)
        save = loaded.model.save_pretrained

        def saved(*args, **kwargs):
            save(*args, **kwargs)
            for name, parameter in loaded.model.named_parameters():
                parameter.data *= 3.0 if "lora_B" in name else 1.0

        loaded.model.save_pretrained = saved

    monkeypatch.setattr(low_rank, "attach", scaled_after_saving)
    with pytest.raises(ExportError, match="export format 'lora': its logits differ"):
        run_export(folder, tmp_path / "out", to_format="lora", rows=0)
    assert not (tmp_path / "out").exists()


def test_the_command_has_a_flag(bert, tmp_path, monkeypatch, capsys):
    from peftkit.cli import app

    folder, _ = exported(tmp_path / "run", bert, method=OFT, export=PLAIN)
    command = ["peftkit", "export", str(folder), "--to", str(tmp_path / "out"), "--as-lora", "--rank", "2", "--rows=0"]
    for extra, code in ((["--merge"], 2), ([], 0)):
        monkeypatch.setattr(sys, "argv", [*command, *extra])
        with pytest.raises(SystemExit) as stop:
            app.main()
        assert int(stop.value.code or 0) == code
    assert computed(tmp_path / "out")["computed"]["rank"] == 2
    assert "--as-lora is --format lora" in capsys.readouterr().err


@pytest.fixture(scope="module")
def two_runs(rows, tmp_path_factory):
    """LoRAs on one tiny Llama, trained on different texts."""
    folder = tmp_path_factory.mktemp("two")
    base, runs = tiny.tiny_llama(folder / "base"), []
    for name in ("one", "two"):
        run, made = exported(
            folder / name, base, CAUSAL, name=name, method=LORA, task={"kind": "instruction"}, export=PLAIN,
            data={"source": str(rows / name), "max_length": 128},
        )  # fmt: skip
        del made
        runs.append(run)
    return runs


@pytest.mark.parametrize(
    ("combination", "weights"),
    [
        ("cat", (0.75, 0.25)),
        pytest.param("svd", None, marks=pytest.mark.slow),
        ("ties", (1.0, 1.0)),
        pytest.param("dare_linear", None, marks=pytest.mark.slow),
    ],
)
def test_adapters_are_combined_by_peft_and_scored_on_both_runs_rows(combination, weights, two_runs, tmp_path):
    from peft import AutoPeftModelForCausalLM, PeftModel

    one, two = two_runs
    said = run_export(
        one, tmp_path / "out", to_format="combined", adapters=str(two), combination=combination, weights=weights,
        rows=3, seed=5,
    )  # fmt: skip
    assert f"2 adapters are combined by {combination} into one of rank {8 if combination == 'cat' else 4}" in said
    assert "rows of one: loss" in said
    assert "rows of two: loss" in said
    values = computed(tmp_path / "out")
    assert values["passed"]
    assert all(run["alone"]["loss"] > 0 and run["combined"]["loss"] > 0 for run in values["computed"]["runs"])
    judge: PeftModel = AutoPeftModelForCausalLM.from_pretrained(one, dtype=torch.float32)
    judge.load_adapter(two, adapter_name="two")
    density = {} if combination in {"cat", "svd"} else {"density": 0.5}
    torch.manual_seed(5)
    shares = list(weights or (0.5, 0.5))
    judge.add_weighted_adapter(["default", "two"], shares, "sum", combination_type=combination, **density)
    judge.set_adapter("sum")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        theirs = judge.eval()(input_ids=ids).logits
        combined = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        ours = combined.eval()(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert peftkit.load(tmp_path / "out").manifest.method == "lora"


def test_adapters_that_cannot_be_combined_are_refused(bert, two_runs, tmp_path):
    one, two = two_runs
    classifier, _ = exported(tmp_path / "a", bert, method=LORA, export=PLAIN)
    with pytest.raises(MethodError, match="heads cannot be combined"):
        run_export(classifier, tmp_path / "out", to_format="combined", adapters=str(classifier))
    oft, _ = exported(tmp_path / "b", bert, method=OFT, export=PLAIN)
    with pytest.raises(MethodError, match="only LoRA adapters can be combined, and this is 'oft'"):
        run_export(oft, tmp_path / "out", to_format="combined", adapters=str(oft))
    with pytest.raises(RecipeError, match="weights: expected one per run, 2, found 3"):
        run_export(one, tmp_path / "out", to_format="combined", adapters=str(two), weights=(1, 2, 3))
    with pytest.raises(RecipeError, match="rank: combination=linear keeps the runs' rank"):
        run_export(one, tmp_path / "out", to_format="combined", adapters=str(two), combination="linear", rank=2)
    other, _ = exported(
        tmp_path / "c", two.parent.parent / "base", CAUSAL, method={**LORA, "rank": 2}, task={"kind": "instruction"},
        export=PLAIN,
    )  # fmt: skip
    with pytest.raises(MethodError, match="combination=linear cannot combine these adapters: "):
        run_export(one, tmp_path / "out", to_format="combined", adapters=str(other), combination="linear", rows=0)
    assert Combined(adapters="x").adapters == ("x",)
