"""`lucid-onnx fuse`, `lower` and `inspect` on the command line, with the pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import lucid_onnx
from lucid_testing.models import D, Small, V, bags, in_function, loop_body, run_lowered
from lucid_testing.processes import run_script
from lucid_testing.torch_exports import Export

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from lucid_onnx.rewrite import picture  # needs onnx-ir


def test_commands(lowered: Path, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(lowered.parent)
    expected = run_lowered(lowered)
    code, out, err = run("inspect", "model.onnx")
    assert (code, err) == (0, "")
    assert "would fuse" in out
    assert "standard form" in out
    assert out.splitlines()[-1] == "lucid-onnx fuse model.onnx -o OUTPUT.onnx writes the model with these fused"
    code, out, err = run("inspect", "model.onnx", "--json")
    assert [f["op"] for f in json.loads(out)["fused"]] == ["EmbeddingBag"]
    code, out, err = run("fuse", "model.onnx", "-o", "fused.onnx", "--report", "report.json")
    assert (code, err) == (0, "")
    assert out.startswith("wrote fused.onnx (")
    report = json.loads(Path("report.json").read_text())
    assert report["unfused"] == []
    assert report["fused"][0]["table_shape"] == [1000, 20]
    assert report["fused"][0]["table_bytes"] == 80_000
    code, out, err = run("inspect", "fused.onnx")
    assert "EmbeddingBag" in out
    assert "nothing to fuse" in out
    code, out, err = run("lower", "fused.onnx", "-o", "again.onnx")
    assert (code, err) == (0, "")
    assert "standard form" in out
    np.testing.assert_array_equal(run_lowered(Path("again.onnx")), expected)


def test_inspect_draws_what_would_become_of_bags(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model with its bags comes first, then what they were: two bags alike once, an axis that is put back with its
    bag, and a look-alike with the reason."""
    g = Small(shape=("b", 5))
    for name in ("one", "two & <more>"):
        g.initializers[name] = np.ones((V, D), np.float32)
        g.reduced(g("Gather", name, "i"), keepdims=1)
    g("Sum", "v1", "v3")
    g.reduced(g("Gather", "table", "i"), axis=2)
    model = g.model("v4", 3)
    model.graph.output.append(helper.make_tensor_value_info("v6", TensorProto.FLOAT, ["b", 5]))
    for initializer in model.graph.initializer:
        initializer.name = initializer.name.replace("one", "a" * 50)
    model.graph.node[0].input[0] = "a" * 50
    monkeypatch.chdir(tmp_path)
    onnx.save(model, "m.onnx")
    code, out, err = run("inspect", "m.onnx", "--svg", "m.svg")
    assert (code, err, out.splitlines()[-1]) == (0, "", "wrote m.svg")
    code, out, _ = run("inspect", "m.onnx", "--svg", "again.svg", "--json")
    assert len(json.loads(out)["fused"]) == 2
    assert Path("again.svg").read_bytes() == Path("m.svg").read_bytes()
    root = ElementTree.parse("m.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert not [e for e in root.iter() for key in e.attrib if key.endswith("href")]
    texts = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[:2] == ["m.onnx", "2 bags to fuse; left as it is: 1"]
    details = texts.index("2 times: Gather and reduction, sum, node 'v1' (ReduceSum)")
    whole = [t for t in texts[:details] if not (t or "").startswith(("m.onnx", "2 bags"))]
    assert whole[0] == "the model, with its bags fused"
    assert sorted(whole[1:]) == sorted(
        [
            *("i", "aaaaaaaaaaaaaaaa…aaaaaaaaaaaaaaaaa [10, 4]", "two & <more> [10, 4]"),
            *("EmbeddingBag2D", "sum", "was 2 nodes", "Unsqueeze") * 2,
            *("Gather", "ReduceSum", "Sum", "v4", "v6"),
        ]
    )
    assert [t for t in texts[details:] if t in ("Gather", "ReduceSum", "EmbeddingBag2D", "Unsqueeze", "Sum")] == [
        *("Gather", "ReduceSum", "EmbeddingBag2D", "Unsqueeze")
    ]
    assert {"before: 2 nodes", "after: 2 nodes", "aaaaaaaaaaaaaaaa…aaaaaaaaaaaaaaaaa"} <= set(texts[details:])
    assert "ReduceSum goes over axes [2], not over the rows of a bag, axis 1" in texts
    # Nothing stands outside of the picture, or on top of something else.
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    boxes = [{k: float(e.attrib[k]) for k in ("x", "y", "width", "height")} for e in root if "rx" in e.attrib]
    assert len(boxes) == 12 + 4 + 2 * 2  # the model; nodes, and what they read, before and after
    for k, a in enumerate(boxes):
        assert a["x"] >= 0
        assert a["x"] + a["width"] <= width
        assert a["y"] + a["height"] <= height
        for b in boxes[:k]:
            across = a["x"] < b["x"] + b["width"] and b["x"] < a["x"] + a["width"]
            assert not (across and a["y"] < b["y"] + b["height"] and b["y"] < a["y"] + a["height"])


def test_pictures_of_loops_and_of_nothing(legacy: Callable[[str], Export]) -> None:
    model = onnx.load(legacy("sum-17").path)
    drawn = picture.draw(model, lucid_onnx.fuse(model), "loop & more")
    texts = [e.text for e in ElementTree.fromstring(drawn).iter() if e.tag.endswith("text")]
    assert texts[0] == "loop & more"
    assert texts.count("EmbeddingBag") == 2  # in the model, and as what the Loop becomes
    assert texts.index("EmbeddingBag") < texts.index("Loop") < texts.index("EmbeddingBag", texts.index("Loop"))
    assert texts.count("Loop") == 1
    inside = [n.op_type for n in loop_body(model).node if n.op_type != "Constant"]
    assert set(inside) <= set(texts)
    report = lucid_onnx.fuse(lucid_onnx.build_model(np.eye(3, dtype=np.float32)))
    assert "nothing to fuse" in picture.draw(report.model, report, "m")
    within = in_function()
    assert "it is inside of a branch or a function" in picture.draw(within, lucid_onnx.fuse(within), "f")


def test_inspect_says_why_not(tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    g = Small(shape=("b", "l"), opset=14)
    onnx.save(g.model(g.reduced(g("Gather", "table", "i"), "ReduceMean")), tmp_path / "m.onnx")
    code, out, _ = run("inspect", tmp_path / "m.onnx")
    assert code == 0
    assert "the length of the bags is 'l'" in " ".join(out.split())
    code, out, _ = run("fuse", tmp_path / "m.onnx", "-o", tmp_path / "f.onnx", "--assume-nonempty")
    assert code == 0
    assert len(bags(onnx.load(tmp_path / "f.onnx"))) == 1


def test_commands_name_every_file(
    lowered: Path, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(lowered.parent)
    needs = "beside it: keep the files together, or use --single-file"
    data = "it needs model.onnx.data (78.1 KiB) "
    Path("folder").mkdir()
    for command, line in (
        (("fuse", "model.onnx", "-o", "fused.onnx"), data + needs),
        (("lower", "fused.onnx", "-o", "lowered.onnx"), data + needs),
        (("quantize", "fused.onnx", "-o", "small.onnx"), "wrote small.onnx.data (19.5 KiB), which it needs " + needs),
        (
            ("fuse", "model.onnx", "-o", "folder/fused.onnx"),
            "wrote folder/fused.onnx.data (78.1 KiB), which it needs " + needs,
        ),
    ):
        code, out, err = run(*command)
        assert (code, err) == (0, "")
        assert out.splitlines()[0].startswith(f"wrote {command[-1]} (")
        assert out.splitlines()[1] == line
        code, out, err = run(*command, "--single-file")
        assert (code, err, needs in out) == (0, "", False)
        assert lucid_onnx.model_files(command[-1]) == (command[-1],)
        assert run(*command)[0] == 0


def test_fuse_says_that_nothing_was_fused(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    g = Small(shape=("b", "l"), opset=14)
    onnx.save(g.model(g.reduced(g("Gather", "table", "i"), "ReduceMean")), "mean.onnx")
    lucid_onnx.save(lucid_onnx.build_model(np.eye(3, dtype=np.float32)), "bag.onnx")
    for name, why in (("mean.onnx", "--assume-nonempty takes it to be above 0"), ("bag.onnx", "nothing to fuse")):
        code, out, err = run("fuse", name, "-o", "out.onnx", "--report", "report.json")
        assert (code, err) == (0, "")
        assert f"nothing was fused: out.onnx is the same model as {name}\n" in out
        assert why in " ".join(out.split())
        assert "assume_nonempty" not in out
        assert json.loads(Path("report.json").read_text())["fused"] == []
    code, out, err = run("fuse", "mean.onnx", "-o", "out.onnx", "--assume-nonempty")
    assert (code, err, "nothing" in out) == (0, "", False)


def test_mistakes_are_one_line(
    lowered: Path, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(lowered.parent)
    Path("text.onnx").write_text("no model")
    Path("folder").mkdir()
    onnx.save(onnx.load("model.onnx"), "old.onnx")
    mistakes = {
        ("fuse", "none.onnx", "-o", "x.onnx"): "none.onnx: no such file",
        ("lower", "none.onnx", "-o", "x.onnx"): "none.onnx: no such file",
        ("inspect", "none.onnx"): "none.onnx: no such file",
        ("inspect", "folder"): "folder: is a directory",
        ("inspect", "model.onnx", "--svg", "no/m.svg"): "--svg no/m.svg: there is no directory no",
        ("inspect", "model.onnx", "--svg", "model.onnx"): "--svg model.onnx: is the model itself",
        ("fuse", "text.onnx", "-o", "x.onnx"): "text.onnx: not an ONNX model: ",
        ("lower", "text.onnx", "-o", "x.onnx"): "text.onnx: not an ONNX model: ",
        ("inspect", "text.onnx"): "text.onnx: not an ONNX model: ",
        ("fuse", "model.onnx", "-o", "folder"): "--output folder: is a directory",
        ("fuse", "model.onnx", "-o", "no/x.onnx"): "--output no/x.onnx: there is no directory no",
        ("lower", "model.onnx", "-o", "no/x.onnx"): "--output no/x.onnx: there is no directory no",
        ("fuse", "model.onnx", "-o", "x.onnx", "--form", "zip"): "form = 'zip' is not one of",
        ("lower", "model.onnx", "-o", "x.onnx", "--form", "zip"): "form = 'zip' is not one of",
        ("fuse", "model.onnx", "-o", "x.onnx", "--report", "no/r.json"): "--report no/r.json: there is no directory no",
        ("fuse", "model.onnx", "-o", "x.onnx", "--report", "x.onnx"): "--report x.onnx: is the model to write",
        ("fuse", "model.onnx", "-o", "model.onnx.data"): "model.onnx: model.onnx.data is the external data",
        ("fuse", "model.onnx"): "Missing option '--output'",
    }
    before = sorted(Path().rglob("*"))
    for arguments, message in mistakes.items():
        code, out, err = run(*arguments)
        assert (code, out) == (2, ""), arguments
        assert err.count("\n") == 1, err
        assert err.startswith(f"lucid-onnx: error: {message}"), (arguments, err)
        assert sorted(Path().rglob("*")) == before
    Path("model.onnx.data").unlink()
    code, _, err = run("fuse", "model.onnx", "-o", "x.onnx")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("lucid-onnx: error: model.onnx.data: initializer 'weight' has its data there")


def test_without_onnx_ir(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "sys.modules['onnx_ir'] = None\n"
        "import lucid_onnx\n"
        "try:\n    lucid_onnx.fuse\n"
        "except ImportError as error:\n    print(error)\n"
        "from lucid_onnx import cli\n"
        "sys.exit(cli.main(['inspect', 'x.onnx']))"
    )
    (tmp_path / "x.onnx").touch()
    done = run_script(script, tmp_path)
    message = "lucid_onnx rewrites models with onnx-ir, which is not installed: pip install 'lucid-onnx[rewrite]'"
    assert done.stdout.strip() == message
    assert (done.returncode, done.stderr.strip()) == (2, f"lucid-onnx: error: {message}")
