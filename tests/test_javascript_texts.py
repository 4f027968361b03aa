"""Texts in JavaScript: the ids of Python, the outputs of Python, and a sentence for each file that is broken."""

from __future__ import annotations

import base64
import json
import random
import subprocess
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import lucid_onnx
from lucid_onnx.parity.adapters import javascript
from lucid_onnx.sources import words
from lucid_onnx.sources.encoder import TextEncoder
from lucid_onnx.sources.fasttext.reader import read_head
from lucid_onnx.sources.fasttext.text import FastTextWords
from lucid_onnx.sources.text import ENTRY, Text
from lucid_onnx.sources.tokenizer import Tokenizer
from lucid_testing import sources
from lucid_testing.fasttext_files import SlowFastText, Table

RECORDED = json.loads(Path(__file__).with_name("fasttext_recorded.json").read_text())
WORDS = ("</s>", "the", "naïve", "日本", "cat", "sat", "the", "ΟΔΟΣ", "οδος", "\ufeffmark", "i̇", "it's", "")
#: What separates or ends something for one language or the other, and code points of each length in UTF-8.
CHARACTERS = "ab. ,<>_'tTé日😀\0\t\n\v\f\r\x1c\x1f\x7f\x85\xa0\u1680\u200a\u200b\u2028\u3000\ufeffΣςİß"
TEXTS = [
    "",
    " \t ",
    "the cat sat",
    "naïve 日本 日本",
    "the\0cat",
    "__label__1 dog __label__9",
    "__label__",
    "mat </s> cat",
    "x",
    "a" * 3000,
    "é" * 300 + " the",
    "😀 \U0001f469\u200d\U0001f52c e\u0301",
    "\x1cthe\x85cat\xa0sat\u2003the\u2028cat\ufeff",
    "\ufeffmark \ufeff",
    "The, CAT! (sat) --- 'naïve' It's \\the/ ¿the?",
    "ΟΔΟΣ ΟΔΟΣ. ΟΔΟΣΑ Σ İ ẞ",
    "\r\vthe\fcat\x1f\x7f",
    "日本日本日本 <the> the</s>",
    *("".join(random.Random(seed).choices(CHARACTERS, k=seed % 40)).replace("\n", "\r") for seed in range(200)),
]
#: Loads the kinds of texts of one model after another, and gives the ids of each text, or what is said.
IDS = """
import fs from "node:fs";
import { openText } from "./encoder.mjs";
const results = [];
for (const { entry, file, texts } of JSON.parse(fs.readFileSync(0))) {
  try {
    const content = new Uint8Array(fs.readFileSync(file));
    const found = await openText("m.onnx", entry, content, () => import("@huggingface/tokenizers"));
    results.push(texts.map((text) => found.ids(text)));
  } catch (error) {
    results.push(error.message);
  }
}
console.log(JSON.stringify(results));
"""


@pytest.fixture(scope="module")
def node() -> tuple[str, Path]:
    """Node, and the folder."""
    try:
        command, worker, _ = javascript.command("node")
    except javascript.NotHereError as error:
        pytest.skip(str(error))
    return command, Path(worker).parent


def ids_in_javascript(
    node: tuple[str, Path], folder: Path, kinds: Sequence[tuple[Text, bytes | None]], texts: Sequence[str]
) -> list[Any]:
    """The ids of texts by each kind, whose file may have another content."""
    jobs = []
    for number, (text, content) in enumerate(kinds):
        found = text.content() if content is None else content
        (folder / str(number)).write_bytes(found)
        settings = json.loads(lucid_onnx.sources.text.entry(text, "file", found))
        kind, name, digest = (settings.pop(key) for key in ("kind", "file", "sha256"))
        entry = {"kind": kind, "file": name, "sha256": digest, "settings": settings}
        jobs.append({"entry": entry, "file": str(folder / str(number)), "texts": texts})
    command, where = node
    done = subprocess.run(
        [command, "--input-type=module", "-e", IDS],
        cwd=where,
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def lists(text: Text, texts: Sequence[str]) -> list[list[int]]:
    bags = text.bags(texts)
    return [bags.ids[a:b].tolist() for a, b in zip(bags.offsets[:-1], bags.offsets[1:], strict=True)]


def slow(**given: Any) -> SlowFastText:
    """A small model with n-grams of both kinds."""
    rng = np.random.RandomState(0)
    labels = {f"__label__{k}".encode(): 9 - k for k in range(4)}
    supervised = given.get("kind", "supervised") == "supervised"
    vocabulary = {w.encode(): 9 for w in WORDS if w}
    keys: dict[str, Any] = {"minn": 2, "maxn": 4, "word_ngrams": 3, "bucket": 97, "labels": labels, **given}
    rows = len(vocabulary) + keys["bucket"]
    table = rng.standard_normal((rows, 4)).astype(np.float32)
    output = rng.standard_normal((len(labels if supervised else vocabulary), 4)).astype(np.float32)
    if keys.get("kept") is None:
        return SlowFastText(words=vocabulary, input=Table(table), output=Table(output), **keys)
    pruned = Table.quantized(rows, 4, 2, True, rng)
    return SlowFastText(words=vocabulary, input=pruned, output=Table(output), **keys)


MODELS = {
    "both": slow(),
    "one character": slow(minn=0, maxn=1, word_ngrams=1),
    "one to nine": slow(minn=1, maxn=9, word_ngrams=5, bucket=89),
    "words alone": slow(maxn=0, word_ngrams=1, bucket=0),
    "word n-grams": slow(maxn=0, word_ngrams=2, bucket=2_000),
    "minn above maxn": slow(minn=5, maxn=3),
    "pruned": slow(kept={k: 3 * k % 40 for k in range(1, 97, 2)}),
    "all pruned": slow(kept={}),
    "version 11": slow(version=11),
    "skipgram": slow(kind="skipgram", loss="ns", word_ngrams=1),
    "skipgram, words alone": slow(kind="cbow", loss="ns", maxn=0, word_ngrams=1),
}


def test_ids_of_fasttext(node: tuple[str, Path], tmp_path: Path) -> None:
    contents = [model.content() for model in MODELS.values()]
    contents += [zlib.decompress(base64.b85decode(found["file"])) for found in RECORDED["models"].values()]
    kinds = [FastTextWords(read_head(content, "m")) for content in contents]
    texts = [*TEXTS, *RECORDED["texts"]]
    found = ids_in_javascript(node, tmp_path, [(kind, None) for kind in kinds], texts)
    for kind, got in zip(kinds, found, strict=True):
        assert got == lists(kind, texts)
    assert len({json.dumps(got) for got in found}) >= len(MODELS)


def test_ids_of_words(node: tuple[str, Path], tmp_path: Path) -> None:
    kinds = [words.Words(WORDS, "m"), words.Words([], "m"), words.Words(["\ufeffmark", "a\r", "a"], "m")]
    texts = [*TEXTS, *(text.replace("\r", "\n") for text in TEXTS)]
    found = ids_in_javascript(node, tmp_path, [(kind, None) for kind in kinds], texts)
    for kind, got in zip(kinds, found, strict=True):
        assert got == lists(kind, texts)
    assert sum(map(len, found[0])) > 50


def trained(model: Any, trainer: Any, normalizer: Any, pre_tokenizer: Any) -> dict[str, Any]:
    import tokenizers

    made = tokenizers.Tokenizer(model)
    if normalizer is not None:
        made.normalizer = normalizer
    if pre_tokenizer is not None:
        made.pre_tokenizer = pre_tokenizer
    made.train_from_iterator([text for text in TEXTS if len(text) < 200], trainer)
    return json.loads(made.to_str())  # type: ignore[no-any-return]


def test_ids_of_tokenizers(node: tuple[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    if not (node[1] / "node_modules" / "@huggingface" / "tokenizers").is_dir():
        pytest.skip("the package @huggingface/tokenizers is not installed: npm ci --ignore-scripts")
    from tokenizers import models, normalizers, pre_tokenizers, trainers

    special: dict[str, Any] = {"special_tokens": ["[UNK]", "[CLS]"], "show_progress": False}
    pieces = trainers.WordPieceTrainer(vocab_size=120, **special)
    pairs = trainers.BpeTrainer(vocab_size=200, **special)
    piece, pair = models.WordPiece(unk_token="[UNK]"), models.BPE(unk_token="[UNK]")
    wordllama = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    described = [
        trained(piece, pieces, normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()),
        trained(piece, pieces, normalizers.BertNormalizer(lowercase=False), pre_tokenizers.BertPreTokenizer()),
        trained(pair, pairs, normalizers.NFKC(), pre_tokenizers.Metaspace()),
        trained(models.BPE(unk_token="[UNK]", fuse_unk=True), pairs, wordllama, None),
    ]
    kinds = [Tokenizer(each, "m").with_settings() for each in described]
    kinds += [kind.with_settings(max_length=3, max_characters=7).with_prefix("the 😀 ") for kind in kinds]
    left = {
        **described[0],
        "truncation": {"direction": "Left", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
    }
    kinds.append(Tokenizer(left, "m").with_settings(keeps_truncation=True))
    texts = [*TEXTS, "[CLS] the [UNK]cat", "a  b   c "]
    found = ids_in_javascript(node, tmp_path, [(kind, None) for kind in kinds], texts)
    for kind, got in zip(kinds, found, strict=True):
        assert got == lists(kind, texts)


def test_tokenizers_of_other_ids_are_rejected(node: tuple[str, Path], tmp_path: Path) -> None:
    pieces = sources.tokenizer(model={"type": "WordPiece", "vocab": {"[UNK]": 0, "a": 1}, "unk_token": "[UNK]"})
    model = pieces["model"]
    bert = {"normalizer": {"type": "BertNormalizer"}, "pre_tokenizer": {"type": "BertPreTokenizer"}}
    rejected = {
        "its model is WordLevel": sources.tokenizer(),
        "its model is Unigram": {**pieces, **bert, "model": {**model, "type": "Unigram"}},
        "its model has no type": {**pieces, **bert, "model": {"vocab": {"a": 0}}},
        "its normalizer is Lowercase": pieces,
        "its pre-tokenizer is ByteLevel": {**pieces, "normalizer": None, "pre_tokenizer": {"type": "ByteLevel"}},
        "its pre-tokenizer is Whitespace": {**pieces, "normalizer": None},
        "its normalizer is Precompiled": {
            **pieces,
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Precompiled"}]},
        },
        "its normalizer replaces a regular expression": {
            **pieces,
            "normalizer": {"type": "Replace", "pattern": {"Regex": " +"}, "content": " "},
        },
        "its normalizer is more than a BertNormalizer": {
            **pieces,
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "BertNormalizer"}]},
        },
        "its max_input_chars_per_word is 7": {**pieces, **bert, "model": {**model, "max_input_chars_per_word": 7}},
        "its dropout is 0.5": {**pieces, **bert, "model": {"type": "BPE", "vocab": {}, "merges": [], "dropout": 0.5}},
    }
    kinds = [(Tokenizer(found, "m"), None) for found in rejected.values()]
    for why, said in zip(rejected, ids_in_javascript(node, tmp_path, kinds, ["a"]), strict=True):
        assert said == f"file: {why}, and ids in JavaScript may differ from Python's there. " + (
            "Encode its texts in Python, with lucid_onnx.TextEncoder."
        )


def test_broken_files_of_texts(node: tuple[str, Path], tmp_path: Path) -> None:
    whole = MODELS["pruned"].content()
    head = read_head(whole, "file")
    text, content = FastTextWords(head), head.content
    broken = [content[:n] for n in range(0, len(content), 7)]
    for place in range(8, 12 * 4 + 8, 4):  # the arguments
        broken += [
            content[:place] + value.to_bytes(4, "little") + content[place + 4 :] for value in (2**31, 2**31 - 1, 0)
        ]
    broken += [content[:k] + bytes([content[k] ^ 0xFF]) + content[k + 1 :] for k in range(64, len(content))]
    tokenizer = Tokenizer(sources.tokenizer(), "file")
    kinds: list[tuple[Text, bytes | None]] = [(text, each) for each in broken]
    kinds += [(tokenizer, each) for each in (b"{", b"[]", b"null", b'{"model": 3}')]
    expected = []
    for kind, each in kinds:
        assert each is not None
        try:
            expected.append(lists(type(kind).load({}, each, "file"), ["the cat"]))
        except ValueError as error:
            expected.append(str(error))
    assert sum(isinstance(each, str) for each in expected) > len(broken) / 3
    for said, wanted in zip(ids_in_javascript(node, tmp_path, kinds, ["the cat"]), expected, strict=True):
        if isinstance(wanted, str):
            assert isinstance(said, str), wanted
            assert said.startswith("file: "), (said, wanted)
            field = wanted.partition(" at byte ")[0]
            if field != wanted:
                assert said.startswith(field), (said, wanted)
        else:
            assert said == wanted


def run(node: tuple[str, Path], *given: str | Path) -> subprocess.CompletedProcess[str]:
    command, folder = node
    return subprocess.run(
        [command, folder / "text.mjs", *given], capture_output=True, text=True, timeout=60, check=False
    )


def save(folder: Path, model: SlowFastText, **options: Any) -> Path:
    (folder / "model.bin").write_bytes(model.content())
    lucid_onnx.import_model(folder / "model.bin", **options).save(folder / "model.onnx")
    return folder / "model.onnx"


def vectors(folder: Path, dtype: Any = np.float32, **options: Any) -> Path:
    np.save(folder / "v.npy", sources.table(dtype=dtype))
    (folder / "v.txt").write_text("\n".join(sources.WORDS), encoding="utf-8")
    lucid_onnx.import_model(folder / "v.npy", **options).save(folder / "v.onnx")
    return folder / "v.onnx"


SAID = ["the cat sat", "naïve 日本", "", "dog on a mat", "the the unknown"]


def test_outputs_in_node(node: tuple[str, Path], tmp_path: Path) -> None:
    paths = []
    for number, make in enumerate(
        (
            lambda folder: save(folder, slow(loss="hs", kept={k: k // 2 for k in range(97)}), form="standard"),
            lambda folder: save(folder, MODELS["skipgram"], form="standard", index_dtype="int32"),
            lambda folder: vectors(folder, np.float16, layout="ragged"),
            lambda folder: vectors(folder, layout="padded", normalize=True, form="standard"),
        )
    ):
        (tmp_path / str(number)).mkdir()
        paths.append(make(tmp_path / str(number)))
    for path in paths:
        done = run(node, "--json", path, *SAID)
        assert done.returncode == 0, done.stderr
        said, encoder = json.loads(done.stdout), TextEncoder(path, native=False)
        assert said["ids"] == [ids.tolist() for ids in encoder.ids(SAID)]
        expected = encoder.run(SAID)
        if encoder.has_labels:
            expected["labels"], expected["probabilities"] = encoder.predict(SAID, 5)
        assert list(said["outputs"]) == list(expected)
        for name, array in expected.items():
            got = np.array(said["outputs"][name]["data"]).reshape(said["outputs"][name]["dims"])
            assert got.shape == array.shape
            if name == "labels":
                assert got.tolist() == array.tolist()
            else:
                # Numbers below 4 in float16 may be rounded to either neighbour.
                close = 1e-6 if array.dtype == np.float32 else 2 * np.finfo(np.float16).eps
                np.testing.assert_allclose(got, array, atol=close)


def test_what_the_command_prints(node: tuple[str, Path], tmp_path: Path) -> None:
    path = save(tmp_path, MODELS["both"], form="standard")
    labels, probabilities = TextEncoder(path).predict(["the cat"], 5)
    lines = [line.split("\t") for line in run(node, path, "the cat").stdout.splitlines()]
    assert [name for _, name in lines] == labels[0].tolist()
    np.testing.assert_allclose([float(p) for p, _ in lines], probabilities[0], rtol=1e-5)
    path = vectors(tmp_path)
    encoder = TextEncoder(path)
    one = run(node, path, "the cat").stdout.split()
    np.testing.assert_allclose(np.array(one, float), encoder.encode("the cat"), rtol=1e-5)
    query, *others = encoder.encode(["a dog", "the cat", "a dog", "nothing known", "cat on a mat"])
    found = [
        line.split("\t")
        for line in run(node, path, "a dog", "the cat", "a dog", "nothing known", "cat on a mat").stdout.splitlines()
    ]
    cosines = {
        name: vector @ query / np.linalg.norm(vector) / np.linalg.norm(query)
        for name, vector in zip(("the cat", "a dog", "", "cat on a mat"), others, strict=True)
        if name
    }
    assert [name for _, name in found] == sorted(cosines, key=cosines.__getitem__, reverse=True)
    np.testing.assert_allclose([float(c) for c, _ in found], sorted(cosines.values(), reverse=True), atol=1e-5)


def test_the_command_says_what_is_wrong(node: tuple[str, Path], tmp_path: Path) -> None:
    path = vectors(tmp_path)
    beside = tmp_path / "v.onnx.words.txt"
    plain, outside, broken = tmp_path / "plain.onnx", tmp_path / "outside.onnx", tmp_path / "broken.onnx"
    lucid_onnx.save(lucid_onnx.build_model(sources.table()), plain)
    model = onnx.load(path)
    (entry,) = (each for each in model.metadata_props if each.key == ENTRY)
    entry.value = json.dumps({**json.loads(entry.value), "file": "../v.onnx.words.txt"})
    onnx.save(model, outside)
    broken.write_bytes(path.read_bytes()[:-50])

    def said(*given: str | Path) -> str:
        done = run(node, *given)
        assert done.returncode == 1
        assert done.stdout == ""
        return done.stderr.strip()

    assert said(path) == "usage: node text.mjs [--json] MODEL TEXT..."
    assert said(path, "xyz", "the cat") == "The model knows no word of the query."
    assert said(plain, "a") == "plain.onnx: its metadata does not say what encodes texts: it was not imported"
    assert said(outside, "a").startswith(
        "outside.onnx: its metadata lucid.text names the file ../v.onnx.words.txt, outside"
    )
    assert said(broken, "a").startswith("broken.onnx: is not an ONNX model, or only a part of one")
    assert said(tmp_path / "none.onnx", "a").startswith(f"{tmp_path / 'none.onnx'}: cannot be read")
    beside.write_bytes(beside.read_bytes() + b"\nmore")
    assert said(path, "a") == "v.onnx.words.txt: is not the file that v.onnx was written with; import the model again"
    beside.unlink()
    assert said(path, "a") == "v.onnx: there is no v.onnx.words.txt beside it"
