"""Text to the rows of fastText's tables: words, and hashes of their n-grams.

What a text is to fastText: its UTF-8 bytes, split at spaces. A word of the dictionary is a row of its own. A word's
subwords are its pieces of ``minn`` to ``maxn`` characters, where ``<`` and ``>`` are before and after it; neighbours
are word n-grams. Both are hashed to a number in [0, bucket), whose row stands behind the words'. A text that labels are
predicted of ends with ``</s>``, and its labels count for nothing.

A word costs a look in a dictionary if it was seen before. New words are hashed all at once, by NumPy.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .reader import Head

END = b"</s>"
LABEL_PREFIX = b"__label__"
_FIRST, _PRIME = 2166136261, 16777619
_NGRAM_FACTOR = 116049371
#: Bytes from which on a word or a character is hashed alone: a loop over bytes serves all others at once.
_LONG = 64
#: Words that are remembered; then all are forgotten. A word takes some 300 bytes.
_REMEMBERED = 1 << 20
_REMEMBERED_ROWS = 1 << 24
#: Words that are turned to rows at a time.
_AT_ONCE = 1 << 16


class Bags(NamedTuple):
    """Texts as bags of rows.

    Attributes:
        indices: int64 [num_indices], rows of the input table.
        offsets: int64 [num_texts], where each text's begin.
    """

    indices: np.ndarray
    offsets: np.ndarray


class WordBags(NamedTuple):
    """Texts as bags of words, and words as bags of rows.

    Attributes:
        indices: int64 [num_indices], rows of the input table.
        word_offsets: int64 [num_words], where each word's begin in ``indices``.
        offsets: int64 [num_texts], where each text's words begin in ``word_offsets``.
    """

    indices: np.ndarray
    word_offsets: np.ndarray
    offsets: np.ndarray


@dataclasses.dataclass(frozen=True)
class Hashing:
    """How words become rows.

    Attributes:
        words, labels: the dictionary, bytes.
        bucket: how many numbers n-grams are hashed to.
        minn, maxn: characters of subwords; maxn of 0 is none.
        word_ngrams: words of the longest word n-gram; 1 is none.
        num_rows: rows of the input table, at least.
        kept: numbers of n-grams in a pruned model, ascending, and the rows of each behind the words'; None for all.
    """

    words: Sequence[bytes]
    labels: Sequence[bytes]
    bucket: int
    minn: int
    maxn: int
    word_ngrams: int
    num_rows: int
    kept: tuple[np.ndarray, np.ndarray] | None = None

    @classmethod
    def of(cls, head: Head) -> Hashing:
        """That of a file."""
        a = head.arguments
        return cls(head.words, head.labels, a.bucket, a.minn, a.maxn, a.word_ngrams, head.num_rows, head.kept)

    def rows(self, hashes: np.ndarray) -> np.ndarray:
        """The row of each hash, -1 where there is none. Hashes are unsigned."""
        numbers = (hashes % hashes.dtype.type(self.bucket)).astype(np.int64)
        if self.kept is not None:
            known, place = self.kept
            if len(known) == 0:
                return np.full(numbers.shape, -1)
            at = np.minimum(np.searchsorted(known, numbers), len(known) - 1)
            numbers = np.where(known[at] == numbers, place[at], -1 - len(self.words))
        return numbers + len(self.words)


class WordRows:
    """The rows of words, which it remembers. Several threads may ask at once, and take turns."""

    def __init__(self, hashing: Hashing) -> None:
        self.hashing = hashing
        self._turn = threading.Lock()
        # fastText finds the last of several equal entries; labels stand behind the words.
        self._entries = dict(zip(itertools.chain(hashing.words, hashing.labels), itertools.count(), strict=False))
        self._forget()

    def _forget(self) -> None:
        self._numbers: dict[bytes, int] = {}  # of the words, in the order in which they were learned
        self._rows = _Growing(np.int64)  # of all words, one after another
        self._starts = _Growing(np.int64)  # where each word's begin
        self._counts = _Growing(np.int64)
        self._hashes = _Growing(np.uint64)
        self._are_labels = _Growing(np.bool_)

    def texts(self, texts: Iterable[str | bytes]) -> Bags:
        """The rows of texts of which labels are predicted: fastText's ``predict``.

        Raises:
            TypeError: a text that is neither str nor bytes.
            ValueError: a text with a line feed; fastText's are single lines.
            UnicodeEncodeError: a str with a lone surrogate.
        """
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        words: list[bytes] = []
        counts: list[int] = []
        for text in _lines(texts):
            found = text.replace(b"\0", b" ").split()
            if END in found:
                del found[found.index(END) :]
            found.append(END)
            words += found
            counts.append(len(found))
            if len(words) > _AT_ONCE:
                parts.append(self._lines(words, counts))
                words, counts = [], []
        parts.append(self._lines(words, counts))
        indices, lengths = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return Bags(indices, _starts(lengths))

    def sentences(self, texts: Iterable[str | bytes]) -> WordBags:
        """The rows of the words of texts: fastText's ``get_sentence_vector`` of word vectors.

        Raises:
            TypeError, ValueError, UnicodeEncodeError: as `texts`.
        """
        lines = [text.split() for text in _lines(texts)]
        words = self.words(itertools.chain.from_iterable(lines))
        return WordBags(words.indices, words.offsets, _starts(np.array([len(line) for line in lines], np.int64)))

    def words(self, words: Iterable[str | bytes]) -> Bags:
        """The rows of words, each of which is taken as it is: fastText's ``get_word_vector``.

        Raises:
            TypeError, UnicodeEncodeError: as `texts`.
        """
        parts = [(np.empty(0, np.int64), np.empty(0, np.int64))]
        rest = map(_bytes, words)
        while some := list(itertools.islice(rest, _AT_ONCE)):
            with self._turn:
                parts.append(self._rows_of(self._learned(some)))
        indices, lengths = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return Bags(indices, _starts(lengths))

    def _lines(self, words: Sequence[bytes], counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The rows of lines, and how many each has. ``counts`` are the words of each."""
        with self._turn:
            return self._rows_of_lines(words, counts)

    def _rows_of_lines(self, words: Sequence[bytes], counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        numbers = self._learned(words)
        num_words = np.array(counts, np.int64)
        is_word = ~self._are_labels.array[numbers]
        if not is_word.all():
            num_words = _sums(is_word, num_words)
            numbers = numbers[is_word]
        rows, lengths = self._rows_of(numbers)
        lengths = _sums(lengths, num_words)
        if self.hashing.word_ngrams < 2:
            return rows, lengths
        ngrams, num_ngrams = self._word_ngrams(self._hashes.array[numbers], num_words)
        return _beside(rows, lengths, ngrams, num_ngrams), lengths + num_ngrams

    def _word_ngrams(self, hashes: np.ndarray, num_words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows of word n-grams, in the order of their first words, and how many each line has."""
        left = np.repeat(np.cumsum(num_words), num_words) - np.arange(len(hashes))  # words to the end of the line
        longest = min(self.hashing.word_ngrams, int(num_words.max(initial=1)))
        rows = np.full((len(hashes), longest - 1), -1)
        first = np.arange(len(hashes))
        state = hashes
        for n in range(2, longest + 1):
            longer = left[first] >= n
            first = first[longer]
            state = state[longer] * np.uint64(_NGRAM_FACTOR) + hashes[first + n - 1]
            rows[first, n - 2] = self.hashing.rows(state)
        there = rows >= 0
        return rows[there], _sums(there.sum(axis=1), num_words)

    def _rows_of(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows of learned words, and how many each has."""
        counts = self._counts.array[numbers]
        return _ragged(self._rows.array, self._starts.array[numbers], counts), counts

    def _learned(self, words: Sequence[bytes]) -> np.ndarray:
        """The numbers of words, of which new ones are learned."""
        try:
            return self._known(words)
        except KeyError:
            if len(self._numbers) > _REMEMBERED or len(self._rows.array) > _REMEMBERED_ROWS:
                self._forget()
            self._learn([word for word in dict.fromkeys(words) if word not in self._numbers])
            return self._known(words)

    def _known(self, words: Sequence[bytes]) -> np.ndarray:
        return np.fromiter(map(self._numbers.__getitem__, words), np.int64, len(words))

    def _learn(self, words: list[bytes]) -> None:
        words.sort(key=END.__eq__)  # the one that has no subwords goes last
        spelled = words[: len(words) - (words[-1] == END)]
        text = _Spelled(spelled)
        num_words = len(self.hashing.words)
        entry = np.fromiter((self._entries.get(word, -1) for word in words), np.int64, len(words))
        unknown_label = [e < 0 and word.startswith(LABEL_PREFIX) for e, word in zip(entry, words, strict=True)]
        # As a word, a label of word vectors has the row of its number, which is an n-gram's if it is there.
        own = (entry >= 0) & (entry < self.hashing.num_rows)
        subwords, num_subwords = text.subwords(self.hashing)
        num_subwords = np.append(num_subwords, np.zeros(len(words) - len(spelled), np.int64))
        counts = own + num_subwords
        self._numbers.update(zip(words, itertools.count(len(self._numbers)), strict=False))
        self._starts.extend(_starts(counts) + len(self._rows.array))
        self._rows.extend(_beside(entry[own], own.astype(np.int64), subwords, num_subwords))
        self._counts.extend(counts)
        self._are_labels.extend((entry >= num_words) | unknown_label)
        if self.hashing.word_ngrams > 1:
            end = [_folded(_FIRST, END)] * (len(words) - len(spelled))
            hashes = np.append(text.hashes(), np.array(end, np.uint32))
            self._hashes.extend(hashes.view(np.int32).astype(np.int64).view(np.uint64))  # fastText's have a sign


class _Spelled:
    """Words as one array of bytes, each between ``<`` and ``>``."""

    def __init__(self, words: Sequence[bytes]) -> None:
        self._bytes = np.frombuffer(b"<" + b"><".join(words) + b">" if words else b"", np.uint8)
        # fastText's bytes have a sign: from 0x80 on, they flip the upper bits of a hash too.
        self._signed = self._bytes.view(np.int8).astype(np.int32).view(np.uint32)
        self._lengths = np.fromiter(map(len, words), np.int64, len(words)) + 2

    def hashes(self) -> np.ndarray:
        """The hash of each word, uint32."""
        return self._fold(np.full(len(self._lengths), _FIRST, np.uint32), _starts(self._lengths) + 1, self._lengths - 2)

    def subwords(self, hashing: Hashing) -> tuple[np.ndarray, np.ndarray]:
        """The rows of the words' subwords, in the order of their first characters, and how many each word has."""
        if hashing.maxn < 1 or not len(self._lengths):
            return np.empty(0, np.int64), np.zeros(len(self._lengths), np.int64)
        begins = np.flatnonzero((self._bytes & 0xC0) != 0x80)  # of characters
        sizes = np.diff(begins, append=len(self._bytes))
        num_chars = np.diff(np.searchsorted(begins, _starts(self._lengths)), append=len(begins))
        left = np.repeat(np.cumsum(num_chars), num_chars) - np.arange(len(begins))  # characters to the end of the word
        lowest, longest = max(hashing.minn, 1), min(hashing.maxn, int(num_chars.max()))
        rows = np.full((len(begins), max(longest - lowest + 1, 0)), -1)
        first = np.arange(len(begins))
        state = np.full(len(begins), _FIRST, np.uint32)
        for n in range(1, longest + 1):
            longer = left[first] >= n
            first = first[longer]
            state = self._fold(state[longer], begins[first + n - 1], sizes[first + n - 1])
            if n >= lowest:
                rows[first, n - lowest] = hashing.rows(state)
        if lowest == 1:  # neither < nor > alone is a subword
            rows[np.cumsum(num_chars) - 1, 0] = rows[_starts(num_chars), 0] = -1
        there = rows >= 0
        return rows[there], _sums(there.sum(axis=1), num_chars)

    def _fold(self, state: np.ndarray, begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """FNV-1a's states after more bytes: ``lengths`` of them, from ``begins`` on."""
        state = state.copy()
        for number in np.flatnonzero(lengths > _LONG):
            begin = begins[number]
            state[number] = _folded(int(state[number]), self._bytes[begin : begin + lengths[number]].tobytes())
        some = np.flatnonzero(lengths <= _LONG)
        for k in range(int(lengths[some].max(initial=0))):
            some = some[lengths[some] > k]
            state[some] = (state[some] ^ self._signed[begins[some] + k]) * np.uint32(_PRIME)
        return state


class _Growing:
    """An array that grows at its end."""

    def __init__(self, dtype: type) -> None:
        self._all: np.ndarray = np.empty(1024, dtype)
        self._size = 0

    @property
    def array(self) -> np.ndarray:
        return self._all[: self._size]

    def extend(self, values: np.ndarray) -> None:
        size = self._size + len(values)
        if size > len(self._all):
            larger = np.empty(2 * size, self._all.dtype)
            larger[: self._size] = self.array
            self._all = larger
        self._all[self._size : size] = values
        self._size = size


def _folded(state: int, text: bytes) -> int:
    """FNV-1a's state after more bytes."""
    for byte in text:
        state = ((state ^ (byte if byte < 0x80 else byte | 0xFFFFFF00)) * _PRIME) & 0xFFFFFFFF
    return state


def _bytes(text: str | bytes) -> bytes:
    if not isinstance(text, (str, bytes)):
        raise TypeError(f"a text is a {type(text).__name__}, expected str or bytes")
    return text.encode() if isinstance(text, str) else text


def _lines(texts: Iterable[str | bytes]) -> Iterator[bytes]:
    """Each text as bytes."""
    if isinstance(texts, (str, bytes)):
        raise TypeError(f"texts is one {type(texts).__name__}, expected a sequence of them")
    for text in texts:
        line = _bytes(text)
        if b"\n" in line:
            raise ValueError(f"a text has a line feed, and fastText's are single lines: {text[:60]!r}")
        yield line


def _starts(counts: np.ndarray) -> np.ndarray:
    """Where each of the groups begins that have these numbers of members."""
    return np.cumsum(counts) - counts


def _sums(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The sum of each group of values."""
    before = np.cumsum(np.append(0, values))
    ends = np.cumsum(counts)
    return before[ends] - before[ends - counts]


def _ragged(values: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Groups of values, one after another."""
    return values[np.arange(counts.sum()) + np.repeat(starts - _starts(counts), counts)]


def _beside(first: np.ndarray, num_first: np.ndarray, second: np.ndarray, num_second: np.ndarray) -> np.ndarray:
    """Groups of values, each with a group of others behind it."""
    starts = _starts(num_first + num_second)
    joined = np.empty(len(first) + len(second), first.dtype)
    joined[np.arange(len(first)) + np.repeat(starts - _starts(num_first), num_first)] = first
    joined[np.arange(len(second)) + np.repeat(starts + num_first - _starts(num_second), num_second)] = second
    return joined
