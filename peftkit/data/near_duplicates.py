"""Near duplicates by MinHash and banding (Broder 1997; Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, ch. 3).

A text is the set of its word 3-grams. The minimum of a hash over a set agrees between two sets with a probability equal
to their Jaccard similarity s; with b bands of r hashes a pair becomes a candidate with probability 1 - (1 - s^r)^b.
Every candidate is then compared exactly, so that only similar texts are reported.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np

from peftkit.data.mapping import hash64

HASHES = 128
RECALL = 0.998
BUCKET = 64
"""Rows of one bucket that all others in it are compared with: bounds the work where thousands share boilerplate."""
_CHUNK = 2000
_WORD = re.compile(r"\w+")
_word_hash = lru_cache(maxsize=1_000_000)(hash64)

Texts = Callable[[np.ndarray], Iterable[Sequence[str]]]
"""Row numbers → the words of each."""


def words_of(text: str) -> list[str]:
    """Words without case and punctuation; a text without any is one word."""
    return _WORD.findall(text.casefold()) or [text.strip()]


def shingles(words: Sequence[str]) -> set[tuple[str, ...]]:
    """The set of word 3-grams; a shorter text is one shingle."""
    return set(zip(words, words[1:], words[2:])) or {tuple(words)}


def jaccard(one: set[tuple[str, ...]], other: set[tuple[str, ...]]) -> float:
    """Shared shingles ÷ all shingles of both."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)


def bands_for(threshold: float) -> tuple[int, int]:
    """(bands, hashes per band): the longest bands that catch a pair at the threshold with probability ``RECALL``."""
    for width in range(HASHES, 1, -1):
        bands = HASHES // width
        if 1 - (1 - threshold**width) ** bands >= RECALL:
            return bands, width
    return HASHES, 1


def find_pairs(words: Texts, rows: int, threshold: float) -> Iterator[tuple[int, int, float]]:
    """(later row, earlier row, similarity) of every pair at or over the threshold, ordered by the later row."""
    bands, width = bands_for(threshold)
    # on disk, band after band, since only one band is needed at a time; a band takes 8 bytes per row
    with tempfile.TemporaryFile() as keys:
        for start in range(0, rows, _CHUNK):
            chunk = np.arange(start, min(start + _CHUNK, rows))
            for band, chunk_keys in enumerate(_band_keys(list(words(chunk)), bands, width)):
                keys.seek(8 * (band * rows + start))
                keys.write(chunk_keys.tobytes())
        keys.seek(0)
        candidates = _candidates(np.frombuffer(keys.read(8 * rows), dtype=np.uint64) for _ in range(bands))
    if not len(candidates):
        return
    needed = np.unique(candidates)
    sets = dict(zip(needed.tolist(), map(shingles, words(needed))))
    for later, earlier in candidates.tolist():
        similarity = jaccard(sets[later], sets[earlier])
        if similarity >= threshold:
            yield later, earlier, similarity


def _candidates(keys: Iterable[np.ndarray]) -> np.ndarray:
    """Pairs [pairs, 2] (later, earlier) that share a bucket in some band, whose ``keys`` are [rows]; ordered."""
    pairs = [np.empty((0, 2), dtype=np.int64)]
    for band in keys:
        order = np.argsort(band, kind="stable")
        sorted_keys = band[order]
        starts = np.flatnonzero(np.r_[True, sorted_keys[1:] != sorted_keys[:-1]])
        sizes = np.diff(np.r_[starts, len(order)])
        for start, size in zip(starts[sizes > 1].tolist(), sizes[sizes > 1].tolist()):
            rows = order[start : start + size]
            earlier, later = np.nonzero(np.arange(min(size, BUCKET))[:, None] < np.arange(size)[None, :])
            pairs.append(np.stack([rows[later], rows[earlier]], axis=1))
    return np.unique(np.concatenate(pairs), axis=0)


def _band_keys(texts: list[Sequence[str]], bands: int, width: int) -> np.ndarray:
    """One hash per band and row, [bands, rows], uint64, over the minimum hashes of the row's shingles."""
    hashed = [_shingle_hashes(words) for words in texts]
    starts = np.cumsum([0, *(len(hashes) for hashes in hashed[:-1])])
    flat = np.concatenate(hashed)
    generator = np.random.Generator(np.random.PCG64(20240229))
    multipliers = generator.integers(1, 1 << 63, size=bands * width, dtype=np.uint64) | np.uint64(1)
    keys = np.zeros((bands, len(texts)), dtype=np.uint64)
    for number, multiplier in enumerate(multipliers):
        # multiply-shift keeps the high bits, which depend on all bits of the shingle's hash
        least = np.minimum.reduceat((flat * multiplier) >> np.uint64(20), starts)
        keys[number // width] = _mix(keys[number // width] ^ least)
    return keys


def _shingle_hashes(words: Sequence[str]) -> np.ndarray:
    """A 64-bit hash of every 3-gram, uint64."""
    ids = np.fromiter(map(_word_hash, words), dtype=np.uint64, count=len(words))
    if len(ids) < 3:
        ids = np.concatenate([np.zeros(3 - len(ids), dtype=np.uint64), ids])
    return _mix(_mix(_mix(ids[:-2]) ^ ids[1:-1]) ^ ids[2:])


def _mix(values: np.ndarray) -> np.ndarray:
    """Spreads every bit over all 64 (the finalizer of splitmix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
