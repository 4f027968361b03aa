"""Text to rows as fastText has it, its files and its trees: against a second writing of each."""

from __future__ import annotations

import concurrent.futures
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lucid_onnx.sources.fasttext import reader, tree, words
from lucid_onnx.sources.fasttext.words import Hashing, WordRows
from lucid_testing.fasttext_files import SlowFastText, Table

WORDS = {b"</s>": 90, b"the": 50, "naïve".encode(): 7, "日本".encode(): 5, b"\xff\x80\x80x": 3, b"a": 2, b"<b>": 2}
LABELS = {b"__label__x": 40, b"__label__y": 12, b"odd": 11, b"__label__z": 3}


def slow(dim: int = 4, seed: int = 0, rows: int | None = None, **given: Any) -> SlowFastText:
    """A model with random tables."""
    random = np.random.RandomState(seed)
    labels = given.pop("labels", LABELS)
    entries = given.pop("words", WORDS)
    kept = given.get("kept")
    if rows is None:
        rows = len(entries) + (given.get("bucket", 0) if kept is None else len(kept))
    targets = labels if given.get("kind", "supervised") == "supervised" else entries
    table = given.pop("input", None) or Table(random.standard_normal((rows, dim)).astype(np.float32))
    scores = given.pop("output", None) or Table(random.standard_normal((len(targets), dim)).astype(np.float32))
    return SlowFastText(entries, labels, table, scores, **given)


def hashing(model: SlowFastText) -> Hashing:
    """What our reader makes of its file."""
    return Hashing.of(reader.read_head(model.content(), "it"))


#: How words become rows, in turn with each other.
KINDS: dict[str, dict[str, Any]] = {
    "words alone": {},
    "word n-grams": {"word_ngrams": 3, "bucket": 1000},
    "subwords": {"minn": 2, "maxn": 4, "bucket": 997},
    "single characters": {"minn": 0, "maxn": 2, "bucket": 50},
    "both": {"minn": 3, "maxn": 6, "word_ngrams": 2, "bucket": 2**31 - 1, "rows": 1},
    "no lower end": {"minn": -3, "maxn": 1, "bucket": 7},
    "an empty range": {"minn": 5, "maxn": 3, "bucket": 7},
    "pruned": {"minn": 1, "maxn": 5, "word_ngrams": 4, "bucket": 300, "kept": {7 * k: 42 - k for k in range(43)}},
    "pruned of all": {"minn": 1, "maxn": 5, "word_ngrams": 4, "bucket": 300, "kept": {}},
    "one bucket": {"minn": 1, "maxn": 5, "word_ngrams": 4, "bucket": 1},
}
TEXTS = [
    "",
    " \t\r\v\f\0 ",
    "the naïve 日本 theory",
    "the\u2028the\u00a0the the\0a",
    "__label__x the __label__unknown odd __label__",
    "before </s> after",
    "</s>",
    "<b> < > <>",
    "x" * 3000,
    "\U0001f600\U0001f600 ﬁ é e\u0301",
]
RAW = [b"\x80", b"\x80\x80the \xff", b"\xff\x80\x80x a\xc3", b"\xe6" + b"\x80" * 200 + b"z"]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_texts(kind: str) -> None:
    model = slow(**KINDS[kind])
    rows = WordRows(hashing(model))
    texts = [*(text.encode() for text in TEXTS), *RAW]
    for some in (texts, texts[::-1], texts[:1], []):  # known words and new ones
        bags = rows.texts(some)
        assert len(bags.offsets) == len(some)
        found = np.split(bags.indices, bags.offsets[1:]) if some else []
        for text, got in zip(some, found, strict=True):
            assert got.tolist() == model.line(text), text[:50]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_words_and_sentences(kind: str) -> None:
    model = slow(**KINDS[kind], kind="skipgram")
    rows = WordRows(hashing(model))
    several = ["", "the", "new york", "</s>", "naïve", "odd", *RAW]
    bags = rows.words(several)
    for word, got in zip(several, np.split(bags.indices, bags.offsets[1:]), strict=True):
        expected = model.word(word.encode() if isinstance(word, str) else word)
        if word == "odd" and expected[0] >= hashing(model).num_rows:
            expected = expected[1:]  # fastText reads past the end of the table here
        assert got.tolist() == expected, word
    lines = ["the naïve", "", "a\0b a"]
    found = rows.sentences(lines)
    assert found.offsets.tolist() == [0, 2, 2]
    assert np.split(found.indices, found.word_offsets[1:])[2].tolist() == model.word(b"a\0b")
    empty = rows.sentences([])
    assert [len(array) for array in empty] == [0, 0, 0]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(max_size=30), max_size=4), st.integers(-1, 4), st.integers(0, 5), st.integers(1, 4), st.booleans()
)
@example(["\ud7ff\ue000"], 1, 3, 2, True)
def test_rows_of_any_text(texts: list[str], minn: int, maxn: int, word_ngrams: int, pruned: bool) -> None:
    kept = {k: k // 3 for k in range(0, 90, 3)} if pruned else None
    model = slow(minn=minn, maxn=maxn, word_ngrams=word_ngrams, bucket=101, kept=kept)
    lines = [text.replace("\n", " ").encode() for text in texts]
    bags = WordRows(hashing(model)).texts(lines)
    assert bags.indices.tolist() == [row for line in lines for row in model.line(line)]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.binary(max_size=30), max_size=4))
def test_rows_of_any_bytes(texts: list[bytes]) -> None:
    model = slow(minn=1, maxn=4, word_ngrams=2, bucket=101)
    lines = [text.replace(b"\n", b" ") for text in texts]
    bags = WordRows(hashing(model)).texts(lines)
    assert bags.indices.tolist() == [row for line in lines for row in model.line(line)]


def test_the_last_of_equal_entries_counts() -> None:
    content = slow(minn=2, maxn=2, bucket=9).content().replace(b"<b>\0", b"the\0")
    rows = WordRows(Hashing.of(reader.read_head(content, "it")))
    assert rows.words(["the"]).indices[0] == 6


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "_REMEMBERED", 5)
    monkeypatch.setattr(words, "_AT_ONCE", 4)
    model = slow(minn=2, maxn=3, word_ngrams=2, bucket=50)
    rows = WordRows(hashing(model))
    for k in range(9):
        line = f"the a{k} b{k} the c{k} d{k}"
        assert rows.texts([line, line]).indices.tolist() == 2 * model.line(line.encode())
        assert len(rows._numbers) < 16


def test_threads_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each forgets what another has just learned."""
    monkeypatch.setattr(words, "_REMEMBERED", 20)
    model = slow(minn=2, maxn=3, word_ngrams=2, bucket=50)
    rows = WordRows(hashing(model))
    lines = [f"the a{k} b{k} naïve" for k in range(40)]
    expected = [model.line(line.encode()) for line in lines]

    def ask(first: int) -> bool:
        numbers = [(first + k) % len(lines) for k in range(200)]
        return all(rows.texts([lines[k]]).indices.tolist() == expected[k] for k in numbers)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            assert all(pool.map(ask, (0, 10, 20, 30)))
    finally:
        sys.setswitchinterval(interval)


def test_texts_that_are_none() -> None:
    rows = WordRows(hashing(slow()))
    with pytest.raises(ValueError, match=r"^a text has a line feed, and fastText's are single lines: 'b\\nc'$"):
        rows.texts(["a", "b\nc"])
    with pytest.raises(TypeError, match=r"^texts is one str, expected a sequence of them$"):
        rows.sentences("the")
    with pytest.raises(TypeError, match=r"^a text is a int, expected str or bytes$"):
        rows.texts([3])  # type: ignore[list-item]
    with pytest.raises(UnicodeEncodeError):
        rows.texts(["\ud800"])


# ---- The tree of labels.


def steps(found: tree.Tree, label: int) -> list[int]:
    """The steps to a label, the first one first."""
    way, none = [int(found.last[label])], 2 * (len(found.last) - 1)
    while way[-1] != none:
        way.append(int(found.before[way[-1]]))
    return way[-2::-1]


def test_a_tree() -> None:
    """Of counts 4, 1, 1: labels 2 and 1 are merged to inner node 0, and that, of less, with label 0 to node 1."""
    found = tree.build(np.array([4, 1, 1]))
    assert [steps(found, label) for label in range(3)] == [[3], [1, 2], [1, 0]]
    assert (found.depth, found.order.tolist()) == (2, [2, 1, 0])


@pytest.mark.parametrize("counts", [[1], [0], [3, 3], [0, 0, 0, 0, 0], [2**40, 5, 5, 5, 1, 0], list(range(60, 0, -1))])
def test_trees_reach_every_label_once(counts: list[int]) -> None:
    found = tree.build(np.array(counts))
    ways = [steps(found, label) for label in range(len(counts))]
    assert max(map(len, ways)) == found.depth
    assert sum(2.0 ** -len(way) for way in ways) == 1  # all ways together are a whole tree
    inner = len(counts) - 1
    in_order = sorted(range(len(counts)), key=lambda label: [step >= inner for step in ways[label]])
    assert found.order.tolist() == in_order


@pytest.mark.parametrize("counts", [[5, -1], [10**15, 1]])
def test_counts_that_no_training_has(counts: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^the counts of the labels must be at least 0, and less than 1\d+ together$"):
        tree.build(np.array(counts))


# ---- Files.


def quantized(seed: int = 1, **given: Any) -> SlowFastText:
    """A pruned and quantized model of everything that a file may have."""
    random = np.random.RandomState(seed)
    kept = {3: 1, 5: 0, 8: 2}
    return slow(
        dim=5,
        minn=2,
        maxn=3,
        bucket=9,
        kept=kept,
        input=Table.quantized(len(WORDS) + 3, 5, 2, True, random),
        output=Table.quantized(len(LABELS), 5, 3, True, random),
        **given,
    )


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_a_file_is_read(tmp_path: Path) -> None:
    model = slow(minn=2, maxn=3, word_ngrams=4, bucket=9, loss="ova")
    found = reader.read(write(tmp_path / "m.bin", model.content()))
    head = found.head
    assert (head.version, head.kind, head.loss) == (12, "supervised", "ova")
    assert (head.words, head.labels) == (list(WORDS), list(LABELS))
    assert head.label_counts.tolist() == list(LABELS.values())
    assert head.kept is None
    assert model.content().startswith(head.content)
    arguments = head.arguments
    assert (arguments.dim, arguments.word_ngrams, arguments.bucket, arguments.minn, arguments.maxn) == (4, 4, 9, 2, 3)
    assert isinstance(found.input, np.memmap | np.ndarray)
    np.testing.assert_array_equal(found.input, model.input.rows)
    np.testing.assert_array_equal(found.output, model.output.rows)


def test_a_quantized_file_is_read(tmp_path: Path) -> None:
    model = quantized()
    found = reader.read(write(tmp_path / "m.ftz", model.content()))
    assert found.head.kept is not None
    assert [array.tolist() for array in found.head.kept] == [[3, 5, 8], [1, 0, 2]]
    for table, expected in ((found.input, model.input), (found.output, model.output)):
        assert isinstance(table, reader.Quantized)
        assert table.shape == expected.rows.shape
        np.testing.assert_array_equal(np.concatenate(list(table.blocks())), expected.rows)


def test_version_11_has_no_subwords(tmp_path: Path) -> None:
    for kind, maxn in (("supervised", 0), ("skipgram", 6)):
        model = slow(minn=3, maxn=6, bucket=9, version=11, kind=kind)
        assert reader.read(write(tmp_path / "m.bin", model.content())).head.arguments.maxn == maxn


def at(field: str) -> int:
    """Where a field of the arguments begins."""
    return 8 + 4 * reader.Arguments._fields.index(field)


def patched(content: bytes, place: int, form: str, value: float) -> bytes:
    changed = bytearray(content)
    struct.pack_into("<" + form, changed, place, value)
    return bytes(changed)


DENSE, HEAD = slow(minn=2, maxn=3, bucket=9).content(), 8 + 4 * 12 + 8
DICTIONARY = len(reader.read_head(DENSE, "").content)
FTZ = quantized().content()
FTZ_HEAD = len(reader.read_head(FTZ, "").content)
KEPT = FTZ_HEAD - 24
CODES = FTZ_HEAD + 1 + 21 + 30
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a fastText model: the file is empty"),
    "another": (b"\x08\x01ab", "not a fastText model: it begins with 08 01 61 62, expected ba 16 4f 2f"),
    "short": (b"\xba", "not a fastText model: it begins with ba, expected ba 16 4f 2f"),
    "version": (patched(DENSE, 4, "i", 13), "a fastText model of version 13, expected 11 or 12"),
    "dim": (patched(DENSE, at("dim"), "i", 0), f"dim at byte 8 is 0, expected in [1, {2**31 - 1}]"),
    "model": (patched(DENSE, at("model"), "i", 4), "model at byte 36 is 4, expected in [1, 3]"),
    "loss": (patched(DENSE, at("loss"), "i", 0), "loss at byte 32 is 0, expected in [1, 4]"),
    "maxn": (patched(DENSE, at("maxn"), "i", 1001), f"maxn at byte 48 is 1001, expected in [-{2**31}, 1000]"),
    "bucket": (patched(DENSE, at("bucket"), "i", -1), f"bucket at byte 40 is -1, expected in [0, {2**31 - 1}]"),
    "no bucket": (patched(DENSE, at("bucket"), "i", 0), "bucket is 0, but there are n-grams"),
    "many entries": (
        patched(DENSE, HEAD, "i", 2**31 - 1),
        "the number of entries at byte 64 is 2147483647, expected in",
    ),
    "many words": (patched(DENSE, HEAD + 4, "i", 12), "the number of words at byte 68 is 12, expected in [0, 11]"),
    "other labels": (patched(DENSE, HEAD + 8, "i", 3), "the number of labels at byte 72 is 3, expected in [4, 4]"),
    "many kept": (patched(DENSE, HEAD + 20, "q", 2**62), f"the number of kept n-grams at byte 84 is {2**62}, expected"),
    "a type": (
        patched(DENSE, DICTIONARY - 1, "b", 0),
        f"the type of entry 10 of the dictionary at byte {DICTIONARY - 1} is 0",
    ),
    "no end": (DENSE[: DICTIONARY - 5], f"entry 10 of the dictionary at byte {DICTIONARY - 20} has no end"),
    "pruned, not quantized": (patched(FTZ, FTZ_HEAD, "b", 0), "the flag of quantization at byte"),
    "a flag": (
        patched(DENSE, DICTIONARY, "b", 2),
        f"the flag of quantization at byte {DICTIONARY} is 2, expected in [0, 1]",
    ),
    "many rows": (
        patched(DENSE, DICTIONARY + 1, "q", 2**60),
        f"the rows of the input at byte {DICTIONARY + 1} is {2**60}",
    ),
    "few rows": (
        slow(minn=2, maxn=3, bucket=9, rows=15).content(),
        f"the input at byte {DICTIONARY + 1} has 15 rows, but the dictionary needs 16",
    ),
    "columns": (
        patched(DENSE, DICTIONARY + 9, "q", 5),
        f"the columns of the input at byte {DICTIONARY + 9} is 5, expected",
    ),
    "cut off": (DENSE[:-1], f"the output at byte {len(DENSE) - 64} takes 64 bytes, and the file has 63 more"),
    "no output": (DENSE[: DICTIONARY + 17 + 16 * 16], "the flag of the output's quantization at byte"),
    "kept number": (patched(FTZ, KEPT, "i", 9), f"the kept n-grams at byte {KEPT} have numbers outside [0, 9)"),
    "kept row": (patched(FTZ, KEPT + 4, "i", -2), f"the kept n-grams at byte {KEPT} have a row -2"),
    "kept far row": (patched(FTZ, KEPT + 4, "i", 3), "has 10 rows, but the dictionary needs 11"),
    "codes": (patched(FTZ, FTZ_HEAD + 18, "i", 29), f"the number of codes of the input at byte {FTZ_HEAD + 18} is 29"),
    "pieces": (patched(FTZ, CODES + 4, "i", 2), "the quantizer of the input at byte"),
    "dsub": (
        patched(FTZ, CODES + 8, "i", 0),
        f"the size of a piece of the input at byte {CODES + 8} is 0, expected in",
    ),
    "cut off centroids": (FTZ[: CODES + 100], f"the centroids of the input at byte {CODES + 16} takes 5120 bytes"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(name: str, tmp_path: Path) -> None:
    content, message = BROKEN[name]
    path = write(tmp_path / "m.bin", content)
    with pytest.raises(ValueError) as caught:
        reader.read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [DENSE, FTZ])
def test_every_truncation_is_one_error(content: bytes, tmp_path: Path) -> None:
    for size in range(0, len(content), 7 if len(content) < 2000 else 97):
        with pytest.raises(ValueError, match=r"fastText model"):
            reader.read(write(tmp_path / "m.bin", content[:size]))


def test_what_follows_the_tables_is_not_read(tmp_path: Path) -> None:
    assert reader.read(write(tmp_path / "m.bin", DENSE + b"more")).head.words == list(WORDS)
