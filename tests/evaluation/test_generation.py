"""Generation: batches change nothing, order is kept, texts end where they should, sampling follows the softmax."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from peftkit.errors import ModelError
from peftkit.evaluation import generation
from peftkit.schema.recipe import GenerationConfig
from tests.tiny import tiny_bart, tiny_gpt2, tiny_llama, tiny_t5

PROMPTS = ["the king", "a good movie about the world and the team that was best", "one", "sports game player match"]
SEQ2SEQ = {"t5": tiny_t5, "bart": tiny_bart}
CHATS = [
    [{"role": "user", "content": "hello"}],
    [{"role": "system", "content": "the best"}, {"role": "user", "content": "who is the king"}],
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tiny_llama(tmp_path_factory.mktemp("m") / "llama")
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    folder = tiny_gpt2(tmp_path_factory.mktemp("m") / "gpt2")
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def greedy_alone(model, tokenizer, ids: list[int], count: int, stops: set[int]) -> str:
    """Greedy search without cache, padding or transformers' generate."""
    model.eval()
    made: list[int] = []
    with torch.no_grad():
        while len(made) < count:
            token = int(model(input_ids=torch.tensor([ids + made])).logits[0, -1].argmax())
            if token in stops:
                break
            made.append(token)
    return tokenizer.decode(made, skip_special_tokens=True)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batched_equals_each_alone(request, name, batch_size):
    model, tokenizer = request.getfixturevalue(name)
    texts = generation.generate(model, tokenizer, PROMPTS, GenerationConfig(max_new_tokens=12), batch_size=batch_size)
    stops = {tokenizer.eos_token_id, model.generation_config.eos_token_id}
    assert texts == [greedy_alone(model, tokenizer, tokenizer(p)["input_ids"], 12, stops) for p in PROMPTS]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(("name", "penalty"), [("llama", 1.0), ("gpt2", 3.0), ("t5", 1.0), ("bart", -2.0)])
def test_beams_are_those_of_transformers(request, name, penalty, tmp_path):
    if name in SEQ2SEQ:
        folder = SEQ2SEQ[name](tmp_path)
        model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    else:
        model, tokenizer = request.getfixturevalue(name)
    config = GenerationConfig(max_new_tokens=10, num_beams=4, length_penalty=penalty)
    texts = generation.generate(model, tokenizer, PROMPTS, config, batch_size=3)
    options = {"max_new_tokens": 10, "num_beams": 4, "length_penalty": penalty, "do_sample": False}
    expected = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        output = model.generate(**ids, **options, pad_token_id=generation.stop_ids(model, tokenizer)[0])[0]
        new = output if name in SEQ2SEQ else output[ids["input_ids"].shape[1] :]
        expected.append(tokenizer.decode(new, skip_special_tokens=True))
    assert texts == expected
    greedy = generation.generate(model, tokenizer, PROMPTS, GenerationConfig(max_new_tokens=10))
    assert texts != greedy
    assert list(generation.stream(model, tokenizer, PROMPTS[0], config)) == texts[:1]


def test_a_length_penalty_and_a_repetition_penalty_hold_for_beams(llama):
    model, tokenizer = llama
    options = {"max_new_tokens": 10, "num_beams": 3}
    kinds = [{}, {"length_penalty": -20.0}, {"repetition_penalty": 3.0}]
    texts = [generation.generate(model, tokenizer, PROMPTS, GenerationConfig(**options, **one)) for one in kinds]
    assert texts[0] != texts[2]
    apart = GenerationConfig(**options, repetition_penalty=3.0)
    assert texts[2] == [generation.generate(model, tokenizer, [one], apart)[0] for one in PROMPTS]
    assert sum(map(len, texts[1])) <= sum(map(len, texts[0]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"num_beams": 2, "temperature": 0.5}, "set num_beams=1"), ({"length_penalty": 2.0}, "belongs to beam search")],
)
def test_beams_are_not_sampled(fields, message):
    with pytest.raises(ValidationError, match=message):
        GenerationConfig(**fields)


def test_conversations_are_rendered_by_the_template(llama):
    model, tokenizer = llama
    texts = generation.generate(model, tokenizer, CHATS, GenerationConfig(max_new_tokens=8), batch_size=2)
    for chat, text in zip(CHATS, texts):
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert text == greedy_alone(model, tokenizer, ids, 8, {tokenizer.eos_token_id})


def test_sampling_depends_on_the_seed_and_the_row_but_not_on_the_batch(llama):
    model, tokenizer = llama
    config = GenerationConfig(max_new_tokens=10, temperature=1.0, top_p=0.95, top_k=50, seed=3)
    together = generation.generate(model, tokenizer, PROMPTS, config, batch_size=4)
    torch.manual_seed(99)
    torch.rand(7)
    assert generation.generate(model, tokenizer, PROMPTS, config, batch_size=1) == together
    assert generation.generate(model, tokenizer, PROMPTS[:2], config, batch_size=4) == together[:2]
    other = generation.generate(model, tokenizer, PROMPTS, config.model_copy(update={"seed": 4}), batch_size=4)
    assert other != together
    twice = generation.generate(model, tokenizer, [PROMPTS[0]] * 2, config, batch_size=2)
    assert twice[0] != twice[1]


def test_sampled_tokens_follow_the_softmax():
    """Total variation between 3,000 sampled first tokens and the tempered softmax, against what chance allows."""
    scores = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5])
    processor = generation.processors(GenerationConfig(temperature=0.7, seed=1), list(range(3000)), [0] * 3000)
    drawn = processor(torch.zeros(3000, 1, dtype=torch.long), scores.repeat(3000, 1)).argmax(-1)
    share = torch.bincount(drawn, minlength=5) / 3000
    assert (share - torch.softmax(scores / 0.7, 0)).abs().sum() / 2 < 0.03


def test_top_k_and_top_p_shut_tokens_out():
    scores = torch.tensor([3.0, 2.0, 1.0, 0.0]).repeat(500, 1)
    ids = torch.zeros(500, 1, dtype=torch.long)
    for config, allowed in [
        (GenerationConfig(temperature=5.0, top_k=2), {0, 1}),
        (GenerationConfig(temperature=1.0, top_p=0.6), {0}),
    ]:
        drawn = generation.processors(config, list(range(500)), [0] * 500)(ids, scores).argmax(-1)
        assert set(Counter(drawn.tolist())) == allowed


def test_repetition_penalty_counts_text_and_not_padding():
    from transformers import RepetitionPenaltyLogitsProcessor

    processor = generation._Repetition(1.7, [0, 2])
    ids, scores = torch.tensor([[4, 5, 6], [9, 9, 5]]), torch.randn(2, 12)
    theirs = RepetitionPenaltyLogitsProcessor(1.7)
    torch.testing.assert_close(processor(ids, scores.clone())[0], theirs(ids[:1], scores[:1].clone())[0])
    torch.testing.assert_close(processor(ids, scores.clone())[1], theirs(ids[1:, 2:], scores[1:].clone())[0])


def test_text_ends_at_the_stop_token_without_it(llama, monkeypatch):
    model, tokenizer = llama
    free = generation.generate(model, tokenizer, ["the king"], GenerationConfig(max_new_tokens=12))[0]
    ids = tokenizer(free, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(generation, "stop_ids", lambda *_: [ids[3]])
    cut = generation.generate(model, tokenizer, ["the king", "one"], GenerationConfig(max_new_tokens=12))[0]
    assert cut == tokenizer.decode(ids[: ids.index(ids[3])])


def test_stream_gives_the_same_text_and_stops_when_closed(llama):
    model, tokenizer = llama
    config = GenerationConfig(max_new_tokens=15)
    pieces = list(generation.stream(model, tokenizer, CHATS[1], config))
    assert "".join(pieces) == generation.generate(model, tokenizer, [CHATS[1]], config)[0]
    long = generation.stream(model, tokenizer, CHATS[0], GenerationConfig(max_new_tokens=200))
    next(long)
    long.close()  # returns only when the thread is done; without the stop it would go on for 200 tokens


def test_an_error_in_the_thread_reaches_the_reader(llama, monkeypatch):
    model, tokenizer = llama

    def fail(*_, **__):
        raise RuntimeError("no memory")

    monkeypatch.setattr(generation, "processors", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        list(generation.stream(model, tokenizer, CHATS[0], GenerationConfig(max_new_tokens=5)))


def test_training_goes_on_as_before(llama):
    """Modes are restored, and no random number of the training's is used up."""
    model, tokenizer = llama
    model.train()
    state = torch.random.get_rng_state()
    generation.generate(model, tokenizer, PROMPTS, GenerationConfig(max_new_tokens=3, temperature=1.0))
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    model.eval()


def test_prompts_that_do_not_fit_and_no_template_are_one_message(llama, gpt2):
    model, tokenizer = llama
    with pytest.raises(ModelError, match=r"prompt 2 has \d+ tokens.*context of 256.*max_new_tokens"):
        generation.generate(model, tokenizer, ["one", "the king " * 200], GenerationConfig(max_new_tokens=8))
    with pytest.raises(ModelError, match="no chat template"):
        generation.generate(*gpt2, [CHATS[0]], GenerationConfig(max_new_tokens=8))


def test_through_an_adapter(llama):
    from peft import LoraConfig, get_peft_model

    model, tokenizer = llama
    import copy

    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules="all-linear"))
    config = GenerationConfig(max_new_tokens=8)
    expected = generation.generate(model, tokenizer, PROMPTS, config)
    assert generation.generate(wrapped, tokenizer, PROMPTS, config) == expected  # a fresh adapter changes nothing
