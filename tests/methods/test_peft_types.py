"""``kind: peft``: every type that peft registers, and the options that need more than a forward and a backward pass."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from peft import AdamssConfig, get_peft_model
from peft.helpers import MontecloraTrainerMixin
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import peftkit
from peftkit.errors import UserError
from peftkit.methods.peft import UNSUPPORTED
from peftkit.models.loading import build
from peftkit.models.tokenizer import load_tokenizer
from tests import tiny
from tests.methods import every_method, peft_types
from tests.methods.peft_types import MODELS, TYPES, Case

PAGE = Path(__file__).parents[2] / "docs" / "peft_types.md"
KASA = {"r": 4, "kasa_config": {"beta": 0.1, "gamma": 0.01}}
MONTECLORA = {"r": 4, "monteclora_config": {"num_samples": 3, "kl_loss_weight": 1e-3}}
ASA = {
    "num_subspaces": 3, "use_asa": True, "asa_target_subspaces": 9, "init_warmup": 1, "final_warmup": 4,
    "mask_interval": 2,
}  # fmt: skip
OPTIONS = [("LORA", KASA), ("LORA", MONTECLORA), ("LORA", {"velora_config": {"num_groups": 4}}), ("ADAMSS", ASA)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return peft_types.bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def walked(folders, tmp_path_factory):
    def walk(case):
        return peft_types.walk(case, folders[case.model], tmp_path_factory.mktemp("case"))

    return functools.cache(walk)


@pytest.mark.slow
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("model", MODELS)
def test_every_type_is_trained_or_refused(walked, name, model):
    peft_types.check(walked(Case(name, model)))


@pytest.mark.slow
def test_the_page_says_what_every_type_did(walked):
    found = {(name, model): walked(Case(name, model)) for name in TYPES for model in MODELS}
    assert PAGE.read_text(encoding="utf-8").endswith(peft_types.table(found))


def test_the_page_has_every_type_and_refuses_those_that_recipes_cannot_express():
    rows = {line.split("`")[1]: line for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:3] == "| `"}
    assert sorted(rows) == TYPES
    assert {name for name, row in rows.items() if row.count("refused") == 2} == set(UNSUPPORTED)


@pytest.mark.parametrize("case", [Case(name, "decoder", options) for name, options in OPTIONS], ids=str)
def test_options_that_act_between_steps_are_trained_and_come_back(walked, case):
    found = walked(case)
    assert not found.refused
    peft_types.check(found)


def model_of(folders, peft_type, options):
    recipe = Case(peft_type, "decoder", options).recipe(folders["decoder"])
    tokenizer = load_tokenizer(recipe.model)
    loaded = build(recipe, every_method.INFOS["decoder"], tokenizer)
    return recipe.method, loaded.model, every_method.made_batch(tokenizer, "decoder")


def test_kasa_adds_the_two_terms_of_its_paper(folders):
    method, model, _ = model_of(folders, "LORA", KASA)
    expected = 0.0
    for layer in model.modules():
        if hasattr(layer, "lora_diag"):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            eye = torch.eye(4)
            expected += 0.1 * layer.lora_diag["default"].square().sum()
            expected += 0.01 * (torch.linalg.norm(b.T @ b - eye) + torch.linalg.norm(a @ a.T - eye))
    torch.testing.assert_close(method.penalty(model), expected)


def test_monteclora_adds_what_peft_adds_to_a_trainers_loss(folders):
    method, model, batch = model_of(folders, "LORA", MONTECLORA)

    class Plain:
        def compute_loss(self, model, inputs, return_outputs=False):
            return model(**inputs).loss

    class Trainer(MontecloraTrainerMixin, Plain):
        pass

    method.on_train_begin(model, 10)  # the noise of the adapter's making is never used
    torch.manual_seed(1)
    theirs = Trainer().compute_loss(model.train(), batch)
    torch.manual_seed(1)
    ours = model(**batch).loss + method.penalty(model)
    assert method.penalty(model).requires_grad
    torch.testing.assert_close(ours, theirs)


def test_a_type_without_a_loss_of_its_own_has_no_penalty(folders):
    method, model, _ = model_of(folders, "LORA", {"r": 4})
    assert method.penalty(model) is None


def test_adamss_prunes_as_peft_does_in_a_plain_loop(folders, walked):
    ours = walked(Case("ADAMSS", "decoder", ASA)).made
    base = AutoModelForCausalLM.from_pretrained(folders["decoder"])
    targets = ours.loaded.model.peft_config["default"].target_modules
    arguments = {**peft_types.ARGUMENTS["ADAMSS"], **ASA, "target_modules": targets}
    torch.manual_seed(0)
    theirs = get_peft_model(base, AdamssConfig(task_type="CAUSAL_LM", **arguments))
    start = dict(model_of(folders, "ADAMSS", ASA)[1].named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(start[name])
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=2e-2, weight_decay=0.0)
    scored = (ours.batch["labels"][:, 1:] != -100).sum()
    for step in range(every_method.STEPS):
        theirs.train()
        (theirs(**ours.batch).loss * scored / len(ours.batch["labels"])).backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()
    pruned = {name for name, p in theirs.named_parameters() if ".adamss_" in name and not p.requires_grad}
    assert 0 < len(pruned) < sum(".adamss_" in name for name in start)
    state = ours.recipe.method.state(ours.loaded.model)
    assert {f"base_model.{name.partition('/')[2]}" for name in state if name.startswith("pruned")} == pruned
    found = dict(ours.loaded.model.named_parameters())
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(found[name], parameter, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("peft_type", "options"),
    [pytest.param("ADAMSS", ASA, id="asa", marks=pytest.mark.slow), pytest.param("LORA", MONTECLORA, id="monteclora")],
)
def test_resumed_it_is_the_undisturbed_run(folders, tmp_path, peft_type, options):
    rows = [f"{text} {number}," + ("yes" if number % 2 else "no") for number, text in enumerate(every_method.TEXTS * 8)]
    file = tmp_path / "texts.csv"
    file.write_text("text,label\n" + "\n".join(rows) + "\n", encoding="utf-8")

    def recipe(name):
        return Case(peft_type, "encoder", options).recipe(
            folders["encoder"], name=name, data={"source": str(file), "max_length": 32},
            training={"epochs": 2, "batch_size": 8, "save_every": 2, "threads": 1}, export={"prove": False},
            output_dir=str(tmp_path / "runs"),
        )  # fmt: skip

    undisturbed = peftkit.train(recipe("undisturbed"), quiet=True)
    stopped = peftkit.train(recipe("stopped"), quiet=True)
    for folder in sorted((stopped.path / "checkpoints").iterdir())[1:]:
        for one in folder.iterdir():
            one.unlink()
        folder.rmdir()
    resumed = peftkit.train(recipe("stopped"), resume=stopped.path, quiet=True)
    # the last step's weights: those exported may be the best of an earlier one
    one, two = (
        load_file(max((run.path / "checkpoints").iterdir()) / "model.safetensors") for run in (undisturbed, resumed)
    )
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("method", "parts", "said"),
    [
        ({"peft_type": "CPT"}, {}, "CPT computes a loss of its own"),
        ({"peft_type": "SHADOW"}, {}, "SHADOW trains a second network"),
        ({"peft_type": "TRAINABLE_TOKENS"}, {}, "use method.kind=trainable_tokens"),
        ({"peft_type": "ADAPTION_PROMPT"}, {}, "neither trains nor saves a new head"),
        ({"peft_type": "LILY"}, {"export": {"merge": True}}, "cannot merge LILY"),
        ({"arguments": {"init_lora_weights": "eva"}}, {}, "init_lora_weights=eva"),
        ({"arguments": {"init_lora_weights": "corda"}}, {}, "needs a pass over data"),
        ({"arguments": {"use_qalora": True}}, {}, r"arguments\.use_qalora"),
        ({"arguments": {"alora_invocation_tokens": [1]}}, {}, r"arguments\.alora_invocation_tokens"),
        ({"arguments": {"layer_replication": [[0, 2], [1, 2]]}}, {}, r"arguments\.layer_replication"),
        ({"arguments": MONTECLORA}, {"training": {"gradient_checkpointing": "full"}}, "gradient_checkpointing=off"),
        ({"arguments": {"monteclora_config": {"buffer_size": 8}}}, {}, "buffer_size=8"),
        ({"arguments": {"monteclora_config": {"bufer_size": 8}}}, {}, "bufer_size"),
        ({"arguments": {"kasa_config": {"betta": 8}}}, {}, "betta"),
    ],
)  # fmt: skip
def test_what_cannot_have_its_effect_is_refused_by_name(method, parts, said):
    with pytest.raises(UserError, match=said):
        tiny.tiny_recipe("nowhere", method={"kind": "peft", "peft_type": "LORA", **method}, **parts)


def test_a_new_type_that_allocates_between_steps_is_refused(monkeypatch):
    from peft.tuners.loha import LoHaModel

    monkeypatch.setattr(LoHaModel, "update_and_allocate", lambda self, step: None, raising=False)
    with pytest.raises(UserError, match="LOHA allocates parameters between steps"):
        tiny.tiny_recipe("nowhere", method={"kind": "peft", "peft_type": "LOHA"})
