"""Chat templates: named ones for a base that has none, and how any template ends an assistant turn.

Only transformers renders templates (``apply_chat_template``). ``read`` renders a probe whose assistant turn is known,
so that stop token and trailing text are located by position, without searching rows for marker strings.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from peftkit.errors import ModelError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]
GENERATE = "{% if add_generation_prompt %}"
NAMED = {
    # ChatML (OpenAI 2023)
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}" + GENERATE + "{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    # Llama 2 (Touvron et al. 2023, arXiv:2307.09288): the system prompt is part of the first user turn
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
    # works with any tokenizer; only answers end with the end-of-text token
    "plain": (
        "{% for message in messages %}{{ '### ' + message['role'].capitalize() + ':\\n' + message['content'] }}"
        "{{ ((eos_token or '') if message['role'] == 'assistant' else '') + '\\n\\n' }}"
        "{% endfor %}" + GENERATE + "{{ '### Assistant:\\n' }}{% endif %}"
    ),
}
FOLD_HINT = (
    "; the template takes no system prompt: train with model.fold_system=true, which puts it into the first user turn, "
    "or leave it out"
)
REQUIRED_TOKENS = {"chatml": ("<|im_start|>", "<|im_end|>")}
FOLD_SYSTEM = (
    "{% if messages | length > 1 and messages[0]['role'] == 'system' and messages[1]['role'] == 'user' %}"
    "{% set messages = [{'role': 'user', 'content': messages[0]['content'] + '\\n\\n' + messages[1]['content']}]"
    " + messages[2:] %}{% endif %}\n"
)
"""Put before a template: it then sees the system prompt as the start of the first user turn. The last line break is
swallowed (trim_blocks), so that the template's own first line is still the start of a line."""
QUESTION, ANSWER = "peftkit probe question", "peftkit probe answer"


@dataclass(frozen=True)
class TurnStyle:
    """How a template ends an assistant turn."""

    stop: str  # text from the end of the answer through the stop token (``<|im_end|>``); empty if the template has none
    after: str  # text after the stop token (often a line break), or after the answer if there is no stop token
    stop_id: int  # the stop token; the tokenizer's end-of-text token if the template has none
    note: str = ""  # what was corrected, for the user; empty if nothing was

    @property
    def tail(self) -> str:
        """All that the template writes after the last answer of a conversation."""
        return self.stop + self.after


def install(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Gives the tokenizer the named template; raises ModelError if there is none, or the tokenizer lacks its tokens."""
    if name not in NAMED:
        raise ModelError(f"model.chat_template: no template is called '{name}': {did_you_mean(name, NAMED)}")
    for token in REQUIRED_TOKENS.get(name, ()):
        if len(tokenizer(token, add_special_tokens=False)["input_ids"]) != 1:
            raise ModelError(
                f"model.chat_template: '{name}' needs the token {token}, which this tokenizer does not have; "
                "'plain' and 'zephyr' work with any tokenizer"
            )
    tokenizer.chat_template = NAMED[name]


def fold_system(tokenizer: PreTrainedTokenizerBase) -> None:
    """Changes the tokenizer's template to put the system prompt at the start of the first user turn.

    Raises ModelError when there is no template.
    """
    template: Any = _template_of(tokenizer)
    if isinstance(template, dict):
        tokenizer.chat_template = {name: FOLD_SYSTEM + one for name, one in template.items()}  # type: ignore[assignment]
    else:
        tokenizer.chat_template = FOLD_SYSTEM + template


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, generate: bool = False,
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:  # fmt: skip
    """The conversation as the template renders it; ``generate`` opens the next assistant turn.

    Args:
        tools: definitions of functions that the answer may call, as JSON schemas.

    The text contains every special token, including one BOS (a second one is removed): tokenize it without adding more.
    Raises ModelError where there is no template, or it fails on these messages (its error is quoted).
    """
    text = _rendered(tokenizer, messages, generate, tools)
    return text.removeprefix(str(tokenizer.bos_token)) if _doubles_bos(tokenizer, text) else text


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], generate: bool, tools: Sequence[Any] = ()
) -> str:
    from jinja2 import TemplateError

    _template_of(tokenizer)
    conversation = [dict(message) for message in messages]
    try:
        options: dict[str, Any] = {"tools": list(tools)} if tools else {}
        return str(
            tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=generate, **options)
        )
    except (TemplateError, TypeError, KeyError, IndexError, ValueError) as error:
        line = getattr(error, "lineno", None)
        where = f" (line {line} of the template)" if line else ""
        hint = FOLD_HINT if _refuses_system(tokenizer, conversation, generate) else ""
        raise ModelError(f"the chat template fails{where}: {error}{hint}") from None


def _template_of(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The tokenizer's template; raises ModelError when there is none."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise ModelError(
            "this base model's tokenizer has no chat template; choose one with model.chat_template: "
            f"{', '.join(sorted(NAMED))}"
        )
    return template


def _refuses_system(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], generate: bool) -> bool:
    """Whether a conversation that the template fails on is well without its system prompt."""
    if len(messages) < 2 or messages[0]["role"] != "system":
        return False
    try:
        _rendered(tokenizer, messages[1:], generate)
    except ModelError:
        return False
    return True


def _doubles_bos(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    return bool(tokenizer.bos_token) and text.startswith(str(tokenizer.bos_token) * 2)


def read(tokenizer: PreTrainedTokenizerBase) -> TurnStyle:
    """How the tokenizer's template ends an assistant turn, from a rendered probe.

    Raises ModelError if there is no template, it fails on one question and answer, omits one of them, begins the answer
    differently from its own generation prompt, or neither it nor the tokenizer has a token to end it with.
    """
    question = {"role": "user", "content": QUESTION}
    prompt = render(tokenizer, [question], generate=True)
    unopened = render(tokenizer, [question])
    dialogue = render(tokenizer, [question, {"role": "assistant", "content": ANSWER}])
    for text, role in ((QUESTION, "user"), (ANSWER, "assistant")):
        if dialogue.count(text) != 1:
            raise ModelError(_advice(f"prints the {role}'s text {dialogue.count(text)} times, expected once"))
    if not dialogue.startswith(prompt):
        raise ModelError(_advice("begins an assistant turn differently from its own generation prompt"))
    lead, _, tail = dialogue[len(prompt) :].partition(ANSWER)
    if lead.strip() and prompt == unopened:
        raise ModelError(_advice(f"omits the start of an assistant turn from its generation prompt: {lead!r}"))
    style = _style(tokenizer, tail)
    if lead.strip():
        begun = f"the chat template begins an answer with {lead!r} where its messages do not: that is learned as well"
        style = replace(style, note="; ".join(filter(None, [begun, style.note])))
    if _doubles_bos(tokenizer, _rendered(tokenizer, [question], True)):
        doubled = f"the chat template writes {tokenizer.bos_token} twice at the start of a text: one is removed"
        style = replace(style, note="; ".join(filter(None, [doubled, style.note])))
    return style


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Texts that the tokenizer reads as control tokens, wherever they stand."""
    added: Any = tokenizer.added_tokens_decoder
    names = [token.content for token in added.values() if token.special] + tokenizer.all_special_tokens
    return {name for name in names if name.strip()}


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a generated text: the stop token of a usable template, and end-of-text."""
    ids = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    with contextlib.suppress(ModelError):  # plain text is generated without a template, even where it is unusable
        ids.insert(0, read(tokenizer).stop_id)
    return list(dict.fromkeys(ids))


def _style(tokenizer: PreTrainedTokenizerBase, tail: str) -> TurnStyle:
    """The style of a template that writes ``tail`` after an answer."""
    special = special_tokens(tokenizer)
    places = [(tail.index(token), -len(token), token) for token in special if token in tail]
    if not places:
        if tokenizer.eos_token_id is None:
            problem = "has no end-of-turn token, and the tokenizer no end-of-text token to end a turn with"
            raise ModelError(_advice(problem))
        note = (
            f"the chat template has no end-of-turn token: every answer is ended with {tokenizer.eos_token} so that the "
            "model learns to stop"
        )
        return TurnStyle("", tail, int(tokenizer.eos_token_id), note)
    start, _, token = min(places)
    end = start + len(token)
    while following := max((other for other in special if tail.startswith(other, end)), key=len, default=""):
        token, end = following, end + len(following)  # an answer may end with several: <end of text><end of turn>
    return TurnStyle(tail[:end], tail[end:], int(cast(int, tokenizer.convert_tokens_to_ids(token))))


def _advice(problem: str) -> str:
    return (
        f"the chat template {problem}, so answers cannot be separated from prompts; "
        f"set model.chat_template to one of: {', '.join(sorted(NAMED))}"
    )
