"""What methods need of the training loop: learning rates, penalties, calls between steps, checkpoints, prompts."""

from __future__ import annotations

import json

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file

import peftkit
from peftkit.errors import UserError
from peftkit.evaluation.generation import generate
from peftkit.models import loading, packing
from peftkit.models.kernels import linear_cross_entropy
from peftkit.models.loading import build
from peftkit.models.tokenizer import load_tokenizer
from peftkit.schema.recipe import GenerationConfig
from peftkit.schema.types import TaskInfo
from peftkit.training.optimizer import build_optimizer, parameter_groups
from tests import tiny
from tests.methods import every_method
from tests.methods.every_method import Cell

CAUSAL = TaskInfo("causal_lm")
PROMPTS = ("prompt_tuning", "prefix_tuning", "p_tuning")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny.tiny_bert(tmp_path_factory.mktemp("base") / "bert")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.tiny_llama(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture
def texts(tmp_path):
    rows = [f"{text} {number}," + ("yes" if number % 2 else "no") for number, text in enumerate(every_method.TEXTS * 8)]
    file = tmp_path / "texts.csv"
    file.write_text("text,label\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return file


def recipe_of(base, texts, tmp_path, **parts):
    fields = {
        "data": {"source": str(texts), "max_length": 32},
        "training": {"epochs": 2, "batch_size": 8, "save_every": 2, "threads": 1, "log_every": 1},
        "export": {"prove": False},
        "output_dir": str(tmp_path / "runs"),
    }
    return tiny.tiny_recipe(base, **{**fields, **parts})


def causal(llama, method, **parts):
    recipe = tiny.tiny_recipe(
        llama, method=method, task={"kind": "style"}, data={"source": "none.csv", "max_length": 64}, **parts
    )
    tokenizer = load_tokenizer(recipe.model)
    return build(recipe, CAUSAL, tokenizer), tokenizer


def moved(model):
    """Trainable weights moved away from where they start, as training would."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def test_loraplus_gives_b_the_rate_that_peft_gives_it(bert):
    method = {"kind": "lora", "rank": 4, "loraplus_lr_ratio": 16.0, "target_modules": ["query", "value"]}
    recipe = tiny.tiny_recipe(bert, method=method, training={"learning_rate": 1e-3})
    model = build(recipe, every_method.INFOS["encoder"], load_tokenizer(recipe.model)).model
    for parameter in model.classifier.parameters():
        parameter.requires_grad_(False)  # peft counts its bias among the fast ones
    names = {parameter: name for name, parameter in model.named_parameters()}

    def rates(optimizer):
        return {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}

    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    ours = build_optimizer(model, recipe)
    assert rates(ours) == rates(theirs)
    assert ours.param_groups[0]["lr"] == 1e-3  # the rate that is logged


def test_vectors_that_start_at_one_do_not_decay(bert):
    recipe = tiny.tiny_recipe(bert, method="ia3")
    model = build(recipe, every_method.INFOS["encoder"], load_tokenizer(recipe.model)).model
    decaying, still = parameter_groups(model, 0.1, recipe.method)
    assert {p.shape for p in decaying["params"]} == {(3, 32)}  # the head's matrix
    assert len(still["params"]) == 9  # four layers of two blocks, and the head's bias


def test_adalora_penalty_is_what_peft_adds_to_its_own_loss(llama):
    loaded, tokenizer = causal(llama, {"kind": "adalora", "orthogonality": 0.7})
    model, batch = moved(loaded.model), every_method.made_batch(tokenizer, "decoder")
    method = tiny.tiny_recipe(llama, method={"kind": "adalora", "orthogonality": 0.7}).method
    with_penalty = model(**batch).loss
    bare = model.get_base_model()(**batch).loss
    torch.testing.assert_close(method.penalty(model), with_penalty - bare, rtol=1e-4, atol=1e-4)
    assert tiny.tiny_recipe(llama, method={"kind": "adalora", "orthogonality": 0}).method.penalty(model) is None


def test_adalora_ends_at_its_budget(bert, texts, tmp_path):
    method = {"kind": "adalora", "target_r": 2, "init_r": 4, "prune_every": 1, "warmup": 0.1, "final": 0.2}
    training = {"epochs": 3, "batch_size": 8, "evaluate_every": 100, "threads": 1}
    parts = {"method": method, "training": training, "export": {"prove": True}}
    run = peftkit.train(recipe_of(bert, texts, tmp_path, **parts), quiet=True)
    assert json.loads((run.adapter / "proof.json").read_text())["passed"]
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    kept = [sum(ranks) for ranks in config["rank_pattern"].values()]
    assert sum(kept) == 2 * len(kept)
    values = load_file(run.adapter / "adapter_model.safetensors")
    assert sum(len(value) for name, value in values.items() if "lora_E" in name) == sum(kept)


@pytest.mark.slow
def test_adalora_resumed_is_adalora_undisturbed(bert, texts, tmp_path):
    method = {"kind": "adalora", "target_r": 2, "init_r": 4, "prune_every": 2, "warmup": 0.1, "final": 0.3}
    whole = peftkit.train(recipe_of(bert, texts, tmp_path, method=method, name="whole"), quiet=True)
    part = recipe_of(bert, texts, tmp_path, method=method, name="part")
    stopped = peftkit.train(part, quiet=True)
    for folder in sorted((stopped.path / "checkpoints").iterdir())[1:]:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    resumed = peftkit.train(part, resume=stopped.path, quiet=True)
    one, two = (load_file(run.adapter / "adapter_model.safetensors") for run in (whole, resumed))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_loftq_takes_away_what_rank_r_can_of_the_rounding(llama):
    method = {"kind": "lora", "rank": 4, "init_lora_weights": "loftq"}
    loaded, _ = causal(llama, method, quantization={"kind": "nf4"})
    layer = loaded.model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    whole = load_file(llama / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    lost = whole - dequantize_module_weight(layer.base_layer).float()
    update = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    best = torch.linalg.svdvals(lost)[4:].square().sum().sqrt()  # Eckart and Young
    torch.testing.assert_close(torch.linalg.norm(lost - update), best, rtol=1e-3, atol=1e-5)


def test_eva_looks_along_the_principal_components_of_the_inputs(llama):
    method = {"kind": "lora", "rank": 2, "init_lora_weights": "eva", "eva_rho": 1, "target_modules": ["up_proj"]}
    recipe = tiny.tiny_recipe(llama, method=method)
    loaded, tokenizer = causal(llama, method)
    batch, seen = every_method.made_batch(tokenizer, "decoder"), []
    layer = loaded.model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    handle = layer.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].detach()))
    loaded.model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    handle.remove()
    recipe.method.initialize(loaded, [batch])
    tokens = seen[0][batch["attention_mask"].bool()]
    _, _, right = torch.linalg.svd(tokens - tokens.mean(0), full_matrices=False)
    a = loaded.model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").lora_A["default"].weight
    assert a.requires_grad
    assert torch.linalg.svdvals(a.detach() @ right[:2].T).min() > 0.95


@pytest.mark.parametrize("kind", [*PROMPTS, "trainable_tokens"])
def test_our_loss_and_gradients_are_those_of_the_model_itself(llama, kind):
    arguments = {"tokens": ["a", "b", "o"]} if kind == "trainable_tokens" else {"virtual_tokens": 3}
    loaded, tokenizer = causal(llama, {"kind": kind, **arguments})
    model, batch = moved(loaded.model), every_method.made_batch(tokenizer, "decoder")
    batch["labels"][:, 0] = -100  # peft scores a row's first token after a prompt; without one it cannot be scored
    trained = [p for p in model.parameters() if p.requires_grad]
    theirs = model(**batch).loss
    scored = (linear_cross_entropy.scored(batch) != -100).sum()
    ours = linear_cross_entropy.loss(model, batch) / scored
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for one, two in zip(torch.autograd.grad(ours, trained), torch.autograd.grad(theirs, trained), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", PROMPTS)
def test_text_under_a_learned_prompt_is_the_likeliest_step_by_step(llama, kind):
    loaded, tokenizer = causal(llama, {"kind": kind, "virtual_tokens": 3})
    model = moved(loaded.model)
    prompts = ["good movie", "the bank and the price of oil", "a game and"]
    config = GenerationConfig(max_new_tokens=6)
    together = generate(model, tokenizer, prompts, config, batch_size=4)
    stops = {tokenizer.eos_token_id, model.get_base_model().generation_config.eos_token_id}
    for prompt, text in zip(prompts, together, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        new = []
        for _ in range(6):
            row = torch.tensor([ids + new])
            with torch.no_grad():
                new.append(int(model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0, -1].argmax()))
            if new[-1] in stops:
                break
        assert text == tokenizer.decode([token for token in new if token not in stops], skip_special_tokens=True)


def test_rows_with_a_learned_prompt_are_not_packed(llama):
    loaded, _ = causal(llama, {"kind": "prompt_tuning"})
    able, reason = packing.supports_packing(loaded.model)
    assert not able
    assert "learned prompt" in reason


@pytest.mark.parametrize("kind", PROMPTS)
def test_the_baseline_before_training_is_the_base_and_not_a_random_prompt(llama, texts, tmp_path, kind):
    task = {"kind": "style", "packing": False}  # as is done for learned prompts
    parts = {"task": task, "evaluation": {"generation": {"samples": 1, "max_new_tokens": 4}}}
    one = peftkit.train(
        recipe_of(llama, texts, tmp_path, method={"kind": kind, "virtual_tokens": 4}, **parts), quiet=True
    )
    two = peftkit.train(recipe_of(llama, texts, tmp_path, method="lora", **parts), quiet=True)
    assert one.metrics["zero_shot"]["loss"] == pytest.approx(two.metrics["zero_shot"]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"method": {"kind": "prompt_tuning"}, "model": {"pooling": "mean"}}, "pooling=own"),
        ({"method": {"kind": "prefix_tuning"}, "training": {"gradient_checkpointing": "full"}}, "checkpoint"),
        ({"method": {"kind": "prompt_tuning"}, "export": {"merge": True}}, "changes no weight"),
        ({"method": {"kind": "lora", "init_lora_weights": "loftq"}, "quantization": {"kind": "int8"}}, "kind=nf4"),
        ({"method": {"kind": "lora", "use_dora": True}, "quantization": {"kind": "int8"}}, "norms"),
        ({"method": {"kind": "miss", "variant": "bat"}, "quantization": {"kind": "nf4"}}, "variant=balance"),
        ({"method": {"kind": "adalora", "init_r": 4, "target_r": 8}}, "init_r"),
        ({"method": {"kind": "peft", "peft_type": "LOHAA"}}, "LOHA"),
        ({"method": {"kind": "peft", "peft_type": "LOHA", "arguments": {"aplha": 3}}}, "alpha"),
        ({"method": {"kind": "peft", "peft_type": "LOHA"}, "quantization": {"kind": "nf4"}}, "needs unquantized"),
        ({"method": {"kind": "peft", "peft_type": "ADALORA"}}, "method.kind=adalora"),
        ({"method": {"kind": "peft", "peft_type": "POLY"}}, "task"),
        ({"method": {"kind": "peft", "peft_type": "CARTRIDGE"}, "export": {"merge": True}}, "changes no weight"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(parts, said):
    with pytest.raises(UserError, match=said):
        tiny.tiny_recipe("nowhere", **parts)


def test_what_the_architecture_cannot_take_is_refused_before_its_weights_are_read(bert, llama, tmp_path, monkeypatch):
    def read(*_):
        raise AssertionError("the weights were read")

    monkeypatch.setattr(loading, "_from_pretrained", read)

    def refused(folder, method):
        recipe = tiny.tiny_recipe(folder, method=method, data={"source": "none.csv", "max_length": 64})
        with pytest.raises(UserError) as error:
            build(recipe, every_method.INFOS["encoder"], load_tokenizer(recipe.model))
        return str(error.value)

    assert "last token" in refused(llama, "prompt_tuning")
    assert "quantization.kind=nf4" in refused(llama, {"kind": "lora", "init_lora_weights": "loftq"})
    assert "does not accept" in refused(tiny.tiny_distilbert(tmp_path / "distil"), "prefix_tuning")
    recipe = tiny.tiny_recipe(bert, method="p_tuning", data={"source": "none.csv", "max_length": 128})
    with pytest.raises(UserError, match="at most 108"):
        build(recipe, every_method.INFOS["encoder"], load_tokenizer(recipe.model))


@pytest.mark.parametrize(
    ("kind", "one", "other"),
    [
        ("ia3", {}, {"target_modules": ["query"], "feedforward_modules": ["query"]}),
        ("oft", {"block_share": False}, {"block_share": True}),
        ("oft", {"constrained": True, "eps": 1e-5}, {"constrained": True, "eps": 1e-2}),
        ("oft", {"neumann_terms": 2}, {"neumann_terms": 0}),
        ("oft", {"block_size": 8}, {"block_size": 4}),
        ("boft", {"block_size": 4}, {"block_size": 8}),
        ("miss", {"rank": 4}, {"rank": 8}),
        ("miss", {"rank": 4, "variant": "mini"}, {"rank": 4, "variant": "mini", "mini_rank": 2}),
        ("vera", {"rank": 4}, {"rank": 8}),
        ("vera", {"d_initial": 0.1}, {"d_initial": 0.3}),
        ("vera", {"projection_seed": 0}, {"projection_seed": 1}),
        ("adalora", {"alpha": 4}, {"alpha": 8}),
        ("prompt_tuning", {"init": "random"}, {"init": "vocabulary"}),
        ("prompt_tuning", {"init_text": "good"}, {"init_text": "bad plot"}),
        ("prefix_tuning", {"init": "zero"}, {"init": "random"}),
        ("prefix_tuning", {"projection": False}, {"projection": True}),
        ("prefix_tuning", {"projection": True}, {"projection": True, "projection_size": 16}),
        ("p_tuning", {"encoder": "mlp"}, {"encoder": "lstm"}),
        ("p_tuning", {"encoder": "lstm"}, {"encoder": "lstm", "encoder_layers": 1}),
        ("p_tuning", {"encoder_size": 16}, {"encoder_size": 8}),
        ("p_tuning", {"virtual_tokens": 4}, {"virtual_tokens": 5}),
        ("lora", {"rank": 4}, {"rank": 4, "layers": -1}),
        ("vera", {"rank": 4}, {"rank": 4, "layers": -1}),
        ("vera", {"rank": 4}, {"rank": 4, "exclude_modules": ["query"]}),
        ("vera", {"rank": 4}, {"rank": 4, "target_modules": ["query"]}),
    ],
)
def test_each_field_changes_what_is_trained(bert, kind, one, other):
    def trained(arguments):
        recipe = tiny.tiny_recipe(
            bert, method={"kind": kind, **arguments}, data={"source": "none.csv", "max_length": 64}
        )
        loaded = build(recipe, every_method.INFOS["encoder"], load_tokenizer(recipe.model))
        model = moved(loaded.model)
        batch = every_method.made_batch(loaded.tokenizer, "encoder")
        with torch.no_grad():
            return {n: p.shape for n, p in model.named_parameters() if p.requires_grad}, model(**batch).logits

    shapes, logits = trained(one)
    other_shapes, other_logits = trained(other)
    assert shapes != other_shapes or not torch.allclose(logits, other_logits, atol=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU multiplies butterfly factors")
def test_butterfly_factors_are_not_dropped_in_silence(bert):
    recipe = tiny.tiny_recipe(bert, method={"kind": "boft", "butterfly_factor": 2})
    with pytest.raises(UserError, match="CUDA"):
        build(recipe, every_method.INFOS["encoder"], load_tokenizer(recipe.model))


@pytest.mark.parametrize(("kind", "size"), [("adalora", {}), ("vera", {}), ("boft", {}), ("miss", {"rank": 4})])
def test_dropout_is_on_in_training(bert, kind, size):
    recipe = tiny.tiny_recipe(bert, method={"kind": kind, "dropout": 0.5, **size}, model={"dropout": 0.0})
    loaded = build(recipe, every_method.INFOS["encoder"], load_tokenizer(recipe.model))
    model, batch = moved(loaded.model), every_method.made_batch(loaded.tokenizer, "encoder")
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, model(**batch).logits)
        model.train()
        assert not torch.equal(model(**batch).logits, model(**batch).logits)


def test_p_tuning_s_dropout_is_its_lstm_s(bert):
    recipe = tiny.tiny_recipe(bert, method={"kind": "p_tuning", "encoder": "lstm", "encoder_dropout": 0.5},
                              data={"source": "none.csv", "max_length": 64})  # fmt: skip
    loaded = build(recipe, every_method.INFOS["encoder"], load_tokenizer(recipe.model))
    assert loaded.model.prompt_encoder["default"].lstm_head.dropout == 0.5


def test_vera_s_matrices_are_left_out_of_the_file_when_asked(bert, tmp_path):
    for save, expected in ((True, True), (False, False)):
        recipe = tiny.tiny_recipe(bert, method={"kind": "vera", "rank": 4, "save_projection": save})
        loaded = build(recipe, every_method.INFOS["encoder"], load_tokenizer(recipe.model))
        loaded.model.save_pretrained(tmp_path / str(save))
        names = load_file(tmp_path / str(save) / "adapter_model.safetensors")
        assert any("vera_A" in name for name in names) == expected


def test_trained_tokens_are_named_or_the_special_ones(llama):
    _, tokenizer = causal(llama, "trainable_tokens")
    for tokens, ids in (("special", sorted(tokenizer.all_special_ids)), (["a", 7], None)):
        loaded, _ = causal(llama, {"kind": "trainable_tokens", "tokens": tokens})
        config = loaded.model.peft_config["default"]
        assert config.trainable_token_indices == (ids or sorted([7, tokenizer.get_vocab()["a"]]))
    with pytest.raises(UserError, match=r"<\|im_start\|>"):
        causal(llama, {"kind": "trainable_tokens", "tokens": ["<|im_strat|>"]})


def test_adalora_phases_are_shares_of_the_run(llama):
    loaded, _ = causal(llama, {"kind": "adalora", "warmup": 0.2, "final": 0.5, "beta1": 0.5, "beta2": 0.6})
    method = tiny.tiny_recipe(llama, method={"kind": "adalora", "warmup": 0.2, "final": 0.5}).method
    method.on_train_begin(loaded.model, 100)
    config = loaded.model.peft_config["default"]
    assert (config.total_step, config.tinit, config.tfinal) == (100, 20, 50)
    allocator = loaded.model.base_model.rankallocator
    assert (allocator.beta1, allocator.beta2) == (0.5, 0.6)


def test_any_method_of_peft_by_name_and_override(bert):
    from peftkit.schema import overrides

    recipe = overrides.apply(
        tiny.tiny_recipe(bert), ["method.kind=peft", "method.peft_type=hra", "method.arguments={r: 4}"]
    )
    model = build(recipe, every_method.INFOS["encoder"], load_tokenizer(recipe.model)).model
    assert any(p.shape == (32, 4) for n, p in model.named_parameters() if "hra_u" in n)
    for kind in ("adalora", "vera"):
        assert overrides.apply(tiny.tiny_recipe(bert), [f"method={kind}"]).method.kind == kind
    assert Cell("vera", "encoder", None).recipe(bert).method.rank == 8


@pytest.mark.parametrize("example", ["trainable_tokens", "peft-LOHA"])  # the others are recipes, run as such
def test_a_whole_run_is_loaded_again_and_predicts_what_it_predicted(bert, texts, tmp_path, example):
    method = {"kind": example.partition("-")[0], **every_method.EXAMPLES[example].arguments}
    run = peftkit.train(recipe_of(bert, texts, tmp_path, method=method), quiet=True)
    lines = [json.loads(line) for line in (run.path / "predictions" / "test.jsonl").read_text().splitlines()]
    found = peftkit.load(run.path).predict([line["text"] for line in lines])
    assert [one.label for one in found] == [line["predicted"] for line in lines]


@pytest.mark.parametrize("kind", ["prefix_tuning", "prompt_tuning"])
def test_a_language_model_under_a_prompt_is_proven(llama, texts, tmp_path, kind):
    recipe = recipe_of(
        llama, texts, tmp_path, method={"kind": kind, "virtual_tokens": 4}, task={"kind": "style"},
        export={"prove": True}, evaluation={"generation": {"samples": 0}},
    )  # fmt: skip
    run = peftkit.train(recipe, quiet=True)
    assert json.loads((run.adapter / "proof.json").read_text())["passed"]
