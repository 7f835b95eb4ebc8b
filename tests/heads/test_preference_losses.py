"""Losses over preferences against their formulas in plain torch, over transformers' own full logits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from peftkit.errors import RecipeError
from peftkit.evaluation.direction import greater_is_better
from peftkit.heads.preference_losses import LOSSES, MARKS, PAIRS
from peftkit.schema.recipe import DataConfig, EvaluationConfig
from peftkit.schema.registries import HEADS
from peftkit.schema.types import TaskInfo
from peftkit.tasks.preference import Preference
from tests.tiny import tiny_llama, tiny_recipe

PAIR_ROWS = [
    ("hello you", "good king and lord", "bad"),
    ("what is the bank", "money", "the awful film of the day"),
    ("who was the king", "the good lord said hello", "no"),
    ("new film", "great actor and great plot", "terrible movie but fine actor"),
]
MARK_ROWS = [("hello you", "good king and lord", True), ("what is the bank", "the awful film", False),
             ("who was the king", "the good lord said hello", True)]  # fmt: skip
CASES = {
    "dpo": [{}, {"beta": 0.5}, {"label_smoothing": 0.2}, {"nll_weight": 0.7}],
    "ipo": [{}, {"beta": 0.5}, {"nll_weight": 0.7}],
    "hinge": [{}, {"beta": 0.02}, {"nll_weight": 0.7}],
    "orpo": [{}, {"beta": 0.5}, {"nll_weight": 0.0}],
    "simpo": [{}, {"beta": 0.5}, {"gamma": 0.3}, {"label_smoothing": 0.2}, {"nll_weight": 0.7}],
    "cpo": [{}, {"beta": 0.5}, {"label_smoothing": 0.2}, {"nll_weight": 0.0}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def models(folder):
    """The model in training and the one before it, which differ."""
    policy, before = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return policy, before


def turn(role, text):
    return {"role": role, "content": text}


def examples(folder, loss):
    task, tokenizer = Preference(loss=loss), AutoTokenizer.from_pretrained(folder)
    if task.loss.head == PAIRS:
        rows = {
            "messages": [[turn("user", prompt)] for prompt, _, _ in PAIR_ROWS],
            "chosen": [[turn("assistant", text)] for _, text, _ in PAIR_ROWS],
            "rejected": [[turn("assistant", text)] for _, _, text in PAIR_ROWS],
        }
    else:
        rows = {
            "messages": [[turn("user", prompt)] for prompt, _, _ in MARK_ROWS],
            "answer": [[turn("assistant", text)] for _, text, _ in MARK_ROWS],
            "desirable": [good for _, _, good in MARK_ROWS],
        }
    info = TaskInfo(task.loss.head)
    columns = task.encode(rows, tokenizer, DataConfig(source="unused", max_length=128), info)
    return HEADS.get(info.problem_type)(info, **task.head_options(info)), columns, tokenizer


def log_probability(model, prompt, answer, tokenizer):
    """log p of an answer and its stop token after a prompt, and the number of these tokens, from the full logits."""
    start = tokenizer.apply_chat_template([turn("user", prompt)], add_generation_prompt=True, tokenize=False)
    start = tokenizer(start, add_special_tokens=False)["input_ids"]
    ids = [*start, *tokenizer(answer + "<|im_end|>", add_special_tokens=False)["input_ids"]]
    logits = model(torch.tensor([ids])).logits[0, :-1]
    logps = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[len(start) - 1 :]
    return logps.sum(), len(logps)


def formula(kind, policy, before, tokens, *, beta=None, label_smoothing=0.0, nll_weight=None, gamma=1.0):
    """The loss of one pair, as in the papers; log-probabilities of (chosen, rejected)."""
    beta = beta if beta is not None else {"simpo": 2.0}.get(kind, 0.1)
    nll_weight = nll_weight if nll_weight is not None else {"orpo": 1.0, "cpo": 1.0}.get(kind, 0.0)
    mean = [value / count for value, count in zip(policy, tokens)]
    ratio = [now - then for now, then in zip(policy, before)]
    if kind == "ipo":
        loss = (ratio[0] / tokens[0] - ratio[1] / tokens[1] - 1 / (2 * beta)) ** 2
    elif kind == "hinge":
        loss = torch.clamp(1 - beta * (ratio[0] - ratio[1]), min=0)
    elif kind == "orpo":
        odds = [torch.exp(value) / (1 - torch.exp(value)) for value in mean]
        loss = -beta * torch.log(torch.sigmoid(torch.log(odds[0] / odds[1])))
    else:
        margin = {
            "dpo": beta * (ratio[0] - ratio[1]), "cpo": beta * (policy[0] - policy[1]),
            "simpo": beta * (mean[0] - mean[1]) - gamma,
        }[kind]  # fmt: skip
        sign = torch.log(torch.sigmoid(margin)), torch.log(torch.sigmoid(-margin))
        loss = -(1 - label_smoothing) * sign[0] - label_smoothing * sign[1]
    return loss - nll_weight * mean[0]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def batch_of(head, columns, tokenizer, before, rows=slice(None)):
    chosen = {name: values[rows] for name, values in columns.items()}
    batch = head.collate(chosen, tokenizer)
    with torch.no_grad():
        stored = head.reference_outputs(before, batch, "own")
    return {**batch, **{name: tensor.double() for name, tensor in stored.items()}}


@pytest.mark.parametrize(("kind", "fields"), [(kind, fields) for kind, every in CASES.items() for fields in every])
def test_a_loss_over_pairs_is_its_formula(kind, fields, folder, models):
    policy, before = models
    head, columns, tokenizer = examples(folder, {"kind": kind, **fields})
    expected = policy.lm_head.weight.new_zeros(())
    for prompt, *answers in PAIR_ROWS:
        now, then = ([log_probability(m, prompt, answer, tokenizer) for answer in answers] for m in (policy, before))
        tokens = [count for _, count in now]
        then = [value.detach() for value, _ in then]
        expected = expected + formula(kind, [value for value, _ in now], then, tokens, **fields)
    wanted = gradients(policy, expected)
    # cut anywhere, the sum is the same
    batches = [batch_of(head, columns, tokenizer, before, rows) for rows in (slice(0, 1), slice(1, 4))]
    parts = [head.loss(policy, batch, "own") for batch in batches]
    torch.testing.assert_close(sum(parts), expected, rtol=1e-6, atol=1e-6)
    found = gradients(policy, sum(parts))
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "fields", [{}, {"beta": 0.5}, {"desirable_weight": 2.0}, {"undesirable_weight": 1.5}], ids=lambda f: str(f)
)
def test_kto_is_its_formula_with_the_other_rows_answers_as_reference_point(fields, folder, models):
    policy, before = models
    head, columns, tokenizer = examples(folder, {"kind": "kto", **fields})
    beta = fields.get("beta", 0.1)
    ratios, others = [], []
    for number, (prompt, answer, _) in enumerate(MARK_ROWS):
        for of, text in ((ratios, answer), (others, MARK_ROWS[number - 1][1])):
            now, then = (log_probability(model, prompt, text, tokenizer)[0] for model in (policy, before))
            of.append(now - then.detach())
    point = torch.clamp(torch.stack(others).detach().mean(), min=0)
    expected = sum(
        fields.get("desirable_weight", 1.0) * (1 - torch.sigmoid(beta * (ratio - point)))
        if good
        else fields.get("undesirable_weight", 1.0) * (1 - torch.sigmoid(beta * (point - ratio)))
        for ratio, (_, _, good) in zip(ratios, MARK_ROWS)
    )
    wanted = gradients(policy, expected)
    batches = [batch_of(head, columns, tokenizer, before, rows) for rows in (slice(0, 2), slice(2, 3))]
    with torch.no_grad():
        sums = sum(head.batch_sums(policy, batch, "own") for batch in batches)
    assert float(sums[0] / sums[1]) == pytest.approx(float(torch.stack(others).detach().mean()), abs=1e-5)
    parts = [head.loss(policy, {**batch, "batch_sums": sums}, "own") for batch in batches]
    torch.testing.assert_close(sum(parts), expected, rtol=1e-6, atol=1e-6)
    found = gradients(policy, sum(parts))
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-6, msg=name)
    # of a whole split, evaluation knows the same point
    with torch.no_grad():
        outputs = {
            n: t.numpy() for n, t in head.outputs(policy, batch_of(head, columns, tokenizer, before), "own").items()
        }
    outputs = head.complete(outputs)
    assert outputs["loss"].sum() == pytest.approx(float(expected.detach()), abs=1e-5)
    metrics = head.metrics(outputs, EvaluationConfig())
    assert metrics["kl"] == pytest.approx(float(point), abs=1e-5)


def test_measures_and_metrics_are_what_they_are_called(folder, models):
    policy, before = models
    head, columns, tokenizer = examples(folder, "dpo")
    now, then = (
        np.array(
            [[float(log_probability(m, p, answer, tokenizer)[0].detach()) for answer in two] for p, *two in PAIR_ROWS]
        )
        for m in (policy, before)
    )
    batch = batch_of(head, columns, tokenizer, before)
    with torch.no_grad():
        outputs = {name: tensor.numpy() for name, tensor in head.outputs(policy, batch, "own").items()}
        _, measured = head.loss_and_measures(policy, batch, "own")
    rewards = 0.1 * (now - then)
    wanted = {
        "reward_accuracy": (rewards[:, 0] > rewards[:, 1]).mean(), "reward_margin": np.diff(-rewards).mean(),
        "chosen_reward": rewards[:, 0].mean(), "rejected_reward": rewards[:, 1].mean(),
        "chosen_logprob": now[:, 0].mean(), "rejected_logprob": now[:, 1].mean(),
        "chosen_change": (now - then)[:, 0].mean(), "rejected_change": (now - then)[:, 1].mean(),
    }  # fmt: skip
    metrics = head.metrics(outputs, EvaluationConfig())
    for name, value in wanted.items():
        assert metrics[name] == pytest.approx(value, abs=1e-4), name
    logged = dict(zip(head.measures, (measured[:, 0] / measured[:, 1]).tolist()))
    assert logged == pytest.approx({name: wanted[name] for name in head.measures}, abs=1e-4)
    statistics = head.statistics(outputs)
    assert statistics(np.array([2, 2]))["reward_margin"] == pytest.approx(rewards[2, 0] - rewards[2, 1], abs=1e-4)
    assert metrics["kl_per_token"] > 0
    same = batch_of(head, columns, tokenizer, policy)
    with torch.no_grad():
        outputs = {name: tensor.numpy() for name, tensor in head.outputs(policy, same, "own").items()}
    still = head.metrics(outputs, EvaluationConfig())
    assert still["kl_per_token"] == pytest.approx(0, abs=1e-9)
    assert still["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_kl_per_token_is_schulmans_second_estimate(folder, models):
    policy, before = models
    head, columns, tokenizer = examples(folder, "dpo")
    batch = batch_of(head, columns, tokenizer, before)
    logps = []
    for model in models:
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        every = -F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        logps.append(every[labels.flatten() != -100].detach())
    with torch.no_grad():
        outputs = {name: tensor.numpy() for name, tensor in head.outputs(policy, batch, "own").items()}
    wanted = float(((logps[0] - logps[1]) ** 2 / 2).mean())
    assert head.metrics(outputs, EvaluationConfig())["kl_per_token"] == pytest.approx(wanted, rel=1e-3)


def test_both_answers_falling_is_reported_and_one_is_not():
    head = HEADS.get(PAIRS)(TaskInfo(PAIRS))
    ((event, message),) = head.warnings({"chosen_change": -2.0, "rejected_change": -7.5})
    assert event == "likelihood_displacement"
    assert "2.0" in message
    assert "task.loss.nll_weight" in message
    assert not head.warnings({"chosen_change": 1.0, "rejected_change": -7.5})
    assert not head.warnings({})
    kto = HEADS.get(MARKS)(TaskInfo(MARKS))
    assert "nll_weight" not in kto.warnings({"chosen_change": -2.0, "rejected_change": -7.5})[0][1]


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        ("dop", "task.loss: unknown preference loss 'dop': did you mean 'dpo'"),
        ({"kind": "dpo", "gamma": 1}, "task.loss: unknown field 'gamma'"),
        ({"kind": "dpo", "beta": 0}, "task.loss.beta: input should be greater than 0"),
        ({"kind": "dpo", "label_smoothing": 0.5}, "label_smoothing: input should be less than 0.5"),
        ({"beta": 1}, "expected a mapping with 'kind'"),
    ],
)
def test_a_wrong_loss_is_one_message(loss, said):
    with pytest.raises(RecipeError) as refused:
        tiny_recipe("m", task={"kind": "preference", "loss": loss})
    assert said in str(refused.value)


def test_what_should_fall_is_better_smaller():
    names = ("kl_per_token", "rejected_reward", "chosen_reward", "reward_margin")
    assert [greater_is_better(name) for name in names] == [False, False, True, True]


def test_every_loss_says_what_it_is():
    assert set(LOSSES) == {*CASES, "kto"}
    for name, summary in LOSSES.summaries().items():
        assert len(summary) > 30, name
