"""Forms, files and failures of `fuse` and `lower`: external data, full disks, bad arguments."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import lucid_onnx
from lucid_onnx.ops.embedding_bag import spec
from lucid_testing.models import Small, bags, run_lowered, save_hollow
from lucid_testing.processes import PEAK_KIB, needs_peak_memory, run_script
from lucid_testing.torch_exports import Export

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


@pytest.mark.parametrize("form", ["portable", "standard", "native"])
def test_forms(form: Any) -> None:
    model = lucid_onnx.build_model(np.eye(3, dtype=np.float32), form="standard")
    fused = lucid_onnx.fuse(model, form=form)
    assert len(fused.fused) == 1
    assert len(fused.model.functions) == (form == "portable")
    assert (spec.DOMAIN in {i.domain for i in fused.model.opset_import}) == (form != "standard")
    again = lucid_onnx.lower(fused.model, form=form)
    assert len(bags(again)) == (form != "standard")


def test_lower_leaves_no_trace(tmp_path: Path) -> None:
    model = lucid_onnx.build_model(np.eye(3, dtype=np.float32))
    lucid_onnx.lower(model, tmp_path / "standard.onnx")
    assert b"ai.lucid" not in (tmp_path / "standard.onnx").read_bytes()
    assert len(bags(model)) == 1


def test_external_data_stays_where_it_is(lowered: Path) -> None:
    data = lowered.with_name("model.onnx.data")
    before, expected = (data.stat().st_ino, data.stat().st_mtime_ns, data.read_bytes()), run_lowered(lowered)
    report = lucid_onnx.fuse(lowered, lowered.with_name("fused.onnx"))
    (tensor,) = report.model.graph.initializer
    assert not tensor.raw_data
    lucid_onnx.lower(lowered.with_name("fused.onnx"), lowered)  # over its own source
    assert sorted(p.name for p in lowered.parent.iterdir()) == ["fused.onnx", "model.onnx", "model.onnx.data"]
    assert (data.stat().st_ino, data.stat().st_mtime_ns, data.read_bytes()) == before
    for path in (lowered, lowered.with_name("fused.onnx")):
        np.testing.assert_array_equal(run_lowered(path), expected)


def test_external_data_goes_along_to_another_folder(lowered: Path, tmp_path: Path) -> None:
    expected = run_lowered(lowered)
    (tmp_path / "out").mkdir()
    lucid_onnx.fuse(lowered, tmp_path / "out" / "fused.onnx")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["fused.onnx", "fused.onnx.data"]
    shutil.rmtree(lowered.parent)
    np.testing.assert_array_equal(run_lowered(tmp_path / "out" / "fused.onnx"), expected)


#: What writes a file from a model, by name; each takes the paths and further arguments.
WRITES: dict[str, Callable[..., Any]] = {
    "fuse": lucid_onnx.fuse,
    "fuse, merge_tables": functools.partial(lucid_onnx.fuse, merge_tables=True),
    "lower": functools.partial(lucid_onnx.lower, form="portable"),
    "quantize": lucid_onnx.quantize,
    "quantize nothing": functools.partial(lucid_onnx.quantize, min_bytes=2**30),
}


@pytest.fixture
def light(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model [2000, 16] whose table is external data; in the current folder, which is empty otherwise."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    table = np.random.default_rng(0).standard_normal((2000, 16), np.float32)
    files = lucid_onnx.save(lucid_onnx.build_model(table, mode="sum", two_d=True), "model.onnx", external_data=True)
    assert files == ("model.onnx", "model.onnx.data")
    return Path("model.onnx")


@pytest.mark.parametrize("write", list(WRITES))
def test_every_file_is_named(write: str, light: Path, tmp_path: Path) -> None:
    """What moves to an empty folder by these names alone is whole."""
    for output in (Path("out.onnx"), tmp_path / "out.onnx", light.absolute()):
        if output == light.absolute() and write.startswith("quantize"):
            continue  # which has to read what it would replace
        report = WRITES[write](light, output)
        files = lucid_onnx.model_files(output)
        assert files[0] == str(output)
        assert len(files) == 2
        if write != "lower":
            assert report.files == files
            assert report.as_dict()["files"] == list(files)
        target = tmp_path / f"moved{output.stem}{len(list(tmp_path.iterdir()))}"
        target.mkdir()
        for name in files:
            shutil.copy(name, target)
        session = lucid_onnx.InferenceSession(target / output.name, native=False)
        assert session.run(None, {"indices": np.array([[3]])})[0].shape == (1, 16)
    if write != "lower":
        assert WRITES[write](light).files == (() if write == "quantize" else ("model.onnx.data",))


@pytest.mark.parametrize("write", list(WRITES))
def test_a_single_file(write: str, light: Path) -> None:
    expected = WRITES[write](light, "split.onnx")
    before = sorted(Path().iterdir())
    report = WRITES[write](light, "one.onnx", single_file=True)
    assert sorted(set(Path().iterdir()) - set(before)) == [Path("one.onnx")]
    assert lucid_onnx.model_files("one.onnx") == ("one.onnx",)
    model = report if write == "lower" else report.model
    if write != "lower":
        assert report.files == ("one.onnx",)
        assert dataclasses.replace(report, model=None, files=()) == dataclasses.replace(expected, model=None, files=())
    assert model == onnx.load("one.onnx", load_external_data=False)
    split = onnx.load("split.onnx")
    tables = {t.name: numpy_helper.to_array(t) for t in split.graph.initializer}
    assert tables
    for tensor in model.graph.initializer:
        np.testing.assert_array_equal(numpy_helper.to_array(tensor), tables[tensor.name])
    for bad, message in (("model.onnx.data", "is the external data of the model"), (None, "needs an output")):
        with pytest.raises(ValueError, match=message):
            WRITES[write](light, bad, single_file=True)
    if not write.startswith("quantize"):  # over its own source, whose data nothing needs any more
        Path("split.onnx").unlink()
        WRITES[write](light, light, single_file=True)
        assert sorted(Path().iterdir()) == [Path("model.onnx"), Path("one.onnx")]


def test_a_single_file_is_below_2_gib(tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    """It is told before anything is read or written."""
    for name, rows in (("m.onnx", 2**25), ("large.onnx", 2**27)):
        save_hollow(lucid_onnx.build_model(np.ones((8, 16), np.float32), mode="sum", two_d=True), tmp_path / name, rows)
    before = sorted(tmp_path.iterdir())
    message = r"single_file = True, but the model and its tables have .* less than 2 GiB \(protobuf's limit\)"
    for write in (lucid_onnx.fuse, lucid_onnx.lower):
        with pytest.raises(ValueError, match=message):
            write(tmp_path / "m.onnx", tmp_path / "out.onnx", single_file=True)
    read: list[tuple[int, int]] = []
    with pytest.raises(ValueError, match=message):  # 8 GiB, of which 2.5 are left as int8
        lucid_onnx.quantize(
            tmp_path / "large.onnx", tmp_path / "out.onnx", single_file=True, progress=lambda *done: read.append(done)
        )
    assert not read
    code, out, err = run("fuse", tmp_path / "m.onnx", "-o", tmp_path / "out.onnx", "--single-file")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("lucid-onnx: error: --single-file = True, but ")
    assert sorted(tmp_path.iterdir()) == before


def test_failures_leave_nothing_behind(lowered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "fused.onnx").write_bytes(b"before")
    data = lowered.with_name("model.onnx.data")

    def full(source: Any, target: Any, length: int) -> None:
        target.write(source.read(100))
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfileobj", full)
        with pytest.raises(OSError, match="No space left"):
            lucid_onnx.fuse(lowered, out / "fused.onnx")
    with pytest.raises(ValueError, match=r"fused\.onnx\.data|external data"):
        lucid_onnx.fuse(lowered, data)
    model = onnx.load(lowered, load_external_data=False)
    with pytest.raises(ValueError, match="initializer 'weight' is external data that was not loaded: give the path"):
        lucid_onnx.fuse(model, out / "fused.onnx")
    data.rename(data.with_name("elsewhere"))
    with pytest.raises(FileNotFoundError, match=r"initializer 'weight' has its data there"):
        lucid_onnx.lower(lowered, out / "fused.onnx")
    for location in ("../model.onnx.data", "/etc/passwd", ""):
        next(e for e in model.graph.initializer[0].external_data if e.key == "location").value = location
        lowered.write_bytes(model.SerializeToString())
        with pytest.raises(ValueError, match=r"initializer 'weight' has its data at .* outside of the model's folder"):
            lucid_onnx.lower(lowered, out / "fused.onnx")
    assert [(p.name, p.read_bytes()) for p in out.iterdir()] == [("fused.onnx", b"before")]


def test_bad_arguments(tmp_path: Path) -> None:
    model = lucid_onnx.build_model(np.eye(3, dtype=np.float32))
    with pytest.raises(ValueError, match="form = 'zip' is not one of 'portable', 'standard', 'native'"):
        lucid_onnx.fuse(model, form="zip")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        lucid_onnx.fuse(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    for call in (lucid_onnx.fuse, lucid_onnx.lower):
        with pytest.raises(ValueError, match=r"text\.onnx: not an ONNX model"):
            call(tmp_path / "text.onnx")
        with pytest.raises(ValueError, match="the model: not an ONNX model: it has no graph or no opset"):
            call(onnx.ModelProto())
    model.training_info.add()
    with pytest.raises(ValueError, match="has training_info, which a rewrite would lose"):
        lucid_onnx.fuse(model)


def test_a_model_that_was_wrong_before_is_refused(legacy: Callable[[str], Export]) -> None:
    model = onnx.load(legacy("sum-17").path)
    model.graph.node.append(helper.make_node("Relu", ["nowhere"], ["z"]))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n"]))
    with pytest.raises(ValueError, match=r"the model, before any change, does not pass onnx\.checker: .*nowhere"):
        lucid_onnx.fuse(model)


def test_an_old_model_with_functions_is_refused(legacy: Callable[[str], Export]) -> None:
    model = onnx.load(legacy("sum-11").path)
    model.functions.append(
        helper.make_function(
            "f", "F", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], [helper.make_opsetid("", 11)]
        )
    )
    with pytest.raises(ValueError, match=r"opset 11 and has functions, which onnx\.version_converter drops"):
        lucid_onnx.fuse(model)


def test_nothing_to_fuse_changes_nothing(tmp_path: Path) -> None:
    g = Small(opset=9)
    model = g.model(g("Relu", "i"))
    report = lucid_onnx.fuse(model, tmp_path / "same.onnx")
    assert (report.fused, report.unfused, report.model) == ((), (), model)
    assert onnx.load(tmp_path / "same.onnx") == model


@needs_peak_memory
@pytest.mark.large
def test_a_huge_table_is_not_loaded(tmp_path: Path) -> None:
    """6 GiB of external data, a hole in the file system: fused in under 500 MB of memory, and not copied."""
    rows = 6 * 2**30 // 256
    model = lucid_onnx.build_model(np.zeros((4, 64), np.float32), mode="sum", form="standard")
    data = save_hollow(model, tmp_path / "model.onnx", rows)
    script = (
        f"import lucid_onnx\nreport = lucid_onnx.fuse('model.onnx', 'fused.onnx')\nprint(len(report.fused), {PEAK_KIB})"
    )
    done = run_script(script, tmp_path)
    assert done.returncode == 0, done.stderr
    count, kibibytes = map(int, done.stdout.split())
    assert count == 1
    assert kibibytes < 500_000
    assert data.stat().st_blocks * 512 < 2**20
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fused.onnx", "model.data", "model.onnx"]


@needs_peak_memory
def test_a_full_disk_leaves_nothing_and_a_copy_is_not_loaded(tmp_path: Path) -> None:
    """A table of 256 MiB goes to another folder, in pieces; where files must be smaller, nothing appears there."""
    model = lucid_onnx.build_model(np.zeros((4, 64), np.float32), mode="sum", form="standard")
    table = save_hollow(model, tmp_path / "model.onnx", 2**20, sized=False)
    with table.open("r+b") as file:
        file.seek(2**27 - 1)
        file.write(b"a row")
    before = table.stat()
    script = (
        "import os, resource, signal, lucid_onnx\n"
        "os.mkdir('out')\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails, as on a disk that is full\n"
        "limits = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**26, limits[1]))\n"
        "for call in (lucid_onnx.fuse, lucid_onnx.lower):\n"
        "    try:\n        call('model.onnx', 'out/x.onnx')\n"
        "    except OSError as error:\n        print(error.errno, os.listdir('out'))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, limits)\n"
        "lucid_onnx.fuse('model.onnx', 'out/fused.onnx')\n"
        f"print({PEAK_KIB})"
    )
    done = run_script(script, tmp_path)
    assert done.returncode == 0, done.stderr
    *refused, kibibytes = done.stdout.splitlines()
    assert refused == ["27 []"] * 2  # EFBIG
    assert int(kibibytes) < 300_000
    after = table.stat()
    assert (after.st_ino, after.st_mtime_ns, after.st_size) == (before.st_ino, before.st_mtime_ns, before.st_size)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["fused.onnx", "fused.onnx.data"]
    with (tmp_path / "out" / "fused.onnx.data").open("rb") as copy:
        assert copy.seek(2**27 - 1) + len(copy.read(5) + copy.read()) == 2**28
        copy.seek(2**27 - 1)
        assert copy.read(6) == b"a row\0"


def test_the_ir_version_is_the_lowest_that_suffices(dynamo: Callable[[str], Export]) -> None:
    """torch asks for IR version 10, which ONNX Runtime reads from 1.18 on; a bag at opset 18 needs 8."""
    export = onnx.load(dynamo("sum").path)
    assert export.ir_version >= 10
    opset = next(i for i in export.opset_import if not i.domain)
    needed = helper.find_min_ir_version_for([opset])
    assert lucid_onnx.fuse(export).model.ir_version == needed
    for form in ("standard", "native"):
        assert lucid_onnx.fuse(export, form=form).model.ir_version == needed


def _standard(ir_version: int, opset: int = 18) -> onnx.ModelProto:
    model = lucid_onnx.build_model(np.eye(3, dtype=np.float32), mode="sum", form="standard", opset=opset)
    model.ir_version = ir_version
    return model


def test_what_a_model_needs_keeps_its_ir_version() -> None:
    assert lucid_onnx.fuse(_standard(10)).model.ir_version == 8
    assert lucid_onnx.fuse(_standard(8)).model.ir_version == 8
    assert lucid_onnx.fuse(_standard(10, opset=21)).model.ir_version == 10
    four_bits = _standard(11)
    four_bits.graph.initializer.append(helper.make_tensor("codes", TensorProto.INT4, [2], [1, 2]))
    four_bits.graph.node.append(helper.make_node("Custom", ["codes"], ["c"], domain="mine"))
    four_bits.graph.output.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, [2]))
    four_bits.opset_import.append(helper.make_opsetid("mine", 1))
    assert lucid_onnx.fuse(four_bits, form="native").model.ir_version == 10
    with_defaults = _standard(10)
    body = [helper.make_node("Relu", ["x"], ["y"])]
    function = helper.make_function("mine", "F", ["x"], ["y"], body, [helper.make_opsetid("", 18)])
    function.attribute_proto.append(helper.make_attribute("a", 1))
    with_defaults.functions.append(function)
    with_defaults.opset_import.append(helper.make_opsetid("mine", 1))
    assert lucid_onnx.fuse(with_defaults).model.ir_version == 9
    function.overload = "o"
    del with_defaults.functions[:]
    with_defaults.functions.append(function)
    assert lucid_onnx.fuse(with_defaults).model.ir_version == 10
    # Without a bag nothing is changed.
    model = onnx.ModelProto()
    model.CopyFrom(_standard(10))
    del model.graph.node[:]
    model.graph.node.append(helper.make_node("Identity", ["weight"], ["output"]))
    assert lucid_onnx.fuse(model).model.ir_version == 10
