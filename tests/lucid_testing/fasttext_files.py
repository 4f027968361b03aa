"""A slow fastText of our own: its files, its hashing and its arithmetic, written down once more to test against."""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Sequence

import numpy as np

MODELS = {"cbow": 1, "skipgram": 2, "supervised": 3}
LOSSES = {"hs": 1, "ns": 2, "softmax": 3, "ova": 4}


@dataclasses.dataclass
class Table:
    """A table as the file has it: ``rows``, or centroids [dim * 256] and codes [V, pieces] of pieces of ``dsub``."""

    rows: np.ndarray
    codes: np.ndarray | None = None
    centroids: np.ndarray | None = None
    dsub: int = 0
    norm_codes: np.ndarray | None = None
    norm_centroids: np.ndarray | None = None

    @classmethod
    def quantized(cls, rows: int, dim: int, dsub: int, norms: bool, random: np.random.RandomState) -> Table:
        """A table of random codes and centroids."""
        pieces = -(-dim // dsub)
        codes = random.randint(0, 256, (rows, pieces)).astype(np.uint8)
        centroids = random.standard_normal(dim * 256).astype(np.float32)
        table = cls(np.empty((rows, dim), np.float32), codes, centroids, dsub)
        if norms:
            table.norm_codes = random.randint(0, 256, rows).astype(np.uint8)
            table.norm_centroids = random.uniform(0.5, 2, 256).astype(np.float32)
        for r in range(rows):
            at = 0
            for piece, code in enumerate(codes[r].tolist()):
                size = min(dsub, dim - piece * dsub)
                begin = piece * 256 * dsub + code * size
                table.rows[r, at : at + size] = centroids[begin : begin + size]
                at += size
            if table.norm_codes is not None and table.norm_centroids is not None:
                table.rows[r] *= table.norm_centroids[table.norm_codes[r]]
        return table

    def content(self) -> bytes:
        rows, dim = self.rows.shape
        if self.codes is None or self.centroids is None:
            return struct.pack("<qq", rows, dim) + self.rows.astype("<f4").tobytes()
        last = dim - (self.codes.shape[1] - 1) * self.dsub
        found = struct.pack("<?qqi", self.norm_codes is not None, rows, dim, self.codes.size) + self.codes.tobytes()
        found += struct.pack("<iiii", dim, self.codes.shape[1], self.dsub, last) + self.centroids.tobytes()
        if self.norm_codes is not None and self.norm_centroids is not None:
            found += self.norm_codes.tobytes() + struct.pack("<iiii", 1, 1, 1, 1) + self.norm_centroids.tobytes()
        return found


@dataclasses.dataclass
class SlowFastText:
    """A model. Words and labels are bytes, with the number of times they were seen."""

    words: dict[bytes, int]
    labels: dict[bytes, int]
    input: Table
    output: Table
    kind: str = "supervised"
    loss: str = "softmax"
    minn: int = 0
    maxn: int = 0
    word_ngrams: int = 1
    bucket: int = 0
    kept: dict[int, int] | None = None
    version: int = 12

    def content(self) -> bytes:
        """The file."""
        dim = self.input.rows.shape[1]
        found = struct.pack("<ii", 793712314, self.version)
        found += struct.pack("<iiiiii", dim, 5, 5, 1, 5, self.word_ngrams)
        found += struct.pack("<ii", LOSSES[self.loss], MODELS[self.kind])
        found += struct.pack("<iiii", self.bucket, self.minn, self.maxn, 100) + struct.pack("<d", 1e-4)
        found += struct.pack("<iii", len(self.words) + len(self.labels), len(self.words), len(self.labels))
        found += struct.pack("<qq", 1000, -1 if self.kept is None else len(self.kept))
        for kind, entries in enumerate((self.words, self.labels)):
            for text, count in entries.items():
                found += text + struct.pack("<bqb", 0, count, kind)
        for pair in (self.kept or {}).items():
            found += struct.pack("<ii", *pair)
        for table in (self.input, self.output):
            found += struct.pack("<?", table.codes is not None) + table.content()
        return found

    # ---- Texts to rows.

    @staticmethod
    def hash(text: bytes) -> int:
        h = 2166136261
        for byte in text:
            h ^= (byte - 256 if byte > 127 else byte) % 2**32
            h = h * 16777619 % 2**32
        return h

    def _pushed(self, number: int) -> list[int]:
        if self.kept is not None:
            if number not in self.kept:
                return []
            number = self.kept[number]
        return [len(self.words) + number]

    def subwords(self, word: bytes) -> list[int]:
        """Rows of the pieces of a word between < and >."""
        chars: list[bytes] = []
        for byte in b"<" + word + b">":
            if byte & 0xC0 == 0x80:
                chars[-1] += bytes([byte])
            else:
                chars.append(bytes([byte]))
        found = []
        for i in range(len(chars)):
            for n in range(1, self.maxn + 1):
                end = i + n
                if end > len(chars):
                    break
                alone = n == 1 and (i == 0 or end == len(chars))
                if n >= self.minn and not alone:
                    found += self._pushed(self.hash(b"".join(chars[i:end])) % self.bucket)
        return found

    def word(self, word: bytes) -> list[int]:
        """Rows of a word, as for ``get_word_vector``."""
        entries = [*self.words, *self.labels]
        own = [entries.index(word)] if word in entries else []
        return own + ([] if word == b"</s>" else self.subwords(word))

    def line(self, text: bytes) -> list[int]:
        """Rows of a text, as for ``predict``."""
        words = [b""]
        for byte in text + b"\n":
            if byte in b" \n\r\t\v\f\0":
                words.append(b"")
            else:
                words[-1] += bytes([byte])
        rows, hashes = [], []
        for word in [*filter(None, words), b"</s>"]:
            if word in self.words or (word not in self.labels and not word.startswith(b"__label__")):
                rows += self.word(word)
                h = self.hash(word)
                hashes.append(h - 2**32 if h >= 2**31 else h)
            if word == b"</s>":
                break
        for i, first in enumerate(hashes):
            h = first % 2**64
            for following in hashes[i + 1 : i + self.word_ngrams]:
                h = (h * 116049371 + following) % 2**64
                rows += self._pushed(h % self.bucket)
        return rows

    # ---- Rows to labels.

    def mean(self, rows: Sequence[int]) -> np.ndarray:
        dim = self.input.rows.shape[1]
        return self.input.rows[list(rows)].astype(np.float64).mean(axis=0) if len(rows) else np.zeros(dim)

    def sentence(self, text: bytes) -> np.ndarray:
        """The vector of a text, as ``get_sentence_vector``."""
        if self.kind == "supervised":
            return self.mean(self.line(text))
        vectors = [self.mean(self.word(word)) for word in text.split()]
        units = [v / np.linalg.norm(v) for v in vectors if np.linalg.norm(v) > 0]
        return np.mean(units, axis=0) if units else np.zeros(self.input.rows.shape[1])

    def logits(self, text: bytes) -> np.ndarray:
        return self.output.rows.astype(np.float64) @ self.mean(self.line(text))

    def probabilities(self, text: bytes) -> np.ndarray:
        """The probability of each label, in their order; 0 of one that fastText does not say."""
        if not self.line(text):
            return np.zeros(len(self.labels))
        logits = self.logits(text)
        if self.loss == "softmax":
            e = np.exp(logits - logits.max())
            return e / e.sum() + 1e-5
        if self.loss == "hs":
            return self._tree(logits)
        return np.array([self._logistic(x) for x in logits]) + 1e-5

    @staticmethod
    def _logistic(x: float) -> float:
        if abs(x) > 8:
            return float(x > 0)
        step = int((x + 8) * 512 / 8 / 2)
        return 1 / (1 + math.exp(-(step * 16 / 512 - 8)))

    def _tree(self, logits: np.ndarray) -> np.ndarray:
        """Huffman's tree by merging, and the product along each way down."""
        num_labels = len(self.labels)
        found = np.zeros(num_labels)
        leaves = [(count, label) for label, count in enumerate(self.labels.values())]
        merged: list[tuple[int, object]] = []
        for row in range(num_labels - 1):
            pair = []
            for _ in range(2):
                take_leaf = leaves and (not merged or leaves[-1][0] < merged[0][0])
                pair.append(leaves.pop() if take_leaf else merged.pop(0))
            merged.append((pair[0][0] + pair[1][0], (row, pair[0][1], pair[1][1])))

        def descend(node: object, score: float) -> None:
            if score < math.log(1e-5):
                return
            if isinstance(node, int):
                found[node] = math.exp(score)
            elif isinstance(node, tuple):
                row, left, right = node
                p = 1 / (1 + math.exp(-logits[row]))
                descend(left, score + math.log(1 - p + 1e-5))
                descend(right, score + math.log(p + 1e-5))

        descend(merged[0][1] if merged else 0, 0.0)
        return found
