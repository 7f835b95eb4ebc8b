"""Which tokens of a conversation are the assistant's, known from how it is rendered rather than searched for.

For the assistant turn i, the template renders the conversation before it with its generation prompt (what the model
will be given) and the conversation up to and including it; the second continues the first, and what it adds is the
turn: the answer and its stop token. Where the template writes an earlier turn differently once others follow (it drops
their reasoning, or moves the system prompt), every turn becomes an example of its own, in which the model reads
exactly what it will read when it is used.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any, Literal

from peftkit.errors import DataError, ModelError
from peftkit.models.chat_template import TurnStyle, render
from peftkit.tasks.windows import IGNORE, Stretch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
TrainOn = Literal["assistant", "last", "all"]


@dataclass(frozen=True)
class Piece:
    """A stretch of rendered text that is scored as a whole, or not at all."""

    text: str
    scored: bool


@dataclass(frozen=True)
class Labelled:
    """One conversation as tokens."""

    ids: list[int]
    labels: list[int]
    ends: list[int]
    """Where each scored turn ends: the number of tokens up to and including its stop token."""

    @property
    def prompt_length(self) -> int:
        """Tokens before the first that is scored."""
        return next((index for index, label in enumerate(self.labels) if label != IGNORE), len(self.labels))


def pieces_of(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    style: TurnStyle,
    train_on: TrainOn,
    masked: Sequence[int] = (),
) -> list[list[Piece]]:
    """The examples that a conversation makes, as pieces of text; what follows the last assistant turn is left out.

    Args:
        masked: indexes of assistant turns that are read, and never scored.

    Raises:
        DataError: the template fails on this conversation, leaves a text out, or rewrites a turn so that it cannot be
            told apart.
    """
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    wanted = [index for index in (turns[-1:] if train_on == "last" else turns) if index not in masked]
    rendered = [_turn(messages, index, tokenizer, style) for index in turns]
    whole = rendered[-1][0] + rendered[-1][1]
    _check_kept(messages[: turns[-1]], rendered[-1][0])
    if (style.stop or len(turns) == 1) and all(whole.startswith(prompt + answer) for prompt, answer in rendered):
        spans = {turn: (len(prompt), len(prompt + answer)) for turn, (prompt, answer) in zip(turns, rendered)}
        apart = turns if train_on == "all" else wanted  # with "all", what is around a masked answer is scored
        return [_cut(whole, [(*spans[turn], turn in wanted) for turn in apart], train_on)]
    if train_on == "all" and masked:
        problem = "the chat template makes an example of every answer, in which the answers before it are scored"
        raise DataError(f"{problem}, those flagged as not to be learned as well; set task.train_on=assistant")
    chosen = [turn for index, turn in zip(turns, rendered, strict=True) if index in wanted]
    return [_cut(prompt + answer, [(len(prompt), len(prompt + answer), True)], train_on) for prompt, answer in chosen]


def _check_kept(messages: Sequence[Message], prompt: str) -> None:
    """Raises DataError when the template leaves a system prompt or a user's text out of the last prompt."""
    solid = _solid(prompt)
    for number, message in enumerate(messages, 1):
        if message["role"] != "assistant" and _solid(message["content"]) not in solid:
            hint = "set model.fold_system=true, which puts it into the first user turn"
            hint = hint if message["role"] == "system" else "choose another template with model.chat_template"
            raise DataError(f"turn {number}: the chat template leaves this text of the {message['role']}'s out; {hint}")


def _turn(
    messages: Sequence[Message], index: int, tokenizer: PreTrainedTokenizerBase, style: TurnStyle
) -> tuple[str, str]:
    """What stands before the answer at ``index``, and the answer with its stop token."""
    try:
        prompt = render(tokenizer, messages[:index], generate=True)
        whole = render(tokenizer, messages[: index + 1])
    except ModelError as error:
        raise DataError(f"turn {index + 1}: {error}") from None
    if not whole.startswith(prompt):
        change = "the chat template writes what comes before this answer differently once it is there"
        raise DataError(f"turn {index + 1}: {change}; a conversation should begin with the user's turn")
    answer = whole[len(prompt) :]
    if not answer.endswith(style.tail) or _solid(messages[index]["content"]) not in _solid(answer):
        raise DataError(f"turn {index + 1}: the chat template does not keep this answer's text, it writes {answer!r}")
    return prompt, answer[: len(answer) - len(style.after)]


def _cut(text: str, spans: Sequence[tuple[int, int, bool]], train_on: TrainOn) -> list[Piece]:
    """``text`` cut at the answers' spans (start, end, scored); whatever follows the last one is left out."""
    pieces, done = [], 0
    for start, end, scored in spans:
        pieces += [Piece(text[done:start], train_on == "all"), Piece(text[start:end], scored)]
        done = end
    return pieces


def _solid(text: str) -> str:
    """Without white space, which templates trim and add around what they keep."""
    return "".join(text.split())


def tokenize(
    examples: Sequence[Sequence[Piece]], tokenizer: PreTrainedTokenizerBase, style: TurnStyle
) -> Iterator[Labelled]:
    """Pieces of text → tokens and labels, example by example; the end of a piece is always the end of a token.

    The pieces are tokenized one by one, so that a prompt's tokens are those that it has when it is all there is; a
    tokenizer that puts a space before each text reads the whole, whose tokens are then shared out by their offsets.

    Raises DataError when the tokenizer joins the end of a prompt and the beginning of an answer into one token.
    """
    texts = [piece.text for example in examples for piece in example]
    wholes = ["".join(piece.text for piece in example) for example in examples]
    if not texts:
        return
    # special tokens are in the text already
    encoded: Any = tokenizer(texts + wholes, add_special_tokens=False, return_attention_mask=False, verbose=False)
    parts, full = iter(encoded["input_ids"][: len(texts)]), iter(encoded["input_ids"][len(texts) :])
    spell = partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    for example, text in zip(examples, wholes, strict=True):
        split, whole = [next(parts) for _ in example], next(full)
        joined = list(chain.from_iterable(split))
        # pieces do not spell the whole where a tokenizer puts a space before each
        if joined != whole and spell(joined) != spell(whole):
            split = _by_offsets(example, text, tokenizer)
        yield _label(example, split, style)


def _label(example: Sequence[Piece], split: Sequence[Sequence[int]], style: TurnStyle) -> Labelled:
    labelled = Labelled([], [], [])
    for number, (piece, part) in enumerate(zip(example, split, strict=True)):
        answer = number % 2 == 1
        part = [*part, style.stop_id] if answer and not style.stop else list(part)
        labelled.ids.extend(part)
        labelled.labels.extend(part if piece.scored else [IGNORE] * len(part))
        if answer:
            labelled.ends.append(len(labelled.ids))
    labelled.labels[:1] = [IGNORE]
    return labelled


def _by_offsets(example: Sequence[Piece], text: str, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Divides the tokens of the whole text among the pieces by the characters that they stand for."""
    if not tokenizer.is_fast:
        raise ModelError("expected a tokenizer that gives the place of each token in the text (a 'fast' one)")
    encoded: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    cuts = list(accumulate(len(piece.text) for piece in example))[:-1]
    split: list[list[int]] = [[] for _ in example]
    reached = 0
    for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        # offsets leave out the spaces that belong to a token: what no token covers goes with the one after it
        start = min(start, reached) if text[reached:start].isspace() else start
        if any(start < cut < end for cut in cuts):
            joins = "the tokenizer joins the end of a prompt and the beginning of an answer in one token"
            raise DataError(f"{joins}, {text[start:end]!r}; choose another template with model.chat_template")
        split[bisect_right(cuts, start)].append(token)
        reached = max(reached, end)
    return split


def fit(labelled: Labelled, row: int, max_length: int, train_on: TrainOn) -> Stretch | None:
    """At most ``max_length`` tokens of it; None when no scored token would be left.

    Whole turns are kept where at least one fits; else the first answer is cut, and its stop token with it.
    """
    cut = length = len(labelled.ids)
    if length > max_length:
        whole_turns = [end for end in labelled.ends if end <= max_length]
        cut = whole_turns[-1] if whole_turns and train_on != "all" else max_length
    stretch = Stretch(labelled.ids[:cut], labelled.labels[:cut], row, length - cut)
    return stretch if stretch.weight else None
