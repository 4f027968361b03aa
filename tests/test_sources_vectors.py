"""Vectors of words: every file that they come in, and what is rejected."""

from __future__ import annotations

import json
import re
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import lucid_onnx
from lucid_onnx.cli import main
from lucid_onnx.sources import vectors
from lucid_testing import sources

WORDS = ("the", "cat", "sat", "don't", "Paris", "東京", "the", ",")
ROWS = sources.table(len(WORDS), 4)
TEXTS = ("The cat sat.", "", "in Paris, 東京!", "DON'T", "paris", "unheard of", "cat, cat")
#: The rows of the words that are found.
BAGS = ([0, 1, 2], [], [4, 5], [3], [], [], [1, 1])


def lines(words: Sequence[str], rows: np.ndarray, *, end: str = "\n") -> str:
    return "".join(" ".join([w, *map(repr, map(float, row))]) + end for w, row in zip(words, rows, strict=True))


def binary(words: Sequence[str], rows: np.ndarray, *, breaks: bool) -> bytes:
    end = b"\n" if breaks else b""
    return f"{len(words)} {rows.shape[1]}\n".encode() + b"".join(
        w.encode() + b" " + row.astype("<f4").tobytes() + end for w, row in zip(words, rows, strict=True)
    )


def encoded(path: Path, source: Path, **options: object) -> np.ndarray:
    found = lucid_onnx.import_model(source, **options)  # type: ignore[arg-type]
    files = found.save(path)
    assert [Path(f).name for f in files] == [path.name, f"{path.name}.words.txt"]
    return lucid_onnx.TextEncoder(path).encode(TEXTS)


@pytest.mark.parametrize(
    "content",
    [
        lines(WORDS, ROWS),
        lines(WORDS, ROWS).rstrip("\n"),
        lines(WORDS, ROWS, end="\r\n"),
        f"{len(WORDS)} 4\n" + lines(WORDS, ROWS, end=" \n"),  # as word2vec writes it
        lines(WORDS, ROWS).replace(" ", "\t"),
    ],
)
@pytest.mark.parametrize("block", [16, 2**22])
def test_text(tmp_path: Path, content: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "_BLOCK", block)
    (tmp_path / "v.txt").write_text(content, newline="")
    found = lucid_onnx.import_model(tmp_path / "v.txt")
    assert found.found["format"] == "text-vectors"
    np.testing.assert_array_equal(found.tables["weight"], ROWS)
    got = encoded(tmp_path / "m.onnx", tmp_path / "v.txt")
    np.testing.assert_allclose(got, sources.means(ROWS, BAGS), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("breaks", [False, True])
def test_word2vecs_binary_file(tmp_path: Path, breaks: bool) -> None:
    (tmp_path / "v.bin").write_bytes(binary(WORDS, ROWS, breaks=breaks))
    found = lucid_onnx.import_model(tmp_path / "v.bin")
    assert found.found["format"] == "word2vec"
    np.testing.assert_array_equal(found.tables["weight"], ROWS)
    got = encoded(tmp_path / "m.onnx", tmp_path / "v.bin", normalize=True)
    np.testing.assert_allclose(got, sources.means(ROWS, BAGS, normalized=True), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("v.txt", "\n".join(WORDS) + "\n"),
        ("v.vocab", "".join(f"{w} {k}\n" for k, w in enumerate(WORDS))),
        ("given.json", json.dumps(WORDS)),
    ],
)
def test_an_array_and_its_words(tmp_path: Path, dtype: type, order: str, name: str, content: str) -> None:
    rows = ROWS.astype(dtype)
    np.save(tmp_path / "v.npy", np.asarray(rows, order=order))  # type: ignore[call-overload]
    (tmp_path / name).write_text(content)
    given = {"vocabulary": tmp_path / name} if name.startswith("given") else {}
    got = encoded(tmp_path / "m.onnx", tmp_path / "v.npy", **given)
    assert got.dtype == dtype
    tolerance = 1e-3 if dtype is np.float16 else 1e-6
    np.testing.assert_allclose(got, sources.means(rows, BAGS), rtol=tolerance, atol=tolerance)


def test_what_encodes_texts_outlives_other_commands(tmp_path: Path) -> None:
    pytest.importorskip("onnx_ir", reason="onnx_ir is not installed")
    (tmp_path / "v.txt").write_text(lines(WORDS, ROWS))
    model = tmp_path / "m.onnx"
    lucid_onnx.import_model(tmp_path / "v.txt").save(model)
    lucid_onnx.quantize(model, tmp_path / "small.onnx", dtype="uint8")
    lucid_onnx.lower(tmp_path / "small.onnx", tmp_path / "lowered.onnx")
    for name, atol in (("m", 1e-6), ("small", 0.02), ("lowered", 0.02)):
        got = lucid_onnx.TextEncoder(tmp_path / f"{name}.onnx").encode(TEXTS)
        np.testing.assert_allclose(got, sources.means(ROWS, BAGS), atol=atol)


@pytest.mark.parametrize("external", [False, True])
def test_what_encodes_texts_goes_along_into_another_folder(external: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnx_ir")
    (tmp_path / "v.txt").write_text(lines(["king", "queen"], np.random.default_rng(0).standard_normal((2, 2000))))
    model, away = tmp_path / "m.onnx", tmp_path / "away"
    away.mkdir()
    written = lucid_onnx.import_model(tmp_path / "v.txt").save(model, external_data=external)
    assert lucid_onnx.model_files(model)[-1] == str(tmp_path / "m.onnx.words.txt") == written[-1]
    expected = lucid_onnx.TextEncoder(model).encode(["the king"])
    lucid_onnx.lower(model, away / "s.onnx")
    fused = lucid_onnx.fuse(away / "s.onnx", away / "f.onnx")
    small = lucid_onnx.quantize(model, away / "q.onnx")
    assert fused.files[-1] == str(away / "s.onnx.words.txt")  # in one folder it serves both
    assert small.files[-1] == str(away / "q.onnx.words.txt")
    for file in (*written, tmp_path / "v.txt"):
        Path(file).unlink()
    for name, tolerance in (("s", 1e-6), ("f", 1e-6), ("q", 0.02)):
        found = lucid_onnx.TextEncoder(away / f"{name}.onnx").encode(["the king"])
        np.testing.assert_allclose(found, expected, atol=tolerance)


def test_a_link_out_of_the_folder_is_not_followed_and_no_other_file_is_copied(tmp_path: Path) -> None:
    pytest.importorskip("onnx_ir")
    (tmp_path / "v.txt").write_text(lines(["king"], np.ones((1, 3))))
    inside, away = tmp_path / "inside", tmp_path / "away"
    inside.mkdir()
    away.mkdir()
    lucid_onnx.import_model(tmp_path / "v.txt").save(inside / "m.onnx")
    words = inside / "m.onnx.words.txt"
    words.rename(tmp_path / "secret")
    words.symlink_to(tmp_path / "secret")
    lucid_onnx.lower(inside / "m.onnx", away / "s.onnx")
    words.unlink()
    words.write_text("another\n")
    lucid_onnx.lower(inside / "m.onnx", away / "s.onnx")
    words.unlink()
    lucid_onnx.lower(inside / "m.onnx", away / "s.onnx")
    assert [p.name for p in away.iterdir()] == ["s.onnx"]


def test_a_vocabulary_with_rows(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", ROWS[:3])
    (tmp_path / "w.json").write_text('{"sat": 2, "the": 0, "cat": 1}')
    got = encoded(tmp_path / "m.onnx", tmp_path / "v.npy", vocabulary=tmp_path / "w.json")
    np.testing.assert_allclose(got[0], ROWS[:3].mean(axis=0), rtol=1e-6)
    (tmp_path / "w.json").write_text('{"sat": 2, "the": 0, "cat": 2}')
    with pytest.raises(ValueError, match="do not have the rows 0, 1, 2"):
        lucid_onnx.import_model(tmp_path / "v.npy", vocabulary=tmp_path / "w.json")


def test_words_with_spaces_and_bytes_that_are_not_text(tmp_path: Path) -> None:
    content = lines(["a", ". . .", "b"], ROWS[:3]).encode().replace(b"b ", b"\xff ")
    (tmp_path / "v.txt").write_bytes(content)
    found = lucid_onnx.import_model(tmp_path / "v.txt")
    np.testing.assert_array_equal(found.tables["weight"], ROWS[:3])
    assert found.found["not UTF-8"] == "1 words, which no text finds"


def test_a_file_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in memory does not grow with the table."""
    monkeypatch.setattr(vectors, "_BLOCK", 2**16)
    rows = sources.table(4000, 50)
    words = [f"w{k}" for k in range(len(rows))]
    (tmp_path / "v.txt").write_text(lines(words, rows))
    seen: list[tuple[int, int]] = []
    tracemalloc.start()
    found = lucid_onnx.import_model(tmp_path / "v.txt", progress=lambda done, size: seen.append((done, size)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = (tmp_path / "v.txt").stat().st_size
    assert [total for _, total in seen] == [size] * -(-size // vectors._BLOCK)
    assert seen[-1][0] == size
    assert isinstance(found.tables["weight"].base, np.memmap)
    np.testing.assert_array_equal(found.tables["weight"], rows)
    assert peak < size / 3  # a block as bytes, fields and numbers, and the words


# ---- What is rejected.


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lines(WORDS, ROWS) + "end 1 2\n", "line 9 has 2 numbers, expected 4"),
        ("8 4\n" + lines(WORDS, ROWS) + "end 1 2\n", "line 10 has 2 numbers, expected 4"),
        (lines(WORDS, ROWS) + "end  1 2 3\n", "do not have 4 numbers each"),
        (lines(WORDS, ROWS) + "end 1 2 x 4\n", "'x' is not a number"),
        (lines(WORDS, ROWS) + "end 1 2 1_0 4\n", "'1_0' is not a number"),
        ("9 4\n" + lines(WORDS, ROWS), "has 8 words, and its first line says 9"),
        ("999999999999999 4\n" + lines(WORDS, ROWS), "and its first line says 999999999999999"),
    ],
)
def test_broken_text(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "v.txt").write_text(content)
    with pytest.raises(ValueError, match=message):
        lucid_onnx.import_model(tmp_path / "v.txt")


def test_broken_binary_files(tmp_path: Path) -> None:
    whole = binary(WORDS, ROWS, breaks=False)
    path = tmp_path / "v.bin"
    cases = {
        whole[:-1]: "ends, or is broken, at word 7 of 8",
        whole + b"abc": "has more than the 8 words",
        whole.replace(b" 4\n", b" 9\n", 1): "the format is not known",  # no room for it
        b"8 4\n" + b"x" * 10_000: "ends, or is broken, at word 0 of 8",
        b"99999999999999 999999999\n" + whole: "the format is not known",
        b"8 0\n" + whole: "the format is not known",
    }
    for content, message in cases.items():
        path.write_bytes(content)
        with pytest.raises(ValueError) as caught:
            lucid_onnx.import_model(path)
        assert message in str(caught.value)


def test_broken_arrays(tmp_path: Path) -> None:
    path = tmp_path / "v.npy"
    np.save(path, ROWS)
    with pytest.raises(ValueError, match="which words are its rows"):
        lucid_onnx.import_model(path)
    (tmp_path / "v.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match="there are 2 words for 8 rows"):
        lucid_onnx.import_model(path)
    np.save(path, ROWS.astype(np.int64))
    with pytest.raises(TypeError, match="the array has dtype int64"):
        lucid_onnx.import_model(path)
    path.write_bytes(b"\x93NUMPY" + b"(" * 100)
    with pytest.raises(ValueError, match="cannot be read as an array of numbers"):
        lucid_onnx.import_model(path)
    np.save(path, ROWS[:2])
    (tmp_path / "v.txt").unlink()
    for content, message in (
        ("[" * 100_000, "is not JSON"),
        ("[1, 2]", "is not a list of words"),
        ('["a\\n", "b"]', "has a line break"),
    ):
        (tmp_path / "w.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            lucid_onnx.import_model(path, vocabulary=tmp_path / "w.json")


def test_options_of_other_formats(tmp_path: Path) -> None:
    (tmp_path / "v.txt").write_text(lines(WORDS, ROWS))
    (tmp_path / "v.bin").write_bytes(binary(WORDS, ROWS, breaks=True))
    folder = sources.model2vec(tmp_path / "m", {"embeddings": sources.table()})
    cases = ((tmp_path / "v.txt", "vocabulary"), (tmp_path / "v.bin", "key"), (folder, "key"), (folder, "vocabulary"))
    for source, name in cases:
        with pytest.raises(ValueError, match=f"{name} = 'x' is given, and the format .* has no {name}"):
            lucid_onnx.import_model(source, **{name: "x"})  # type: ignore[arg-type]


def test_packed_files_are_named(tmp_path: Path) -> None:
    for magic, kind in ((b"\x1f\x8b\x08", "gzip"), (b"PK\x03\x04", "zip")):
        (tmp_path / "v.gz").write_bytes(magic + b"rest")
        with pytest.raises(ValueError, match=f"that {kind} has packed, which must be unpacked first"):
            lucid_onnx.import_model(tmp_path / "v.gz")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "v.txt").write_text(lines(WORDS, ROWS))
    model, out = tmp_path / "m.onnx", tmp_path / "out.npy"
    assert main(["import", str(tmp_path / "v.txt"), "-o", str(model), "--dtype", "uint8", "--layout", "ragged"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"texts +8 words; texts are split at white space", printed)
    assert re.search(r"loss +cosine to the table as it was over \d+ texts: mean 0\.99", printed)
    assert main(["run", str(model), "--text", "the cat", "-o", str(out)]) == 0
    np.testing.assert_allclose(np.load(out), ROWS[:2].mean(axis=0, keepdims=True), atol=0.02)
