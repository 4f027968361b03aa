"""fastText's models as one ONNX model: beside a slow fastText of our own, and beside what fastText itself said once."""

from __future__ import annotations

import base64
import functools
import json
import re
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

import lucid_onnx
from lucid_onnx.cli import main
from lucid_onnx.sources.encoder import TextEncoder
from lucid_testing.fasttext_files import LOSSES, SlowFastText, Table

RECORDED = json.loads(Path(__file__).with_name("fasttext_recorded.json").read_text())
FORMS = ("portable", "standard", "native")
WORDS = {w.encode(): 9 for w in ("</s>", "the", "naïve", "日本", "cat", "sat", "mat", "on")}
LABELS = {f"__label__{k}".encode(): count for k, count in enumerate((900, 500, 500, 40, 9, 2, 1, 1, 0))}
TEXTS = [
    "the cat sat on the mat",
    "naïve 日本 日本",
    "",
    "__label__1 dog",
    "unknown wörds and cats",
    "mat </s> cat",
    "x",
]


def slow(*, quantized: bool = False, dim: int = 6, scale: float = 1.5, seed: int = 0, **given: Any) -> SlowFastText:
    """A model of random tables, with n-grams of both kinds."""
    random = np.random.RandomState(seed)
    labels = given.pop("labels", LABELS)
    supervised = given.get("kind", "supervised") == "supervised"
    targets = len(labels if supervised else WORDS)
    keys: dict[str, Any] = {"minn": 2, "maxn": 4, "word_ngrams": 2, "bucket": 60, "labels": labels, **given}
    if quantized:
        keys["kept"] = {k: k // 2 for k in range(0, 60, 2)}
        rows = len(WORDS) + 30
        keys["input"] = Table.quantized(rows, dim, given.pop("dsub", 2), True, random)
        keys["output"] = Table.quantized(targets, dim, 3, False, random)
    else:
        rows = len(WORDS) + keys["bucket"]
        keys["input"] = Table((scale * random.standard_normal((rows, dim))).astype(np.float32))
        keys["output"] = Table((scale * random.standard_normal((targets, dim))).astype(np.float32))
    keys.pop("dsub", None)
    return SlowFastText(words=WORDS, **keys)


def encoder(model: SlowFastText | bytes, folder: Path, **options: Any) -> TextEncoder:
    """Its file, imported, saved and opened."""
    content = model if isinstance(model, bytes) else model.content()
    (folder / "model.bin").write_bytes(content)
    found = lucid_onnx.import_model(folder / "model.bin", **options)
    written = found.save(folder / "model.onnx")
    assert [Path(name).name for name in written] == ["model.onnx", "model.onnx.fasttext"]
    onnx.checker.check_model(folder / "model.onnx", full_check=options.get("form") == "standard")
    return TextEncoder(folder / "model.onnx")


def check_predictions(model: SlowFastText, found: TextEncoder, k: int = 20, texts: list[str] = TEXTS) -> None:
    """Labels and probabilities of texts, the logistic's steps aside where a logit is too near to one."""
    labels, probabilities = found.predict(texts, k)
    assert labels.shape == probabilities.shape == (len(texts), min(k, len(model.labels)))
    names, compared = [name.decode() for name in model.labels], 0
    for text, said, given in zip(texts, labels, probabilities, strict=True):
        expected = model.probabilities(text.encode())
        certain = np.ones(len(names), bool)
        if model.loss in ("ns", "ova"):
            steps = model.logits(text.encode()) * 32
            certain = np.abs(steps - np.round(steps)) > 1e-4
        assert (np.diff(given) <= 0).all()
        assert [name == "" for name in said] == [p == 0 for p in given]
        got = dict(zip(said.tolist(), given.tolist(), strict=True))
        for label in np.flatnonzero(certain):
            if expected[label] < 1.1e-5 and names[label] not in got:
                continue  # at the edge of what the tree says at all
            compared += 1
            assert got.get(names[label], 0) == pytest.approx(expected[label], abs=1e-6), (text, names[label])
    assert compared > len(texts) * min(0.9 * len(names), 2 if model.loss == "hs" else len(names))


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_labels_of_texts(loss: str, quantized: bool, tmp_path: Path) -> None:
    model = slow(loss=loss, quantized=quantized)
    found = encoder(model, tmp_path)
    check_predictions(model, found)
    vectors = found.encode(TEXTS)
    np.testing.assert_allclose(vectors, [model.sentence(t.encode()) for t in TEXTS], atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("opset", [16, 18, 26])
def test_forms_and_opsets(form: str, opset: int, tmp_path: Path) -> None:
    for quantized, loss in ((True, "hs"), (False, "ns")):
        model = slow(loss=loss, quantized=quantized, dim=5, dsub=2)
        found = encoder(model, tmp_path, form=form, opset=opset, index_dtype="int32")
        check_predictions(model, found)
        if form == "portable":
            check_predictions(model, TextEncoder(tmp_path / "model.onnx", native=False))
        types = {i.name: i.type for i in found.session.get_inputs()}
        assert types == {"ids": "tensor(int32)", "offsets": "tensor(int32)", "k": "tensor(int64)"}


@pytest.mark.parametrize("quantized", [False, True])
def test_vectors_of_words_and_sentences(quantized: bool, tmp_path: Path) -> None:
    model = slow(kind="skipgram", loss="ns", quantized=quantized, word_ngrams=1)
    texts = [*TEXTS, "cat\0mat", "the the the"]
    for form in FORMS:
        found = encoder(model, tmp_path, form=form).run(texts, batch_size=4)
        np.testing.assert_allclose(found["embeddings"], [model.sentence(t.encode()) for t in texts], atol=1e-6)
        words = [word for text in texts for word in text.encode().split()]
        np.testing.assert_allclose(found["word_embeddings"], [model.mean(model.word(w)) for w in words], atol=1e-6)


def test_words_without_a_vector_do_not_count(tmp_path: Path) -> None:
    model = slow(kind="cbow", loss="hs", maxn=0, bucket=0)
    found = encoder(model, tmp_path)
    vector = model.mean([1])
    both = found.encode(["the", "the nothing", "nothing", ""])
    unit = vector / np.linalg.norm(vector)
    np.testing.assert_allclose(both, [unit, unit, 0 * unit, 0 * unit], atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64", "int8", "uint8", "int4", "uint4"])
@pytest.mark.parametrize("quantized", [False, True])
def test_tables_of_other_dtypes(quantized: bool, dtype: Any, tmp_path: Path) -> None:
    model = slow(quantized=quantized)
    found = encoder(model, tmp_path, dtype=dtype)
    exact = np.array([model.sentence(t.encode()) for t in TEXTS])
    tolerance = {"float32": 1e-6, "float64": 1e-6, "float16": 5e-3, "bfloat16": 4e-2}.get(dtype)
    if tolerance is None:  # half a step of a row of this many values
        steps = 2 ** int(dtype[-1]) - 2
        tolerance = np.abs(model.input.rows).max() * 2 / steps
    vectors = found.encode(TEXTS)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, exact, atol=tolerance)
    tables = {t.name for t in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert ("weight" if dtype.startswith(("float", "bfloat")) else "scale") in tables
    assert "centroids" not in tables


# ---- What fastText does at the edges.


def scores(loss: str, labels: int, **given: Any) -> SlowFastText:
    """A model of one number a row: the text "w" is 1, and the logits are the output's rows."""
    rows = np.array(given.pop("rows"), np.float32).reshape(-1, 1)
    names = {f"__label__{k}".encode(): labels - k for k in range(labels)}
    return SlowFastText({b"w": 1}, names, Table(np.ones((1, 1), np.float32)), Table(rows), loss=loss, **given)


def test_equal_labels_end_with_the_last_first(tmp_path: Path) -> None:
    """fastText's heap lets go of the first of equal labels; with three and more, it has an order of its own."""
    for loss in ("softmax", "ova", "ns"):
        found = encoder(scores(loss, 4, rows=[1, 2, 2, 0]), tmp_path)
        assert found.predict(["w"], 3)[0].tolist() == [["__label__2", "__label__1", "__label__0"]]
    found = encoder(scores("hs", 4, rows=[0, 0, 0, 0]), tmp_path)
    assert found.predict(["w"])[0].tolist() == [["__label__0"]]  # two steps to all but the most frequent one


def test_the_logistic_has_steps_and_ends(tmp_path: Path) -> None:
    """A step is 1/32 of a logit; beyond 8 there are 0 and 1."""
    logits = [0, 1 / 64, 1 / 32, -1 / 64, 8, 8.01, -8, -8.01]
    model = scores("ova", len(logits), rows=logits)
    labels, probabilities = encoder(model, tmp_path).predict(["w"], len(logits))
    found = dict(zip(labels[0].tolist(), probabilities[0].tolist(), strict=True))
    steps = [0, 0, 1 / 32, -1 / 32, 8, np.inf, -8, -np.inf]
    for k, step in enumerate(steps):
        assert found[f"__label__{k}"] == pytest.approx(1 / (1 + np.exp(-step)) + 1e-5, abs=1e-7), logits[k]


def test_a_text_without_ids_has_no_label(tmp_path: Path) -> None:
    for loss in LOSSES:
        found = encoder(scores(loss, 3, rows=[1, 2, 3]), tmp_path)
        labels, probabilities = found.predict(["nothing known", "w", ""], 2)
        assert labels[[0, 2]].tolist() == [["", ""]] * 2
        assert probabilities[[0, 2]].tolist() == [[0, 0]] * 2
        assert "" not in labels[1]
        np.testing.assert_array_equal(found.encode(["nothing known", ""]), np.zeros((2, 1)))
        none = found.predict([])
        assert none[0].shape == none[1].shape == (0, 1)


def test_what_is_too_improbable_is_not_said(tmp_path: Path) -> None:
    """Down a tree, fastText turns back below 1e-5; the other losses say all labels."""
    for loss, said in (("hs", 1), ("softmax", 3)):
        labels, probabilities = encoder(scores(loss, 3, rows=[0, 40, 0]), tmp_path).predict(["w"], 3)
        assert (labels != "").sum() == (probabilities > 0).sum() == said


@pytest.mark.parametrize("loss", LOSSES)
def test_one_label(loss: str, tmp_path: Path) -> None:
    model = scores(loss, 1, rows=[0.3])
    check_predictions(model, encoder(model, tmp_path), texts=["w", "w w"])


def test_a_deep_tree(tmp_path: Path) -> None:
    """Of counts that double, the tree is as deep as there are labels."""
    random = np.random.RandomState(1)
    counts = {f"__label__{k}".encode(): 2 ** (30 - k) for k in range(31)}
    output = Table(random.standard_normal((31, 6)).astype(np.float32))
    model = slow(labels=counts, loss="hs")
    model.output = output
    check_predictions(model, encoder(model, tmp_path), k=31)


def test_labels_and_words_that_are_not_utf8(tmp_path: Path) -> None:
    model = scores("softmax", 1, rows=[1])
    model.labels = {b"__label__\xff": 1}
    assert encoder(model, tmp_path).predict(["w"])[0].tolist() == [["__label__\ufffd"]]


@pytest.mark.parametrize("kind", ["supervised", "skipgram"])
def test_other_commands_leave_the_numbers(kind: str, tmp_path: Path) -> None:
    model = slow(kind=kind, loss="hs", word_ngrams=1, quantized=kind == "supervised")
    found = encoder(model, tmp_path, form="standard")
    feeds, expected = found.feeds(TEXTS), found.run(TEXTS)
    standard = onnx.load(tmp_path / "model.onnx")
    for changed in (lucid_onnx.fuse(standard).model, lucid_onnx.lower(lucid_onnx.fuse(standard).model)):
        got = lucid_onnx.InferenceSession(changed).run(list(expected), feeds)
        for name, result in zip(expected, got, strict=True):
            if name == "labels":
                assert result.tolist() == expected[name].tolist()
            else:
                np.testing.assert_allclose(result, expected[name], atol=1e-6)


def test_any_k(tmp_path: Path) -> None:
    found = encoder(slow(), tmp_path)
    all_of_them = found.predict(TEXTS, 9)
    for k in (1, 2, 5):
        for some, every in zip(found.predict(TEXTS, k), all_of_them, strict=True):
            np.testing.assert_array_equal(some, every[:, :k])
    with pytest.raises(ValueError, match=r"^k = 0 must be at least 1$"):
        found.predict(TEXTS, 0)
    assert found.run(["cat"])["labels"].shape == (1, 1)


# ---- What fastText itself said.


@functools.cache
def recorded(name: str) -> tuple[bytes, list[dict[str, Any]]]:
    entry = RECORDED["models"][name]
    return zlib.decompress(base64.b85decode(entry["file"])), entry["said"]


@pytest.mark.parametrize("name", RECORDED["models"])
def test_what_fasttext_said(name: str, tmp_path: Path) -> None:
    content, said = recorded(name)
    found = encoder(content, tmp_path)
    texts = RECORDED["texts"]
    np.testing.assert_allclose(found.encode(texts), [one["vector"] for one in said], atol=1e-6)
    if not found.has_labels:
        words = found.run(RECORDED["words"])["word_embeddings"]
        np.testing.assert_allclose(words, RECORDED["models"][name]["words"], atol=1e-6)
        return
    labels, probabilities = found.predict(texts, 2)
    for one, label, probability in zip(said, labels, probabilities, strict=True):
        assert [name for name in label if name] == one["labels"]
        np.testing.assert_allclose(probability[: len(one["labels"])], one["probabilities"], atol=1e-6)


# ---- What is said of it, and what is not taken.


def test_what_is_found(tmp_path: Path) -> None:
    (tmp_path / "m.ftz").write_bytes(slow(quantized=True, loss="hs").content())
    found = lucid_onnx.import_model(tmp_path / "m.ftz")
    assert found.found == {
        "format": "fastText, version 12 of its files",
        "source": "m.ftz",
        "model": "supervised, hierarchical softmax",
        "rows": "38",
        "embedding_dim": "6",
        "dtype": "product-quantized, 3 bytes a row and one for its norm",
        "pooling": "mean",
        "normalisation": "none",
        "texts": "8 words, their pieces of 2 to 4 characters, up to 2 words together, "
        "in 60 buckets, of which 30 are kept",
        "labels": "9",
    }
    metadata = {p.key: p.value for p in found.model.metadata_props}
    assert metadata["lucid.labels"] == "9"
    assert metadata["lucid.source"] == "m.ftz"
    stored = {t.name: t for t in found.model.graph.initializer}
    assert stored["codes"].data_type == TensorProto.UINT8
    assert list(stored["codes"].dims) == [38, 3]


@pytest.mark.parametrize("kind", ["supervised", "cbow"])
@pytest.mark.parametrize("quantized", [False, True])
def test_what_a_smaller_table_costs(kind: str, quantized: bool, tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(slow(kind=kind, loss="ns", quantized=quantized).content())
    found = lucid_onnx.import_model(tmp_path / "m.bin", dtype="int8", sample=["the cat\nsat", "on the mat", ""]).found
    texts = 3 if kind == "supervised" else 2  # an empty text has </s>
    pattern = rf"cosine to the table as it was over {texts} texts: mean (0\.\d+|1\.0+), worst (0\.9\d+|1\.0+)"
    assert re.fullmatch(pattern, found["loss"])
    assert "loss" not in lucid_onnx.import_model(tmp_path / "m.bin", sample=["the cat"]).found


def test_dense_tables_stay_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(slow().content())
    table = lucid_onnx.import_model(tmp_path / "m.bin").tables["weight"]
    base: Any = table
    while base is not None and not isinstance(base, np.memmap):
        base = base.base
    assert base is not None


def test_large_tables_are_not_read_into_memory(tmp_path: Path) -> None:
    model = slow(bucket=40_000, dim=200)
    (tmp_path / "m.bin").write_bytes(model.content())
    tracemalloc.start()
    try:
        lucid_onnx.import_model(tmp_path / "m.bin").save(tmp_path / "m.onnx", external_data=True)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert model.input.rows.nbytes > 30_000_000
    assert peak < 10_000_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "padded"}, "layout = 'padded', but fastText's models take 'ragged' ids"),
        ({"normalize": True}, "normalize = True is given, but a fastText model has no normalize"),
        ({"key": "x"}, "key = 'x' is given, but a fastText model has no key"),
        ({"tokenizer": "x"}, "tokenizer = 'x' is given, but a fastText model has no tokenizer"),
        ({"vocabulary": "x"}, "vocabulary = 'x' is given, but a fastText model has no vocabulary"),
    ],
)
def test_options_that_do_not_suit_it(options: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(slow().content())
    with pytest.raises(ValueError, match=message):
        lucid_onnx.import_model(tmp_path / "m.bin", **options)


def test_another_file_beside_the_model(tmp_path: Path) -> None:
    encoder(slow(), tmp_path)
    words = tmp_path / "model.onnx.fasttext"
    words.write_bytes(words.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.onnx\.fasttext: is not the file that"):
        TextEncoder(tmp_path / "model.onnx")


def test_a_line_feed_is_refused_as_by_fasttext(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^a text has a line feed, and fastText's are single lines: 'a\\nb'$"):
        encoder(slow(), tmp_path).predict(["a\nb"])


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.bin").write_bytes(scores("softmax", 3, rows=[0, 9, 5]).content())
    model = str(tmp_path / "m.onnx")
    assert main(["import", str(tmp_path / "m.bin"), "-o", model]) == 0
    assert "fastText, version 12" in capsys.readouterr().out
    assert main(["run", model, "--text", "w", "--text", "other"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"labels +string +\[2, 1\] +__label__1", out), out
    assert main(["run", model, "--text", "w", "--labels", "2", "-o", str(tmp_path / "out") + "/"]) == 0
    assert np.load(tmp_path / "out" / "labels.npy").tolist() == [["__label__1", "__label__2"]]
    capsys.readouterr()
    for arguments, message in (
        (["--labels", "2"], "--labels: needs --text"),
        (["--labels", "0", "--text", "w"], "--labels 0: must be at least 1"),
        (["--text", "a\nb"], "a text has a line feed, and fastText's are single lines: 'a\\nb'"),
    ):
        assert main(["run", model, *arguments]) == 2
        assert message in capsys.readouterr().err


def test_labels_are_wanted_of_a_model_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = encoder(slow(kind="skipgram", word_ngrams=1), tmp_path)
    assert not found.has_labels
    with pytest.raises(ValueError, match=r"model\.onnx: has no labels to predict$"):
        found.predict(["cat"])
    assert main(["run", str(tmp_path / "model.onnx"), "--text", "cat", "--labels", "1"]) == 2
    assert "has no labels" in capsys.readouterr().err
