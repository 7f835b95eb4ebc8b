"""The tokenizer of a base model, with a pad token that differs from the stop token where possible."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.errors import ModelError
from peftkit.models import chat_template
from peftkit.models.architectures import READS_LAST_PLACE
from peftkit.models.context import limit_tokenizer
from peftkit.models.sources import check_config, folder_of, resolve
from peftkit.models.third_party import silence_libraries
from peftkit.schema.recipe import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEW_PAD = "<|pad|>"
SPARE = re.compile(r"pad|reserved|unused|extra_id|placeholder|dummy", re.IGNORECASE)


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a recipe's base model; code of the model never runs.

    It has a pad token, and its ``model_max_length`` is at most what the model reads.

    Raises ModelError where there is none, or it cannot be read, and HubError where it cannot be downloaded.
    """
    tokenizer = tokenizer_in(folder_of(resolve(model), weights=False))
    if model.chat_template is not None:
        chat_template.install(tokenizer, model.chat_template)
    if model.fold_system:
        chat_template.fold_system(tokenizer)
    return tokenizer


def tokenizer_in(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder; see ``load_tokenizer``."""
    silence_libraries()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        # the tokenizers library raises Exception itself, and odd values break transformers in many ways
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{folder}: the tokenizer cannot be read ({cause}); expected tokenizer.json") from error
    if len(tokenizer) <= len(tokenizer.added_tokens_decoder):  # transformers builds an empty one where there is none
        raise ModelError(f"{folder}: expected a tokenizer (tokenizer.json, vocab.txt, …), found none")
    longest = tokenizer.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, (int, float)) or longest < 1:
        raise ModelError(
            f"{folder / 'tokenizer_config.json'}: model_max_length: expected a number of tokens, found "
            f"{str(longest)[:40]!r}"
        )
    tokenizer.padding_side = "right"
    tokenizer.truncation_side = "right"
    if (folder / "config.json").is_file():
        config = check_config(folder)
        if config.get("model_type") in READS_LAST_PLACE:
            tokenizer.padding_side = "left"
        ensure_pad(tokenizer, int(config.get("vocab_size") or 0))
        limit_tokenizer(tokenizer, folder)
    return tokenizer


def ensure_pad(tokenizer: Any, embedding_rows: int) -> None:
    """Gives a tokenizer a pad token, in this order of preference:

    1. its own, where it is not the stop token;
    2. a reserved special token (``<|finetune_right_pad_id|>``, ``<|reserved_special_token_0|>``, …);
    3. the unknown token, or ``<|endoftext|>``, where these are not the stop token;
    4. a new ``<|pad|>``, where the embedding matrix has an unused row for it;
    5. the stop token: padding is recognized by position (attention mask, labels of -100), never by its id.

    The embeddings are never enlarged, because the adapter would no longer fit the published base.
    """
    stops = {tokenizer.eos_token, tokenizer.bos_token}
    if tokenizer.pad_token is not None and tokenizer.pad_token != tokenizer.eos_token:
        return
    added = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items())]
    spare = [token for token in added if SPARE.search(token)]
    ordinary = [token for token in (tokenizer.unk_token, "<|endoftext|>") if token in added]
    if usable := [token for token in spare + ordinary if token not in stops]:
        tokenizer.pad_token = usable[0]
    elif embedding_rows > len(tokenizer):
        tokenizer.add_special_tokens({"pad_token": NEW_PAD})
    elif tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    else:
        raise ModelError("the tokenizer has neither a pad nor an end-of-text token, and no room for a new one")


def pad_note(tokenizer: Any) -> str | None:
    """A note for the user where the pad token is also the stop token."""
    if tokenizer.pad_token != tokenizer.eos_token:
        return None
    return (
        f"the pad token is {tokenizer.eos_token}, the stop token, because the vocabulary has no unused token; padding "
        "is masked by position, so the stop token is still learned"
    )


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 over vocabulary, rules, special tokens and chat template; equal fingerprints mean equal token ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    last_call = {"padding": None, "truncation": None}  # set by the last call, not by the tokenizer
    rules = json.loads(backend.to_str()) | last_call if backend is not None else tokenizer.get_vocab()
    parts = [rules, tokenizer.special_tokens_map, tokenizer.chat_template, type(tokenizer).__name__]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
