"""fastText's binary models, .bin and .ftz: read in proportion to the file, and with their tables mapped.

A file is little-endian and has these parts, one after another: a magic number and a version; the arguments of the
training that a prediction needs; the dictionary (words, then labels, then which n-grams were kept); the table of the
rows that a text is the mean of; the table of the rows that a label is scored by. A table is float32, or in a .ftz
product-quantized: a row is pieces of ``dsub`` numbers, each one of 256 centroids of its place.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import struct
from collections.abc import Iterator
from typing import Literal, NamedTuple, NoReturn

import numpy as np

_MAGIC = struct.pack("<i", 793712314)
_VERSIONS = (11, 12)
_MODELS: tuple[ModelKind, ...] = ("cbow", "skipgram", "supervised")
_LOSSES: tuple[Loss, ...] = ("hs", "ns", "softmax", "ova")
ModelKind = Literal["cbow", "skipgram", "supervised"]
Loss = Literal["hs", "ns", "softmax", "ova"]
#: Centroids of each place of a product-quantized row.
CENTROIDS = 256
_ROWS_AT_ONCE = 1 << 14
#: The longest n-grams, of characters or words: a text costs time with their length.
_LONGEST_NGRAM = 1000
#: What an entry of the dictionary takes beside its text: a zero byte, its count and its type.
_ENTRY = 10


class Arguments(NamedTuple):
    """The arguments of the training, as the file has them; those that nothing here needs stand for completeness."""

    dim: int
    ws: int
    epoch: int
    min_count: int
    neg: int
    word_ngrams: int
    loss: int
    model: int
    bucket: int
    minn: int
    maxn: int
    lr_update_rate: int
    t: float


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A product-quantized table [V, dim]: row r is ``norms[r]`` times its centroids, one beside the other.

    Attributes:
        codes: uint8 [V, pieces], which centroid each piece of a row is; mapped.
        centroids: float32 [pieces, 256, dsub]; the last piece is padded with zeros where dsub does not divide dim.
        dim: numbers of a row.
        norms: float32 [V], or None where every row is as its centroids are.
    """

    codes: np.ndarray
    centroids: np.ndarray
    dim: int
    norms: np.ndarray | None

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.codes), self.dim

    def blocks(self) -> Iterator[np.ndarray]:
        """The rows as float32 [n, dim], a few thousand at a time."""
        pieces = np.arange(self.codes.shape[1])
        for start in range(0, len(self.codes), _ROWS_AT_ONCE):
            codes = self.codes[start : start + _ROWS_AT_ONCE]
            rows = self.centroids[pieces, codes].reshape(len(codes), -1)[:, : self.dim]
            yield rows if self.norms is None else rows * self.norms[start : start + _ROWS_AT_ONCE, None]


@dataclasses.dataclass(frozen=True)
class Head:
    """What a file says before its tables: all that turns texts into rows.

    Attributes:
        version: of the format, 11 or 12.
        kind, loss: what was trained, and how.
        arguments: those of the training; ``maxn`` is 0 where a file of version 11 has another one that does not count.
        words: the words of the dictionary, UTF-8 unless the training text was not.
        labels: the labels, likewise, with their prefix.
        label_counts: how often each label was seen, int64.
        kept: the n-grams that are left of a pruned model: their numbers in [0, bucket), ascending, and where their rows
            are behind those of the words; None where all are there.
        content: the bytes of the file that say this.
    """

    version: int
    kind: ModelKind
    loss: Loss
    arguments: Arguments
    words: list[bytes]
    labels: list[bytes]
    label_counts: np.ndarray
    kept: tuple[np.ndarray, np.ndarray] | None
    content: bytes

    @property
    def has_ngrams(self) -> bool:
        """Whether rows stand for n-grams, of characters or of words."""
        return self.arguments.maxn > 0 or (self.kind == "supervised" and self.arguments.word_ngrams > 1)

    @property
    def num_rows(self) -> int:
        """How many rows the input table has at least."""
        if not self.has_ngrams:
            return len(self.words)
        ngrams = self.arguments.bucket if self.kept is None else int(self.kept[1].max(initial=-1)) + 1
        return len(self.words) + ngrams


@dataclasses.dataclass(frozen=True)
class Model:
    """What a file holds.

    Attributes:
        head: what it says before its tables.
        input: the table that a text is the mean of, float32 [rows, dim] mapped, or quantized.
        output: the table that labels are scored by, [num_labels, dim] ([num_words, dim] of word vectors).
    """

    head: Head
    input: np.ndarray | Quantized
    output: np.ndarray | Quantized


def is_fasttext(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as fastText's do.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def read(path: str | os.PathLike[str]) -> Model:
    """A file's model. Its tables are mapped: nothing of them is read before somebody asks for it.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a model of fastText's, or a broken one; the message has the field and where it lies.
    """
    path = os.fspath(path)
    if os.path.getsize(path) == 0:  # which cannot be mapped
        raise ValueError(f"{path}: not a fastText model: the file is empty")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return _Reader(path, mapped, np.memmap(file, np.uint8, "r")).model()


def read_head(content: bytes, name: str) -> Head:
    """What `Head.content` says.

    Args:
        name: of where it is from, as messages begin.

    Raises:
        ValueError: it is something else.
    """
    return _Reader(name, content, np.frombuffer(content, np.uint8)).head()


class _Reader:
    """Reads one field after another; ``at`` is where the next one begins."""

    def __init__(self, path: str, mapped: mmap.mmap | bytes, data: np.ndarray) -> None:
        self.path, self.mapped, self.data = path, mapped, data
        self.size, self.at = len(data), 0

    def fail(self, field: str, what: str, at: int | None = None) -> NoReturn:
        raise ValueError(f"{self.path}: broken fastText model: {field} at byte {self.at if at is None else at} {what}")

    def take(self, field: str, count: int) -> int:
        """Where ``count`` bytes begin, which are passed over."""
        if not 0 <= count <= self.size - self.at:
            self.fail(field, f"takes {count} bytes, and the file has {self.size - self.at} more")
        begin, self.at = self.at, self.at + count
        return begin

    def number(self, field: str, form: str, low: float, high: float) -> int:
        """A number that has to be in [low, high]."""
        begin = self.take(field, struct.calcsize("<" + form))
        (value,) = struct.unpack_from("<" + form, self.mapped, begin)
        if not low <= value <= high:
            ends = f"at least {low}" if high == float("inf") else f"in [{low}, {high}]"
            self.fail(field, f"is {value}, expected {ends}", begin)
        return int(value)

    def array(self, field: str, dtype: str, *shape: int) -> np.ndarray:
        """An array of the file, mapped."""
        count = int(np.prod(shape, dtype=object))
        begin = self.take(field, count * np.dtype(dtype).itemsize)
        found = np.asarray(self.data[begin : self.at]).view(dtype).reshape(shape)
        return found.astype(found.dtype.newbyteorder("="), copy=False)

    def model(self) -> Model:
        head = self.head()
        dim = head.arguments.dim
        quantized = bool(self.number("the flag of quantization", "b", 0, 1))
        if head.kept is not None and not quantized:
            self.fail("the flag of quantization", "is 0, but the dictionary is pruned", self.at - 1)
        begin = self.at
        table = self.table("input", dim, quantized)
        if table.shape[0] < head.num_rows:
            what = f"has {table.shape[0]} rows, but the dictionary needs {head.num_rows}"
            self.fail("the input", what, begin)
        quantized &= bool(self.number("the flag of the output's quantization", "b", 0, 1))
        begin = self.at
        output = self.table("output", dim, quantized)
        targets = len(head.labels if head.kind == "supervised" else head.words)
        if output.shape[0] != targets:
            self.fail("the output", f"has {output.shape[0]} rows, expected {targets}", begin)
        return Model(head, table, output)

    def head(self) -> Head:
        begins = bytes(self.mapped[: len(_MAGIC)])
        if begins != _MAGIC:
            raise ValueError(
                f"{self.path}: not a fastText model: it begins with {begins.hex(' ') or 'nothing'}, "
                f"expected {_MAGIC.hex(' ')}"
            )
        self.at = len(_MAGIC)
        version = self.number("version", "i", -(2**31), 2**31 - 1)
        if version not in _VERSIONS:
            raise ValueError(f"{self.path}: a fastText model of version {version}, expected 11 or 12")
        arguments = self.arguments()
        kind = _MODELS[arguments.model - 1]
        if version == 11 and kind == "supervised":
            arguments = arguments._replace(maxn=0)  # such models have no subwords, whatever they say
        words, labels, label_counts, kept = self.dictionary(arguments)
        loss, content = _LOSSES[arguments.loss - 1], bytes(self.mapped[: self.at])
        head = Head(version, kind, loss, arguments, words, labels, label_counts, kept, content)
        if head.has_ngrams and arguments.bucket == 0:
            raise ValueError(f"{self.path}: broken fastText model: bucket is 0, but there are n-grams")
        return head

    def arguments(self) -> Arguments:
        ends = {
            "dim": (1, 2**31 - 1),
            "word_ngrams": (-(2**31), _LONGEST_NGRAM),
            "loss": (1, len(_LOSSES)),
            "model": (1, len(_MODELS)),
            "bucket": (0, 2**31 - 1),
            "maxn": (-(2**31), _LONGEST_NGRAM),
        }
        names = Arguments._fields[:-1]
        numbers = [self.number(name, "i", *ends.get(name, (-(2**31), 2**31 - 1))) for name in names]
        begin = self.take("t", 8)
        return Arguments(*numbers, *struct.unpack_from("<d", self.mapped, begin))

    def dictionary(
        self, arguments: Arguments
    ) -> tuple[list[bytes], list[bytes], np.ndarray, tuple[np.ndarray, np.ndarray] | None]:
        """Words, labels, the counts of the labels, and what is kept of the n-grams."""
        most = (self.size - self.at) // _ENTRY
        begin = self.at
        size = self.number("the number of entries", "i", 0, most)
        num_words = self.number("the number of words", "i", 0, size)
        num_labels = self.number("the number of labels", "i", size - num_words, size - num_words)
        self.number("the number of tokens", "q", -(2**63), 2**63 - 1)
        num_kept = self.number("the number of kept n-grams", "q", -1, most)
        if arguments.model == 3 and num_labels == 0:
            self.fail("the number of labels", "is 0 in a model of labels", begin + 8)
        entries, counts = self.entries(size, num_words)
        kept = None
        if num_kept >= 0:
            kept = self.kept(num_kept, arguments.bucket)
        return entries[:num_words], entries[num_words:], counts[num_words:], kept

    def entries(self, size: int, num_words: int) -> tuple[list[bytes], np.ndarray]:
        """The words and labels, and their counts."""
        entries, ends = [], []
        find, mapped, at = self.mapped.find, self.mapped, self.at
        for number in range(size):
            end = find(b"\0", at)
            if end < 0 or end + _ENTRY > self.size:
                self.fail(f"entry {number} of the dictionary", "has no end", at)
            entries.append(mapped[at:end])
            ends.append(end)
            at = end + _ENTRY
        after = np.array(ends, np.int64).reshape(-1, 1)
        types = self.data[after[:, 0] + 9]
        wrong = np.flatnonzero(types != (np.arange(size) >= num_words))
        if len(wrong):
            number = int(wrong[0])
            expected = "0, a word" if number < num_words else "1, a label"
            self.fail(
                f"the type of entry {number} of the dictionary",
                f"is {types[number]}, expected {expected}",
                int(ends[number]) + 9,
            )
        self.at = at
        counts = np.ascontiguousarray(self.data[after + np.arange(1, 9)]).view("<i8").astype(np.int64)
        return entries, counts.reshape(-1)

    def kept(self, count: int, bucket: int) -> tuple[np.ndarray, np.ndarray]:
        begin = self.at
        pairs = self.array("the kept n-grams", "<i4", count, 2)
        # fastText keeps the last of a number's rows, and so does this: the first of the reversed ones.
        numbers, first = np.unique(pairs[::-1, 0], return_index=True)
        rows = pairs[::-1, 1][first]
        if count and (numbers[0] < 0 or numbers[-1] >= bucket):
            self.fail("the kept n-grams", f"have numbers outside [0, {bucket})", begin)
        if count and rows.min() < 0:
            self.fail("the kept n-grams", f"have a row {rows.min()}", begin)
        return numbers, rows.astype(np.int64)

    def table(self, field: str, dim: int, quantized: bool) -> np.ndarray | Quantized:
        if quantized:
            return self.quantized(field, dim)
        rows = self.number(f"the rows of the {field}", "q", 0, self.size // (4 * dim))
        self.number(f"the columns of the {field}", "q", dim, dim)
        return self.array(f"the {field}", "<f4", rows, dim)

    def quantized(self, field: str, dim: int) -> Quantized:
        has_norms = self.number(f"the flag of the {field}'s norms", "b", 0, 1)
        rows = self.number(f"the rows of the {field}", "q", 0, self.size)
        self.number(f"the columns of the {field}", "q", dim, dim)
        count = self.number(f"the number of codes of the {field}", "i", 0, self.size)
        if count % max(rows, 1) or (rows == 0) != (count == 0):
            self.fail(f"the number of codes of the {field}", f"is {count}, for {rows} rows", self.at - 4)
        codes = self.array(f"the codes of the {field}", "u1", count)
        centroids = self.centroids(field, dim)
        pieces = len(centroids)
        if rows * pieces != count:
            self.fail(f"the {field}", f"has {count} codes, for {rows} rows of {pieces} pieces")
        norms = None
        if has_norms:
            kinds = self.array(f"the norms of the {field}", "u1", rows)
            norms = self.centroids(f"norms of the {field}", 1)[0, :, 0][kinds]
        return Quantized(codes.reshape(rows, pieces), centroids, dim, norms)

    def centroids(self, field: str, dim: int) -> np.ndarray:
        """The centroids [pieces, 256, dsub] of a product quantizer."""
        self.number(f"the size of the quantizer of the {field}", "i", dim, dim)
        pieces = self.number(f"the pieces of the quantizer of the {field}", "i", 1, dim)
        dsub = self.number(f"the size of a piece of the {field}", "i", 1, dim)
        last = self.number(f"the size of the last piece of the {field}", "i", 1, dsub)
        if (pieces - 1) * dsub + last != dim:
            self.fail(
                f"the quantizer of the {field}",
                f"has {pieces} pieces of {dsub}, the last of {last}, which are not {dim}",
                self.at - 12,
            )
        flat = self.array(f"the centroids of the {field}", "<f4", dim * CENTROIDS)
        found = np.zeros((pieces, CENTROIDS, dsub), np.float32)
        whole = (pieces - 1) * CENTROIDS * dsub
        found[:-1] = flat[:whole].reshape(pieces - 1, CENTROIDS, dsub)
        found[-1, :, :last] = flat[whole:].reshape(CENTROIDS, last)
        return found
