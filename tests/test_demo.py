"""The demo: its hits make sense, its forms agree, and it says so."""

from __future__ import annotations

import re

import numpy as np
import onnx
import pytest

from lucid_onnx import cli
from lucid_onnx.cli import demo
from lucid_onnx.runtime import info, installation

EXPECTED = {
    "how do I leave a loop early": {"break", "continue"},
    "call a function with keyword arguments": {"calls"},
    "which numbers have an imaginary part": {"imaginary", "numbers"},
}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return demo.run(tmp_path_factory.mktemp("demo") / "demo.onnx")


def test_the_queries_find_their_topics(result):
    assert tuple(result.hits) == demo.QUERIES
    for query, topics in EXPECTED.items():
        hits = result.hits[query]
        assert topics <= {hit.topic for hit in hits}
        assert all(0 < hit.score <= 1 and hit.snippet for hit in hits)
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_the_forms_agree(result):
    assert result.agrees
    assert 0 < result.relative_difference <= demo.TOLERANCE


def test_what_ran_where(result):
    forms = {form.name: form for form in result.forms}
    native = forms.pop("the file, native kernel", None)
    assert (native is None) == (result.library is None)
    if native is not None:
        assert native.ran == {("EmbeddingBagWeighted", "CPUExecutionProvider"): 1}
    for name in ("the file, without the library", "the standard form of it"):
        ran = forms[name].ran
        assert ran is not None
        assert not any(op.startswith("EmbeddingBag") for op, _ in ran)
        assert ("Gather", "CPUExecutionProvider") in ran
        assert sum(ran.values()) > 20
    assert forms["NumPy reference"].ran is None
    assert all(form.milliseconds > 0 for form in result.forms)


def test_the_file_is_a_portable_model(result):
    found = info.model(str(result.output))
    assert found.form == "portable"
    (node,) = found.nodes
    assert (node.op, node.mode, node.table.shape) == ("EmbeddingBagWeighted", "sum", (demo.NUM_IDS, demo.DIM))
    onnx.checker.check_model(str(result.output))


def test_the_command(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo", "--query", "anonymous function", "--output", "my.onnx"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert re.search(r"^wrote my\.onnx \(\d+\.\d MiB\)$", out, re.M)
    assert re.search(r"^anonymous function\n  0\.\d\d  lambda ", out, re.M)
    assert re.search(r"\d+ standard nodes \(CPU\)", out)
    assert re.search(r"median ms +as long as the (native kernel|file)$", out, re.M)
    assert re.search(r"^These bags have \d+ weighted rows of 256 columns .* torch is not compared", out, re.M)
    assert re.search(
        r"^largest difference between forms: \S+, \S+ of the sum of magnitudes \(allowed: 1e-06\)$", out, re.M
    )
    assert [p.name for p in tmp_path.iterdir()] == ["my.onnx"]


def test_without_the_library(tmp_path, monkeypatch, capfd):
    def no_library():
        raise FileNotFoundError("lucid_onnx was installed without its native library")

    monkeypatch.setattr(installation, "get_library_path", no_library)
    assert cli.main(["demo", "-q", "anonymous function", "-o", str(tmp_path / "m.onnx")]) == 0
    assert "native kernel: not installed;" in capfd.readouterr().out


def test_forms_that_differ_are_told(tmp_path, monkeypatch, capfd):
    exact = demo._reference
    monkeypatch.setattr(demo, "_reference", lambda table, bags: exact(table, bags) * np.float32(1 + 1e-4))
    assert cli.main(["demo", "-q", "anonymous function", "-o", str(tmp_path / "m.onnx")]) == cli.EXIT_DIFFERS
    assert "largest difference between forms" in capfd.readouterr().out


def test_nan_is_no_agreement():
    bags = demo.Bags(np.array([0]), np.array([0]), np.ones(1, np.float32))
    results = [np.ones((1, 2), np.float32), np.array([[1, np.nan]], np.float32)]
    _, relative = demo._difference(results, np.ones((1, 2), np.float32), bags)
    assert not relative <= demo.TOLERANCE


def test_a_python_without_its_documentation(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(__import__("sys").modules, "pydoc_data.topics", None)
    assert cli.main(["demo", "-o", str(tmp_path / "m.onnx")]) == 2
    assert capfd.readouterr().err == (
        "lucid-onnx: error: this Python comes without its documentation, pydoc_data.topics\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_word_ids():
    assert demo.word_ids("Loops, a loop") == demo.word_ids("loop loops")
    assert demo.word_ids("How do I?") == []
    assert all(0 <= i < demo.NUM_IDS for i in demo.word_ids("the Python language reference"))
