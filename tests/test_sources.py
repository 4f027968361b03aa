"""Imports of static text models: what the graphs compute, what is said of a source, and what is rejected."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import lucid_onnx
from lucid_onnx.cli import main
from lucid_onnx.ops.embedding_bag.spec import BFLOAT16
from lucid_onnx.sources import arrays, encoder
from lucid_onnx.sources.text import ENTRY
from lucid_testing import sources

#: Ids of texts: with the unknown token 0, none at all, and unknown ones alone.
BAGS = [[1, 2, 3], [], [0, 2, 0, 2], [7], [0], [5, 6, 4, 1, 1]]
FORMS = ("portable", "standard", "native")


def run(model: onnx.ModelProto, layout: str, bags: list[list[int]] = BAGS, index: Any = np.int64) -> np.ndarray:
    """The model's vectors of some texts."""
    session = lucid_onnx.InferenceSession(model)
    if layout == "ragged":
        offsets = np.cumsum([0, *map(len, bags)])[:-1].astype(index)
        feeds = {"ids": np.array([i for ids in bags for i in ids], index), "offsets": offsets}
    else:
        length = max(map(len, bags), default=0)
        feeds = {
            "input_ids": np.array([[*ids, *[3] * (length - len(ids))] for ids in bags], index),
            "attention_mask": np.array([[1] * len(ids) + [0] * (length - len(ids)) for ids in bags], index),
        }
    return session.run(["embeddings"], feeds)[0]


def full(folder: Path, dtype: Any = np.float32) -> tuple[Path, Mapping[str, np.ndarray]]:
    """A model2vec folder with a mapping and weights."""
    rng = np.random.default_rng(1)
    tensors = {
        "embeddings": sources.table(6, dtype=dtype),
        "mapping": rng.integers(0, 6, len(sources.WORDS)),
        "weights": rng.random(len(sources.WORDS)).astype(np.float32),
    }
    return sources.model2vec(folder, tensors, normalize=True), tensors


@pytest.mark.parametrize("layout", ["padded", "ragged"])
@pytest.mark.parametrize("form", FORMS)
def test_a_model2vec_folder(tmp_path: Path, form: Any, layout: Any) -> None:
    folder, t = full(tmp_path / "m")
    found = lucid_onnx.import_model(folder, form=form, layout=layout)
    expected = sources.means(
        t["embeddings"], BAGS, mapping=t["mapping"], weights=t["weights"], skipped=0, normalized=True
    )
    np.testing.assert_allclose(run(found.whole(), layout), expected, rtol=1e-6, atol=1e-6)
    assert found.found["rows"] == "6, for 8 tokens"
    assert found.found["normalisation"] == "to length 1"


@pytest.mark.parametrize("layout", ["padded", "ragged"])
@pytest.mark.parametrize("held", [(), ("mapping",), ("weights",), ("mapping", "weights")])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64", "int8"])
def test_every_table_with_every_tensor_beside_it(
    tmp_path: Path, dtype: str, held: tuple[str, ...], layout: Any
) -> None:
    named = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
    tensors = {
        "embeddings": sources.table(dtype=named),
        "mapping": np.array([7, 6, 5, 4, 3, 2, 1, 0], np.int32),
        "weights": np.linspace(0.5, 2, 8, dtype=np.float32),
    }
    tensors = {name: a for name, a in tensors.items() if name in ("embeddings", *held)}
    folder = sources.model2vec(tmp_path / "m", tensors)
    found = lucid_onnx.import_model(folder, layout=layout, index_dtype="int32")
    got = run(found.whole(), layout, index=np.int32)
    expected = sources.means(
        tensors["embeddings"], BAGS, mapping=tensors.get("mapping"), weights=tensors.get("weights"), skipped=0
    )
    assert got.dtype == (np.float32 if dtype == "int8" else named)
    tolerance = {"float16": 1e-3, "bfloat16": 8e-3, "float64": 1e-12}.get(dtype, 1e-6)
    np.testing.assert_allclose(got.astype(np.float64), expected, rtol=tolerance, atol=tolerance)


def test_a_negative_id_is_a_position_that_is_not_there(tmp_path: Path) -> None:
    folder, t = full(tmp_path / "m")
    bags = [[1, -1, 2], [-7, -100], [3]]
    kept = [[i for i in ids if i >= 0] for ids in bags]
    expected = sources.means(t["embeddings"], kept, mapping=t["mapping"], weights=t["weights"], normalized=True)
    for layout in ("padded", "ragged"):
        found = lucid_onnx.import_model(folder, layout=layout)
        np.testing.assert_allclose(run(found.whole(), layout, bags), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("others", [(), ("Normalize",)])
def test_a_static_embedding_folder(tmp_path: Path, others: tuple[str, ...]) -> None:
    rows = sources.table()
    folder = sources.static_embedding(tmp_path / "m", {"embedding.weight": rows}, *others)
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\n# A model\n")
    found = lucid_onnx.import_model(folder)
    assert found.found["licence"] == "mit"
    # sentence-transformers pools the unknown token too.
    expected = sources.means(rows, BAGS, normalized=bool(others))
    np.testing.assert_allclose(run(found.whole(), "padded"), expected, rtol=1e-6, atol=1e-6)


def test_a_default_prompt_comes_before_every_text(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    prompts = {"prompts": {"query": "the cat ", "document": ""}, "default_prompt_name": "query"}
    prompts["__version__"] = {"sentence_transformers": "6.2.0"}
    folder = sources.static_embedding(tmp_path / "m", {"embedding.weight": sources.table()}, prompts=prompts)
    found = lucid_onnx.import_model(folder)
    assert found.found["prompt"] == "the cat "
    assert found.found["version"] == "sentence-transformers 6.2.0"
    found.save(tmp_path / "m.onnx")
    (ids,) = encoder.TextEncoder(tmp_path / "m.onnx").ids(["sat"])
    assert ids.tolist() == [1, 2, 3]


def test_wordllamas_weights_are_pooled_in_float32(tmp_path: Path) -> None:
    rows = sources.table(dtype=np.float16)
    found = lucid_onnx.import_model(sources.wordllama(tmp_path / "package", rows))
    assert found.found["format"] == "wordllama"
    np.testing.assert_allclose(run(found.whole(), "padded"), sources.means(rows, BAGS), rtol=1e-6, atol=1e-6)
    longer = lucid_onnx.import_model(tmp_path / "package" / "weights" / "tiny_5.safetensors", normalize=True)
    expected = sources.means(rows, BAGS, normalized=True)
    np.testing.assert_allclose(run(longer.whole(), "padded"), expected, rtol=1e-6, atol=1e-6)


def test_wordllama_takes_the_last_row_for_tokens_without_one(tmp_path: Path) -> None:
    rows = sources.table(6, dtype=np.float16)
    found = lucid_onnx.import_model(sources.wordllama(tmp_path / "package", rows))
    assert found.found["without rows"].startswith("2 tokens")
    clipped = [[min(token, 5) for token in ids] for ids in BAGS]
    np.testing.assert_allclose(run(found.whole(), "padded"), sources.means(rows, clipped), rtol=1e-6, atol=1e-6)


def test_any_table_with_a_tokenizer(tmp_path: Path) -> None:
    rows = sources.table()
    sources.write_safetensors(tmp_path / "t.safetensors", {"a": rows, "b": sources.table(seed=1)})
    with pytest.raises(ValueError, match=r"there is no tokenizer\.json beside it"):
        lucid_onnx.import_model(tmp_path / "t.safetensors")
    (tmp_path / "tokenizer.json").write_text(json.dumps(sources.tokenizer()))
    with pytest.raises(ValueError, match=r"which tensor is the table.*a, b"):
        lucid_onnx.import_model(tmp_path / "t.safetensors")
    found = lucid_onnx.import_model(tmp_path / "t.safetensors", key="a")
    np.testing.assert_allclose(run(found.whole(), "padded"), sources.means(rows, BAGS), rtol=1e-6, atol=1e-6)
    other = shutil.copy(tmp_path / "tokenizer.json", tmp_path / "other.json")
    (tmp_path / "tokenizer.json").unlink()
    assert lucid_onnx.import_model(tmp_path / "t.safetensors", key="a", tokenizer=other).found["tensor"] == "a"


# ---- Smaller tables.


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int4", "uint4"])
def test_quantized_values_are_those_of_quantize(tmp_path: Path, dtype: Any) -> None:
    rows = sources.table(300, 7)
    folder = sources.model2vec(tmp_path / "m", {"embeddings": rows, "mapping": np.arange(8)})
    found = lucid_onnx.import_model(folder, dtype=dtype)
    expected = lucid_onnx.QuantizedTable.quantize(rows, dtype)
    assert set(found.tables) == set(expected.inputs)
    for name, array in expected.inputs.items():
        np.testing.assert_array_equal(found.tables[name], array)
    step = float(expected.scale.max())
    difference = np.abs(run(found.whole(), "padded") - sources.means(rows, BAGS, skipped=0))
    assert 0 < difference.max() <= step / 2 + 1e-6


def test_a_float16_table_keeps_the_output(tmp_path: Path) -> None:
    folder, t = full(tmp_path / "m")
    got = run(lucid_onnx.import_model(folder, dtype="float16").whole(), "padded")
    assert got.dtype == np.float32
    expected = sources.means(
        t["embeddings"], BAGS, mapping=t["mapping"], weights=t["weights"], skipped=0, normalized=True
    )
    np.testing.assert_allclose(got, expected, rtol=2e-3, atol=2e-3)


def test_the_loss_is_measured_on_texts(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    folder, _ = full(tmp_path / "m")
    texts = ["the cat sat", "a dog on the mat", "unheard of"]
    found = lucid_onnx.import_model(folder, dtype="int4", sample=texts)
    floats, small = (lucid_onnx.import_model(folder, dtype=d) for d in (None, "int4"))
    bags = [[1, 2, 3], [5, 7, 4, 1, 6]]
    cosines = (run(floats.whole(), "padded", bags) * run(small.whole(), "padded", bags)).sum(axis=1)
    words = f"cosine to the table as it was over 2 texts: mean {cosines.mean():.4f}"
    assert found.found["loss"].startswith(words)
    assert f"worst {cosines.min():.4f}" in found.found["loss"]
    assert "loss" not in lucid_onnx.import_model(folder, dtype="float32", sample=texts).found


def test_what_has_no_smaller_value_is_rejected(tmp_path: Path) -> None:
    rows = sources.table()
    rows[3, 2] = np.inf
    folder = sources.model2vec(tmp_path / "m", {"embeddings": rows})
    with pytest.raises(ValueError, match=r"element \[3, 2\] is inf, which has no int8 value"):
        lucid_onnx.import_model(folder, dtype="int8")
    rows[3, 2] = 1e6
    sources.write_safetensors(folder / "model.safetensors", {"embeddings": rows})
    with pytest.raises(ValueError, match=r"element \[3, 2\] is 1000000\.0, beyond float16"):
        lucid_onnx.import_model(folder, dtype="float16")


def test_a_large_array_is_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "_IN_MEMORY", 100)
    rows = sources.table(200, 3, np.float16)
    got = arrays.converted(rows, np.dtype(np.float32))
    assert isinstance(got.base, np.memmap)
    np.testing.assert_array_equal(got, rows.astype(np.float32))


# ---- Files and texts.


def test_the_files_alone_encode_texts(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    folder, t = full(tmp_path / "source")
    texts = ["The cat sat", "", "nothing cat nothing cat", "DOG"]
    expected = sources.means(
        t["embeddings"],
        [[1, 2, 3], [], [2, 2], [7]],
        mapping=t["mapping"],
        weights=t["weights"],
        normalized=True,
    )
    seen: list[tuple[int, int]] = []
    for layout in ("padded", "ragged"):
        found = lucid_onnx.import_model(folder, layout=layout)
        target = tmp_path / layout
        target.mkdir()
        files = found.save(target / "m.onnx", external_data=True)
        assert [Path(f).name for f in files] == ["m.onnx", "m.onnx.tokenizer.json"]
        e = lucid_onnx.TextEncoder(target / "m.onnx")
        seen.clear()
        got = e.encode(texts, batch_size=3, progress=lambda done, total: seen.append((done, total)))
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
        assert seen == [(3, 4), (4, 4)]
        np.testing.assert_allclose(e.encode("DOG"), expected[3], rtol=1e-6, atol=1e-6)
        assert e.encode([]).shape == (0, 5)
        with pytest.raises(TypeError, match=r"texts\[1\] is a int"):
            e.encode(["a", 1])  # type: ignore[list-item]
        with pytest.raises(TypeError, match="texts is a string"):
            e.run("a")
        with pytest.raises(ValueError, match="batch_size = 0"):
            e.encode(["a"], batch_size=0)


def test_a_text_is_cut_off_as_model2vec_does(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    # The median length of a token is 3 characters: with 2 tokens, 6 characters of a text are looked at.
    folder = sources.model2vec(tmp_path / "m", {"embeddings": sources.table()}, max_length=2)
    found = lucid_onnx.import_model(folder)
    assert "cut off at 2 tokens" in found.found["texts"]
    found.save(tmp_path / "m.onnx")
    ids = encoder.TextEncoder(tmp_path / "m.onnx").ids(["a a a a", "the cat sat", "cat dog"])
    assert [i.tolist() for i in ids] == [[5, 5], [1, 0], [2, 0]]


def test_a_file_of_another_import_is_rejected(tmp_path: Path) -> None:
    folder, _ = full(tmp_path / "source")
    model = tmp_path / "m.onnx"
    lucid_onnx.import_model(folder).save(model)
    beside = tmp_path / "m.onnx.tokenizer.json"
    beside.write_bytes(beside.read_bytes() + b" ")
    with pytest.raises(ValueError, match="is not the file that"):
        lucid_onnx.TextEncoder(model)
    beside.unlink()
    with pytest.raises(FileNotFoundError):
        lucid_onnx.TextEncoder(model)
    lucid_onnx.save(lucid_onnx.build_model(sources.table()), model)
    with pytest.raises(ValueError, match="does not say what encodes texts"):
        lucid_onnx.TextEncoder(model)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("[", "is not JSON"),
        ("[]", "has no kind"),
        ({"kind": "other"}, "'other', which is not one of tokenizer, words"),
        ({"file": "../secret"}, "outside of the model's folder"),
        ({"file": "/etc/hostname"}, "outside of the model's folder"),
        ({"file": ".."}, "outside of the model's folder"),
        ({"max_characters": "x"}, "for a tokenizer"),
    ],
)
def test_metadata_from_elsewhere(tmp_path: Path, entry: Any, message: str) -> None:
    folder, _ = full(tmp_path / "source")
    path = tmp_path / "m.onnx"
    lucid_onnx.import_model(folder).save(path)
    model = onnx.load(path)
    (prop,) = (p for p in model.metadata_props if p.key == ENTRY)
    prop.value = entry if isinstance(entry, str) else json.dumps({**json.loads(prop.value), **entry})
    onnx.save(model, path)
    with pytest.raises(ValueError, match=message):
        lucid_onnx.TextEncoder(path)


def test_the_metadata_says_where_a_model_is_from(tmp_path: Path) -> None:
    folder, _ = full(tmp_path / "source")
    (folder / "README.md").write_text('---\nlicense: "apache-2.0"\n---\n')
    found = lucid_onnx.import_model(folder)
    metadata = {p.key: p.value for p in found.model.metadata_props}
    assert metadata["lucid.format"] == "model2vec"
    assert metadata["lucid.source"] == "source"
    assert metadata["lucid.licence"] == "apache-2.0"
    whole = {i.name: numpy_helper.to_array(i) for i in found.whole().graph.initializer}
    np.testing.assert_array_equal(whole["weight"], found.tables["weight"])


# ---- What is rejected.


def broken(path: Path, change: Any) -> str:
    """The message about a folder in which something was changed."""
    folder, _ = full(path)
    change(folder)
    with pytest.raises(ValueError) as caught:
        lucid_onnx.import_model(folder)
    return str(caught.value)


def test_what_is_not_known_is_rejected_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"\x80\x02}q\x00")
    with pytest.raises(ValueError, match=r"begins with b'\\x80.*is not known; known formats are: model2vec"):
        lucid_onnx.import_model(tmp_path / "a.bin")
    with pytest.raises(ValueError, match=r"a folder with a\.bin: the format is not known"):
        lucid_onnx.import_model(tmp_path)
    with pytest.raises(FileNotFoundError):
        lucid_onnx.import_model(tmp_path / "nothing")
    with pytest.raises(ValueError, match="format = 'x' is not one of 'model2vec'"):
        lucid_onnx.import_model(tmp_path, format="x")
    with pytest.raises(ValueError, match=r"has no file model\.safetensors"):
        lucid_onnx.import_model(tmp_path, format="model2vec")
    with pytest.raises(ValueError, match="layout = 'x'"):
        lucid_onnx.import_model(tmp_path, layout="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dtype = 'x'"):
        lucid_onnx.import_model(tmp_path, dtype="x")  # type: ignore[arg-type]


def test_broken_model2vec_folders(tmp_path: Path) -> None:
    def tensors(**changes: np.ndarray) -> Any:
        def change(folder: Path) -> None:
            held = {"embeddings": sources.table(6), "mapping": np.arange(8) % 6, "weights": np.ones(8, np.float32)}
            sources.write_safetensors(folder / "model.safetensors", {**held, **changes})

        return change

    def text(name: str, content: str) -> Any:
        return lambda folder: (folder / name).write_text(content)

    cases = {
        "a": (tensors(mapping=np.array([0, 1, 2, 6, 0, 0, 0, 0])), r"mapping of token 3 is 6, outside \[0, 6\)"),
        "b": (
            tensors(mapping=np.arange(6), weights=np.ones(6, np.float32)),
            "tokenizer has token 7, and its table rows for 6 tokens",
        ),
        "c": (tensors(weights=np.ones(7, np.float32)), r"weights \[7\] for 8 tokens"),
        "d": (tensors(weights=np.ones((8, 1), np.float32)), r"'weights' has shape \[8, 1\]"),
        "e": (tensors(embeddings=np.arange(6)), "dtype I64"),
        "f": (tensors(embeddings=np.ones(6, np.float32)), r"shape \[6\], expected \[V, D\]"),
        "g": (text("config.json", "{"), r"config\.json: is not JSON"),
        "h": (text("config.json", '{"max_length": "x"}'), "max_length is 'x'"),
        "i": (text("tokenizer.json", "[]"), r"tokenizer\.json: is not a JSON object"),
        "j": (text("tokenizer.json", '{"model": 3}'), "it has no model"),
        "k": (text("tokenizer.json", '{"model": {"type": "BPE", "vocab": [1]}}'), "its vocabulary is not that"),
        "l": (text("head.safetensors", ""), "is a classifier behind the model"),
        "m": (text("tokenizer.json", "[" * 100_000), "is not JSON"),
    }
    for name, (change, message) in cases.items():
        found = broken(tmp_path / name, change)
        assert found.startswith(str(tmp_path / name)), found
        assert re.search(message, found), (name, found)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ('[{"type": "x.StaticEmbedding", "path": ""}, {"type": "x.Dense", "path": "1"}]', "StaticEmbedding, Dense"),
        ('[{"type": "x.StaticEmbedding", "path": "../other"}]', "is not a list of modules"),
        ('[{"type": "x.StaticEmbedding", "path": "/etc"}]', "is not a list of modules"),
        ("{", "is not JSON"),
        ('[{"type": "x.StaticEmbedding", "path": "nowhere"}]', r"has no file model\.safetensors"),
    ],
)
def test_broken_static_embedding_folders(tmp_path: Path, modules: str, message: str) -> None:
    folder = sources.static_embedding(tmp_path / "m", {"embedding.weight": sources.table()})
    (folder / "modules.json").write_text(modules)
    with pytest.raises(ValueError, match=message):
        lucid_onnx.import_model(folder)


# ---- The commands.


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tokenizers")
    folder, t = full(tmp_path / "source")
    model, out = tmp_path / "m.onnx", tmp_path / "out.npy"
    assert main(["import", str(folder), "-o", str(model), "--dtype", "int8"]) == 0
    printed = capsys.readouterr().out
    for words in ("model2vec", "6, for 8 tokens", "written as int8", "cosine to the table", "m.onnx.tokenizer.json"):
        assert words in printed
    assert main(["run", str(model), "--text", "the cat", "-t", "dog", "-o", str(out)]) == 0
    expected = sources.means(
        t["embeddings"], [[1, 2], [7]], mapping=t["mapping"], weights=t["weights"], normalized=True
    )
    np.testing.assert_allclose(np.load(out), expected, atol=0.02)


def test_a_command_that_fails_says_so_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "m.onnx"
    (tmp_path / "a.bin").write_bytes(b"x")
    for source, message in (("a.bin", "the format is not known"), ("nothing", "no such file or folder")):
        assert main(["import", str(tmp_path / source), "-o", str(model)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert main(["import", str(tmp_path / "a.bin"), "-o", str(tmp_path / "a.bin")]) == 2
    assert "is the source itself" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin"]
    lucid_onnx.save(lucid_onnx.build_model(sources.table()), model)
    assert main(["run", str(model), "--text", "x"]) == 2
    assert "does not say what encodes texts" in capsys.readouterr().err
    assert main(["run", str(model), "--text", "x", "--input", "a=b.npy"]) == 2
    assert "one excludes the other" in capsys.readouterr().err
