"""A tokenizer's vocabulary in GGUF, so that llama.cpp gives the same token ids.

Three kinds are written: byte-level BPE ("gpt2", with the name of the pattern that splits a text), BPE over pieces with
bytes as a fallback ("llama", SentencePiece) and unigram ("t5"). llama.cpp knows patterns by name only: one that it does
not know is refused.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from peftkit.errors import ModelError
from peftkit.models import chat_template

if TYPE_CHECKING:
    from gguf import GGUFWriter

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
PATTERNS = {
    ("gpt2",): "gpt-2",
    ("digit", "gpt2"): "smollm",
    (rf"{_ENDINGS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",): "dbrx",
    (rf"{_ENDINGS}|{_WORDS}|\p{{N}}|{_REST}",): "qwen2",
    (_CASED % ("", "") + rf"|\p{{N}}|{_CASED_REST}",): "tekken",
    (_CASED % (f"{_ENDINGS}?", f"{_ENDINGS}?") + rf"|\p{{N}}{{1,3}}|{_CASED_REST}",): "gpt-4o",
}
"""llama.cpp's names of the patterns by which byte-level BPE splits a text into words."""
NFC = {"type": "NFC"}
PHI3_TOKENS = {"<unk>", "<s>", "<|endoftext|>"}
"""Tokens that llama.cpp expects in a model that is named Phi-3."""
WHOLE_WORDS = {"dbrx": "llama-bpe", "tekken": "tekken"}
"""Names of those patterns where words that are in the vocabulary are taken whole (``ignore_merges``)."""


def write(writer: GGUFWriter, tokenizer: Any, rows: int, stops: Sequence[int]) -> None:
    """Writes tokens, merges or scores, special tokens and the chat template.

    Args:
        rows: of the embedding matrix, which may have more than the vocabulary.
        stops: ids that end an answer, the chat template's own first.

    Raises:
        ModelError: llama.cpp has no tokenizer of this kind.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = backend["model"]["type"]
    if kind == "BPE" and not backend["model"].get("byte_fallback"):
        _write_byte_level(writer, backend)
    elif kind == "BPE":
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_begins_with_space(backend))
    elif kind == "Unigram":
        _write_unigram(writer, backend)
    else:
        raise ModelError(f"llama.cpp has no tokenizer of the kind {kind} for language models; export with --merge")
    _write_tokens(writer, tokenizer, backend, rows)
    _write_special(writer, tokenizer, stops)
    if template := tokenizer.chat_template:
        if isinstance(template, dict):
            template = [{"name": name, "template": one} for name, one in template.items()]
        writer.add_chat_template(template)


def _write_byte_level(writer: GGUFWriter, backend: dict[str, Any]) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pattern_name(backend))
    merges = backend["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])


def composes(tokenizer: Any) -> bool:
    """Whether the tokenizer normalizes texts to NFC, as those of Qwen do; llama.cpp reads them as they are."""
    return json.loads(tokenizer.backend_tokenizer.to_str()).get("normalizer") == NFC


def model_name(name: str, tokenizer: Any) -> str:
    """A name for the file. llama.cpp knows by "phi-3" in it that spaces after special tokens are dropped."""
    drops = any(token.rstrip for token in tokenizer.added_tokens_decoder.values() if token.special)
    if drops and set(tokenizer.get_vocab()) >= PHI3_TOKENS:
        return f"{name} (phi-3)"
    return re.sub(r"phi-?3", "phi_3", name, flags=re.IGNORECASE)


def pattern_name(backend: dict[str, Any]) -> str:
    """llama.cpp's name of the pattern of a byte-level BPE (tokenizer.json); raises ModelError if it has none."""
    if backend.get("normalizer") not in (None, NFC):
        raise ModelError("llama.cpp does not normalize texts as this tokenizer does; export with --merge")
    steps = tuple(_pattern_steps(backend.get("pre_tokenizer") or {}))
    name = PATTERNS.get(steps)
    if name is not None and backend["model"].get("ignore_merges"):
        name = WHOLE_WORDS.get(name)
    if name is None:
        raise ModelError(
            f"llama.cpp knows no pattern by which this tokenizer splits a text ({' then '.join(steps) or 'none'}); "
            f"it is written for those of {', '.join(sorted({*PATTERNS.values(), *WHOLE_WORDS.values()}))}"
        )
    return name


def _pattern_steps(step: dict[str, Any]) -> list[str]:
    """What a pre-tokenizer splits by, in order: regular expressions, "digit" and "gpt2"."""
    match step.get("type"):
        case "Sequence":
            return [inner for one in step["pretokenizers"] for inner in _pattern_steps(one)]
        case "ByteLevel":
            if step.get("add_prefix_space"):
                return ["a space in front"]
            return ["gpt2"] if step.get("use_regex", True) else []
        case "Digits":
            return ["digit" if step.get("individual_digits") else "digits"]
        case "Split" if "Regex" in step["pattern"] and step["behavior"] in {"Isolated", "Removed"}:
            return [step["pattern"]["Regex"]]
        case other:
            return [str(other)]


def _begins_with_space(backend: dict[str, Any]) -> bool:
    """Whether a space is put in front of a text."""
    steps = json.dumps([backend.get("normalizer"), backend.get("pre_tokenizer")])
    return '"type": "Prepend"' in steps or '"prepend_scheme": "always"' in steps or '"prepend_scheme": "first"' in steps


def _write_unigram(writer: GGUFWriter, backend: dict[str, Any]) -> None:
    writer.add_tokenizer_model("t5")
    writer.add_tokenizer_pre("default")
    writer.add_add_space_prefix(_begins_with_space(backend))
    normalizer = backend.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    writer.add_remove_extra_whitespaces(any("{2,}" in json.dumps(step.get("pattern", "")) for step in steps))
    for step in steps:
        if step.get("type") == "Precompiled" and step.get("precompiled_charsmap"):
            writer.add_precompiled_charsmap(base64.b64decode(step["precompiled_charsmap"]))


def _write_tokens(writer: GGUFWriter, tokenizer: Any, backend: dict[str, Any], rows: int) -> None:
    """Every row of the embedding: its text, score and type; rows without a token are marked as unused."""
    from gguf import TokenType

    vocabulary = {index: text for text, index in tokenizer.get_vocab().items()}
    if vocabulary and max(vocabulary) >= rows:
        raise ModelError(f"the tokenizer has token {max(vocabulary)}, but the embedding only {rows} rows")
    added, scores = tokenizer.added_tokens_decoder, _scores(backend)
    texts, values, types = [], [], []
    for index in range(rows):
        text = vocabulary.get(index)
        kind = TokenType.NORMAL
        if text is None:
            text, kind = f"[PAD{index}]", TokenType.UNUSED
        elif index == tokenizer.unk_token_id and scores:
            kind = TokenType.UNKNOWN
        elif index in added:
            kind = TokenType.CONTROL if added[index].special else TokenType.USER_DEFINED
        elif scores and len(text) == 6 and text.startswith("<0x"):
            kind = TokenType.BYTE
        texts.append(text)
        values.append(scores.get(text, 0.0))
        types.append(kind)
    writer.add_token_list(texts)
    writer.add_token_types(types)
    if scores:
        writer.add_token_scores(values)


def _scores(backend: dict[str, Any]) -> dict[str, float]:
    """Text → score: of a unigram the log probability, of BPE over pieces minus the rank of the first merge."""
    model = backend["model"]
    if model["type"] == "Unigram":
        return {text: float(score) for text, score in model["vocab"]}
    if not model.get("byte_fallback"):
        return {}
    ranks: dict[str, float] = {}
    for rank, pair in enumerate(model["merges"]):
        ranks.setdefault("".join(pair.split(" ") if isinstance(pair, str) else pair), -float(rank))
    return ranks or {"": 0.0}


def _write_special(writer: GGUFWriter, tokenizer: Any, stops: Sequence[int]) -> None:
    """Special tokens by their role; llama.cpp stops at the ends of text, of turn and of message."""
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else stops[0]
    others = [index for index in stops if index != end]
    ids = {
        "bos": tokenizer.bos_token_id, "eos": end, "unk": tokenizer.unk_token_id, "pad": tokenizer.pad_token_id,
        "eot": others[0] if others else None, "eom": others[1] if len(others) > 1 else None,
    }  # fmt: skip
    for role, index in ids.items():
        if index is not None:
            getattr(writer, f"add_{role}_token_id")(int(index))
    writer.add_add_bos_token(begins_with_bos(tokenizer))
    writer.add_add_eos_token(False)  # a prompt is continued


def begins_with_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts its beginning-of-text token in front of a text."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: those of the chat template and the tokenizer, then those that the model names."""
    own = getattr(model.generation_config, "eos_token_id", None)
    own = own if isinstance(own, list) else [] if own is None else [own]
    return list(dict.fromkeys([*chat_template.stop_ids(tokenizer), *own]))
