"""The tokenizer of a base model, with a pad token that cannot be taken for the end of a text."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.errors import ModelError
from peftkit.models import dtypes
from peftkit.models.sources import check_config, folder_of, resolve
from peftkit.schema.recipe import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEW_PAD = "<|pad|>"
SPARE = re.compile(r"pad|reserved|unused|extra_id|placeholder|dummy", re.IGNORECASE)


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a recipe's base model: pads on the right, has a pad token, runs no code of the model's.

    Raises:
        ModelError: there is no tokenizer, or it cannot be read.
        HubError: the hub cannot give it.
    """
    tokenizer = tokenizer_in(folder_of(resolve(model), weights=False))
    if model.chat_template is not None:
        from peftkit.models.chat_template import install

        install(tokenizer, model.chat_template)
    return tokenizer


def tokenizer_in(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder; see ``load_tokenizer``."""
    dtypes.silence_libraries()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        # the tokenizers library raises Exception itself, and odd values break transformers in many ways
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{folder}: no tokenizer that can be read ({first}); expected tokenizer.json") from error
    if len(tokenizer) <= len(tokenizer.added_tokens_decoder):  # transformers makes an empty one up
        raise ModelError(f"{folder}: expected a tokenizer (tokenizer.json, vocab.txt, …), found none")
    longest = tokenizer.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, (int, float)) or longest < 1:
        said = f"model_max_length: expected a number of tokens, found {str(longest)[:40]!r}"
        raise ModelError(f"{folder / 'tokenizer_config.json'}: {said}")
    tokenizer.padding_side = "right"
    tokenizer.truncation_side = "right"
    if (folder / "config.json").is_file():
        ensure_pad(tokenizer, int(check_config(folder).get("vocab_size") or 0))
    return tokenizer


def ensure_pad(tokenizer: Any, embedding_rows: int) -> None:
    """Gives a tokenizer a pad token, in this order of preference:

    1. its own, where it is not the stop token;
    2. a special token kept in reserve (``<|finetune_right_pad_id|>``, ``<|reserved_special_token_0|>``, …);
    3. the unknown token, or ``<|endoftext|>``, where these are not the stop token;
    4. a new ``<|pad|>``, where the embedding matrix has a row to spare for it;
    5. the stop token: padding is told apart by position (attention mask, labels of -100), never by its id.

    The embeddings are never enlarged for it: then the base as it is published would no longer fit the adapter.
    """
    stops = {tokenizer.eos_token, tokenizer.bos_token, None}
    if tokenizer.pad_token is not None and tokenizer.pad_token != tokenizer.eos_token:
        return
    added = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items())]
    spare = [token for token in added if SPARE.search(token)]
    ordinary = [token for token in (tokenizer.unk_token, "<|endoftext|>") if token in added]
    for token in spare + ordinary:
        if token not in stops:
            tokenizer.pad_token = token
            return
    if embedding_rows > len(tokenizer):
        tokenizer.add_special_tokens({"pad_token": NEW_PAD})
    elif tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    else:
        raise ModelError("the tokenizer has neither a pad nor an end-of-text token, and no room for a new one")


def pad_note(tokenizer: Any) -> str | None:
    """What to tell the user about the pad token, if anything."""
    if tokenizer.pad_token == tokenizer.eos_token:
        return (
            f"pad token is {tokenizer.eos_token}, the stop token: the vocabulary has no other to spare; "
            "padding is masked by position, so the stop token is still learned"
        )
    return None


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 over vocabulary and rules, special tokens and chat template: equal fingerprints, equal token ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    if backend is not None:
        rules |= {"padding": None, "truncation": None}  # set by the last call, not by the tokenizer
    parts = [rules, tokenizer.special_tokens_map, tokenizer.chat_template, type(tokenizer).__name__]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
