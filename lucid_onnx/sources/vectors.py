"""Vectors of words: GloVe's text, word2vec's text and binary files, and a .npy file with a list of words."""

from __future__ import annotations

import mmap
import re
import statistics
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from . import arrays, npy
from .graphs import Static, imported
from .imported import Imported, Options, Progress
from .tokenizer import parse
from .words import Words

#: What the beginning of a file is told by.
_BEGINNING = 2**18
_BLOCK = 2**22
_LONGEST_LINE = 2**24
#: Bytes of a word in a binary file.
_LONGEST_WORD = 2**12
#: Lines whose fields are counted to find the dimension: a word may have spaces in it.
_COUNTED = 100
_HEADER = re.compile(rb"([1-9]\d{0,14})[ \t]([1-9]\d{0,8})[ \t]*\r?\n")
_SPACE = b" \t\r"
_FLOAT32 = np.dtype(np.float32)
_SMALLEST_NORM = 1e-12


class TextVectors:
    """A line per word: the word, then its numbers; with the counts of words and numbers in the first line, or not."""

    name = "text-vectors"
    files = "GloVe's or word2vec's text, or fastText's .vec: a word and its numbers in each line"

    def recognises(self, path: Path) -> bool:
        return path.is_file() and _is_text(_beginning(path))

    def load(self, path: Path, options: Options) -> Imported:
        options.check_only(self.name)
        beginning = _beginning(path)
        if not _is_text(beginning):
            raise ValueError(f"{path}: its first lines are not a word and its numbers each")
        header = _HEADER.match(beginning)
        lines = beginning[header.end() if header else 0 :].split(b"\n")[:_COUNTED]
        dim = int(header[2]) if header else statistics.mode(len(line.split()) for line in lines if line.strip()) - 1
        with path.open("rb") as file:
            file.seek(header.end() if header else 0)
            words, rows = _read_text(path, file, dim, 2 if header else 1, options.progress)
        if header and len(words) != int(header[1]):
            raise ValueError(f"{path}: has {len(words)} words, and its first line says {int(header[1])}")
        return _words_and_rows(self.name, path, words, rows, options)


class Word2Vec:
    """word2vec's binary file: a line with the counts; then of each word its bytes, a space, and its numbers."""

    name = "word2vec"
    files = "word2vec's binary file"

    def recognises(self, path: Path) -> bool:
        return path.is_file() and _is_binary(_beginning(path), path.stat().st_size)

    def load(self, path: Path, options: Options) -> Imported:
        options.check_only(self.name)
        beginning = _beginning(path)
        header = _HEADER.match(beginning)
        if header is None or not _is_binary(beginning, path.stat().st_size):
            raise ValueError(f"{path}: is not a line with two counts and as many words and numbers")
        count, dim = int(header[1]), int(header[2])
        rows, words = arrays.new_array((count, dim), _FLOAT32), []
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            at, size = header.end(), len(data)
            for row in range(count):
                space = data.find(b" ", at, at + _LONGEST_WORD)
                end = space + 1 + 4 * dim
                if space < 0 or end > size:
                    raise ValueError(f"{path}: ends, or is broken, at word {row} of {count}")
                words.append(data[at:space].lstrip(b"\n").decode("utf-8", "replace"))
                rows[row] = np.frombuffer(data[space + 1 : end], "<f4")
                at = end
                if options.progress is not None and row % 4096 == 0:
                    options.progress(at, size)
            if data[at : at + 2].strip():
                raise ValueError(f"{path}: has more than the {count} words that its first line says")
        return _words_and_rows(self.name, path, words, rows, options)


class NumPyVectors:
    """A .npy file [V, D], and the words of its rows in another file."""

    name = "npy"
    files = "a .npy file [V, D] with the words of its rows in <name>.txt or <name>.vocab beside it, or --vocabulary"

    def recognises(self, path: Path) -> bool:
        return path.is_file() and _beginning(path, len(npy.MAGIC)) == npy.MAGIC

    def load(self, path: Path, options: Options) -> Imported:
        options.check_only(self.name, "vocabulary")
        beside = [path.with_suffix(suffix) for suffix in (".txt", ".vocab")]
        given = [p for p in beside if p.is_file()] if options.vocabulary is None else [Path(options.vocabulary)]
        if not given:
            raise ValueError(f"{path}: which words are its rows? give the file of the vocabulary, one word a line")
        rows = arrays.checked(npy.read(path), f"{path}: the array")
        return _words_and_rows(self.name, path, _vocabulary(given[0]), rows, options)


FORMATS = (NumPyVectors(), TextVectors(), Word2Vec())


def _words_and_rows(name: str, path: Path, words: Sequence[str], rows: np.ndarray, options: Options) -> Imported:
    if len(words) != len(rows):
        raise ValueError(f"{path}: there are {len(words)} words for {len(rows)} rows")
    text = Words(words, str(path))
    static = Static(
        table=rows,
        output=rows.dtype.newbyteorder("="),
        smallest_norm=_SMALLEST_NORM if options.normalize else None,
    )
    found = {"format": name, "source": path.name}
    broken = sum("\ufffd" in word for word in words)
    if broken:
        found["not UTF-8"] = f"{broken:,} words, which no text finds"
    return imported(static, text, found, options)


def _beginning(path: Path, size: int = _BEGINNING) -> bytes:
    with path.open("rb") as file:
        return file.read(size)


def _is_text(beginning: bytes) -> bool:
    """Whether the first lines of a file are a word and its numbers."""
    header = _HEADER.match(beginning)
    lines = beginning[header.end() if header else 0 :].split(b"\n")
    # The last piece is not known to be a whole line.
    whole = lines[:-1] if len(lines) > 1 else lines
    fields = whole[0].strip(_SPACE).split()
    if len(fields) < 2 or (header and len(fields) <= int(header[2])):
        return False
    try:
        for number in fields[1 - len(fields) :][-int(header[2]) if header else 0 :]:
            float(number)
    except ValueError:
        return False
    return header is not None or len(fields) > 2


def _is_binary(beginning: bytes, size: int) -> bool:
    """Whether a file of ``size`` bytes begins with counts for which it has room, and is not text."""
    header = _HEADER.match(beginning)
    if header is None or _is_text(beginning):
        return False
    count, dim = int(header[1]), int(header[2])
    return header.end() + count * (4 * dim + 1) <= size


def _lines(path: Path, file: BinaryIO, progress: Progress | None) -> Iterator[list[bytes]]:
    """The lines of a file in blocks, without line breaks."""
    size, rest = path.stat().st_size, b""
    while block := file.read(_BLOCK):
        *lines, rest = (rest + block).split(b"\n")
        if len(rest) > _LONGEST_LINE:
            raise ValueError(f"{path}: has a line of more than {_LONGEST_LINE} bytes")
        yield lines
        if progress is not None:
            progress(file.tell(), size)
    if rest:
        yield [rest]


def _read_text(
    path: Path, file: BinaryIO, dim: int, number: int, progress: Progress | None
) -> tuple[list[str], np.ndarray]:
    """The words and their numbers, which go into a file without a name.

    Args:
        number: of the first line, for messages.
    """
    words: list[str] = []
    with tempfile.TemporaryFile(prefix="lucid-onnx-") as out:
        for lines in _lines(path, file, progress):
            numbers = []
            for at, line in enumerate(lines, number):
                bare = line.strip(_SPACE)
                if not bare:
                    continue
                if bare.count(b" ") == dim:
                    word, _, rest = bare.partition(b" ")
                else:  # tabs, or a word with a space in it
                    word, *parts = bare.rsplit(None, dim)
                    if len(parts) != dim:
                        raise ValueError(f"{path}: line {at} has {len(parts)} numbers, expected {dim}")
                    rest = b" ".join(parts)
                words.append(word.decode("utf-8", "replace"))
                numbers.append(rest)
            out.write(_numbers(path, numbers, dim, number).tobytes())
            number += len(lines)
        if not words:
            raise ValueError(f"{path}: has no words")
        out.flush()
        return words, np.asarray(np.memmap(out, _FLOAT32, "r", shape=(len(words), dim)))


def _numbers(path: Path, lines: Sequence[bytes], dim: int, first: int) -> np.ndarray:
    """Lines of ``dim`` numbers each, one after another."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            found = np.fromstring(b" ".join(lines), _FLOAT32, sep=" ")
            if len(found) == dim * len(lines):
                return found
        except (ValueError, DeprecationWarning):
            pass
    try:
        found = np.array([_number(text) for line in lines for text in line.split()], _FLOAT32)
    except ValueError as error:
        raise ValueError(f"{path}: in the lines from {first} on: {error}") from error
    if len(found) != dim * len(lines):
        raise ValueError(f"{path}: the lines from {first} on do not have {dim} numbers each")
    return found


def _number(text: bytes) -> float:
    try:
        if b"_" not in text:  # which Python takes in numbers
            return float(text)
    except ValueError:
        pass
    raise ValueError(f"{text[:40]!r} is not a number")


def _vocabulary(path: Path) -> list[str]:
    """Words from a file: a line each, which may end in the word's count; or JSON, a list or an object of rows."""
    content = path.read_bytes()
    if path.suffix == ".json":
        return _json_words(path, parse(b'{"words": ' + content + b"}", str(path))["words"])
    lines = [line.rstrip("\r") for line in content.decode("utf-8", "replace").split("\n")]
    if lines and not lines[-1]:
        lines.pop()
    counted = [re.fullmatch(r"(.+)[ \t]\d+", line) for line in lines]
    if all(counted):
        return [match[1] for match in counted if match]
    return lines


def _json_words(path: Path, found: Any) -> list[str]:
    if isinstance(found, dict):
        rows = list(found.values())
        if not all(isinstance(row, int) for row in rows) or sorted(rows) != list(range(len(rows))):
            raise ValueError(f"{path}: its words do not have the rows 0, 1, 2 and so on")
        found = sorted(found, key=found.__getitem__)
    if not isinstance(found, list) or not all(isinstance(word, str) for word in found):
        raise ValueError(f"{path}: is not a list of words, or an object of words and rows")
    return found
