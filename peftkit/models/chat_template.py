"""Chat templates: named ones for a base that has none, and what must be known of any before labels are made with it.

A template is only ever rendered by transformers (``apply_chat_template``). What is read off a rendering is where the
text of a turn ends and how: ``read`` renders a probe whose assistant turn is known, so that stop token and trailing
text are found by position and not by searching rows for marker strings.

    install(tokenizer, "plain")          # a base without a template
    style = read(tokenizer)              # style.stop == "<|im_end|>", style.after == "\\n"
    prompt_text(tokenizer, [{"role": "user", "content": "Hello"}])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from peftkit.errors import ModelError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]
GENERATE = "{% if add_generation_prompt %}"
NAMED = {
    # ChatML (OpenAI 2023); its two markers must be tokens of the vocabulary
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}" + GENERATE + "{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    # Llama 2 (Touvron et al. 2023, arXiv:2307.09288): the system prompt stands inside the first user turn
    "llama2": (
        "{% set first = namespace(system='') %}{% for message in messages %}"
        "{% if message['role'] == 'system' %}"
        "{% set first.system = '<<SYS>>\\n' + message['content'] + '\\n<</SYS>>\\n\\n' %}"
        "{% elif message['role'] == 'user' %}"
        "{{ (bos_token or '') + '[INST] ' + first.system + message['content'] + ' [/INST]' }}"
        "{% set first.system = '' %}"
        "{% else %}{{ ' ' + message['content'] + ' ' + (eos_token or '') }}{% endif %}{% endfor %}"
    ),
    # Zephyr (Tunstall et al. 2023, arXiv:2310.16944): turns end with the tokenizer's own end-of-text token
    "zephyr": (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] }}"
        "{{ (eos_token or '') + '\\n' }}{% endfor %}" + GENERATE + "{{ '<|assistant|>\\n' }}{% endif %}"
    ),
    # words that any tokenizer has; only answers end with the end-of-text token
    "plain": (
        "{% for message in messages %}{{ '### ' + message['role'].capitalize() + ':\\n' + message['content'] }}"
        "{{ ((eos_token or '') if message['role'] == 'assistant' else '') + '\\n\\n' }}"
        "{% endfor %}" + GENERATE + "{{ '### Assistant:\\n' }}{% endif %}"
    ),
}
NEEDS = {"chatml": ("<|im_start|>", "<|im_end|>")}
QUESTION, ANSWER = "peftkit probe question", "peftkit probe answer"


@dataclass(frozen=True)
class TurnStyle:
    """How a template's assistant turn ends, by the rendering of a probe."""

    stop: str
    """Text from the end of the answer through the stop token (``<|im_end|>``); empty when the template has none."""
    after: str
    """What the template puts after the stop token (often a line break), or after the answer when there is no stop."""
    stop_id: int
    """The stop token; the tokenizer's end-of-text token when the template has none."""
    note: str = ""
    """What was mended, in words for the user; empty when nothing was."""

    @property
    def tail(self) -> str:
        """All that the template puts after an answer that ends the conversation."""
        return self.stop + self.after


def install(tokenizer: PreTrainedTokenizerBase, name: str | None) -> None:
    """Gives the tokenizer the named template; None leaves its own.

    Raises:
        ModelError: there is no template of that name, or the tokenizer lacks a token that the template needs.
    """
    if name is None:
        return
    template = named_template(name)
    for token in NEEDS.get(name, ()):
        if len(tokenizer(token, add_special_tokens=False)["input_ids"]) != 1:
            raise ModelError(
                f"model.chat_template: '{name}' needs the token {token}, which this tokenizer does not have; "
                "'plain' and 'zephyr' work with any tokenizer"
            )
    tokenizer.chat_template = template


def named_template(name: str) -> str:
    """The text of a named template; raises ModelError pointing to the nearest when there is none of that name."""
    if name not in NAMED:
        raise ModelError(f"model.chat_template: no template is called '{name}': {did_you_mean(name, NAMED)}")
    return NAMED[name]


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, generate: bool = False) -> str:
    """The conversation as the template writes it; ``generate`` opens the next assistant turn.

    The text holds every special token, BOS included (a doubled one is mended): tokenize it without adding more.

    Raises:
        ModelError: there is no template, or it fails on these messages (its own complaint is quoted).
    """
    text = _rendered(tokenizer, messages, generate)
    return text.removeprefix(str(tokenizer.bos_token)) if _doubles_bos(tokenizer, text) else text


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], generate: bool) -> str:
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            "this base model's tokenizer has no chat template; choose one with model.chat_template: "
            f"{', '.join(sorted(NAMED))}"
        )
    plain = [dict(message) for message in messages]
    try:
        text = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=generate)
    except (TemplateError, TypeError, KeyError, IndexError, ValueError) as error:
        line = getattr(error, "lineno", None)
        where = f" (line {line} of the template)" if line else ""
        raise ModelError(f"the chat template fails{where}: {error}") from None
    assert isinstance(text, str)
    return text


def _doubles_bos(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    return bool(tokenizer.bos_token) and text.startswith(str(tokenizer.bos_token) * 2)


def prompt_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """What a model is given to answer ``messages``; tokenize it with ``add_special_tokens=False``."""
    return render(tokenizer, messages, generate=True)


def read(tokenizer: PreTrainedTokenizerBase) -> TurnStyle:
    """Probes the tokenizer's template.

    Raises:
        ModelError: there is no template, it fails on one question and answer, does not print the answer or the
            question, begins the answer differently from its own generation prompt, or names no end of turn while the
            tokenizer has no end-of-text token either.
    """
    question = {"role": "user", "content": QUESTION}
    prompt = render(tokenizer, [question], generate=True)
    unopened = render(tokenizer, [question])
    whole = render(tokenizer, [question, {"role": "assistant", "content": ANSWER}])
    for text, said in ((QUESTION, "user's"), (ANSWER, "assistant's")):
        if whole.count(text) != 1:
            raise ModelError(_advice(f"prints the {said} text {whole.count(text)} times, expected once"))
    if not whole.startswith(prompt):
        raise ModelError(_advice("begins an assistant turn otherwise than its own generation prompt does"))
    lead, _, tail = whole[len(prompt) :].partition(ANSWER)
    if lead.strip() and prompt == unopened:
        raise ModelError(_advice(f"leaves out of its generation prompt what opens an assistant turn: {lead!r}"))
    style = _style(tokenizer, tail)
    if _doubles_bos(tokenizer, _rendered(tokenizer, [question], True)):
        doubled = f"the chat template writes {tokenizer.bos_token} twice where a text begins: one is left out"
        style = replace(style, note="; ".join(filter(None, [doubled, style.note])))
    return style


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a generated text: the stop token of a template that can be used, and end-of-text."""
    ids = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    try:
        ids.insert(0, read(tokenizer).stop_id)
    except ModelError:  # plain text is generated without a template, whatever is wrong with it
        return ids
    return list(dict.fromkeys(ids))


def _style(tokenizer: PreTrainedTokenizerBase, tail: str) -> TurnStyle:
    special = _special(tokenizer)
    places = [(tail.index(token), -len(token), token) for token in special if token in tail]
    if not places:
        return _ended_by_eos(tokenizer, tail)
    place, _, token = min(places)
    end = place + len(token)
    while following := max((other for other in special if tail.startswith(other, end)), key=len, default=""):
        token, end = following, end + len(following)  # an answer may end with several: <end of text><end of turn>
    return TurnStyle(tail[:end], tail[end:], int(cast(int, tokenizer.convert_tokens_to_ids(token))))


def _ended_by_eos(tokenizer: PreTrainedTokenizerBase, tail: str) -> TurnStyle:
    if tokenizer.eos_token_id is None:
        raise ModelError(_advice("has no end-of-turn token, and the tokenizer no end-of-text token to end a turn with"))
    note = (
        f"the chat template has no end-of-turn token: every answer is ended with {tokenizer.eos_token} "
        "so that the model learns to stop"
    )
    return TurnStyle("", tail, int(tokenizer.eos_token_id), note)


def _special(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    added: Any = tokenizer.added_tokens_decoder
    found = {token.content for token in added.values() if token.special} | set(tokenizer.all_special_tokens)
    return {token for token in found if token.strip()}


def _advice(problem: str) -> str:
    return (
        f"the chat template {problem}, so answers cannot be told from prompts; "
        f"set model.chat_template to one of: {', '.join(sorted(NAMED))}"
    )
