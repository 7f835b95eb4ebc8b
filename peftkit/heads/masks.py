"""Masks of masked language modeling: which tokens are hidden, and by what (Devlin et al. 2019, arXiv:1810.04805).

    the [MASK] player was great     hidden: "good", by the mask token (80 %)
    the good stock was great        hidden: "player", by a random token (10 %)
    the good player was great       hidden: "was", left as it is (10 %), but predicted

A mask is a pure function of the row's tokens and a key: (seed, epoch) in training, so that every epoch hides other
tokens and a resumed run hides the same; nothing on held-out rows, whose losses are then comparable between runs.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
"""Label of a token that is not predicted."""
NO_WORD = -1
"""The word of a token that is never hidden: [CLS], [SEP], [UNK], …"""


@dataclass(frozen=True)
class Masking:
    """How much is hidden, and by what."""

    probability: float = 0.15
    """Share of a row's tokens that are hidden, at least one of them."""
    whole_word: bool = False
    """Hide all tokens of a word or none."""
    shares: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Of the hidden tokens: replaced by the mask token, replaced by a random token, left as they are."""

    def hide(
        self, ids: Sequence[int], words: Sequence[int], tokenizer: PreTrainedTokenizerBase, key: Sequence[int] = ()
    ) -> tuple[list[int], list[int]]:
        """The ids with some of them replaced, and the labels: the hidden tokens' ids, -100 elsewhere.

        Args:
            words: the number of each token's word; -1 for tokens that are never hidden.
            key: whole numbers from 0; with another key, other tokens are hidden.
        """
        import numpy as np

        before, numbers = np.asarray(ids, dtype=np.int64), np.asarray(words, dtype=np.int64)
        digest = int.from_bytes(hashlib.blake2b(before.tobytes(), digest_size=8).digest(), "little")
        # a seed of zeros at the end is that of the same numbers without them: so the length comes first
        generator = np.random.Generator(np.random.PCG64([len(key), *key, digest]))
        hidden = self._choose(numbers, generator)
        after, labels = before.copy(), np.full_like(before, IGNORE)
        labels[hidden] = before[hidden]
        draw = generator.random(len(hidden))
        masked, replaced, _ = self.shares
        after[hidden[draw < masked]] = tokenizer.mask_token_id
        at_random = hidden[(draw >= masked) & (draw < masked + replaced)]
        after[at_random] = generator.choice(_ordinary_tokens(tokenizer), len(at_random))
        return after.tolist(), labels.tolist()

    def _choose(self, words: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Places of the hidden tokens, ascending.

        Words are drawn until the number of tokens is reached; one that would exceed it is passed over.
        """
        import numpy as np

        places = np.flatnonzero(words != NO_WORD)
        count = max(1, round(self.probability * len(places)))
        if not self.whole_word:
            return np.sort(generator.permutation(places)[:count])
        chosen: list[np.ndarray] = []
        room = count
        for word in generator.permutation(np.unique(words[places])):
            tokens = np.flatnonzero(words == word)
            if len(tokens) <= room or not chosen:
                chosen.append(tokens)
                room -= len(tokens)
            if room <= 0:
                break
        return np.sort(np.concatenate(chosen)) if chosen else places


def _ordinary_tokens(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Ids of the vocabulary without special tokens."""
    return _ids_without(len(tokenizer), tuple(tokenizer.all_special_ids))


@functools.lru_cache(maxsize=8)
def _ids_without(count: int, special: tuple[int, ...]) -> np.ndarray:
    import numpy as np

    return np.setdiff1d(np.arange(count), special)
