"""The command line: what it makes is what the reference says, and every mistake is one line and exit code 2."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import lucid_onnx
from lucid_onnx import cli
from lucid_onnx.cli import files as cli_files
from lucid_onnx.runtime import info, installation
from lucid_onnx.runtime.library import CudaToolkit
from lucid_testing.kernels import library_path, needs_library

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16, np.dtype(np.float64))
SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(info.FORCE_ISA, raising=False)


@pytest.fixture
def refused(run):
    """Run a command line that must end as one line on stderr; returns that line without its prefix."""

    def call(*arguments):
        before = sorted(Path().rglob("*"))
        code, out, err = run(*arguments)
        assert code == 2
        assert out == ""
        assert err.count("\n") == 1, err
        assert err.startswith("lucid-onnx: error: ")
        assert "\x1b" not in err
        assert sorted(Path().rglob("*")) == before
        return err.removeprefix("lucid-onnx: error: ").rstrip("\n")

    return call


@pytest.fixture
def bag(run):
    """Files of a small bag: table.npy [5, 3], indices.npy, offsets.npy, model.onnx (sum)."""
    np.save("table.npy", np.arange(15, dtype=np.float32).reshape(5, 3))
    np.save("indices.npy", np.array([1, 2, 4, 0]))
    np.save("offsets.npy", np.array([0, 3]))
    assert run("build", "table.npy", "-o", "model.onnx", "--mode", "sum")[0] == 0


BAG = ("-i", "indices=indices.npy", "-i", "offsets=offsets.npy")


def write_safetensors(path, tensors, metadata=None):
    header, data = {} if metadata is None else {"__metadata__": metadata}, b""
    for key, array in tensors.items():
        offsets = [len(data), len(data) + array.nbytes]
        dtype = SAFETENSORS_DTYPES[array.dtype.name]
        header[key] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": offsets}
        data += array.tobytes()
    text = json.dumps(header).encode()
    Path(path).write_bytes(len(text).to_bytes(8, "little") + text + data)


def table_of(path):
    (tensor,) = onnx.load(path).graph.initializer
    return onnx.numpy_helper.to_array(tensor)


# What works.


def test_version(run):
    assert run("--version") == (0, f"lucid-onnx {lucid_onnx.__version__}\n", "")


def test_the_version_has_a_short_option(run):
    assert run("-V") == run("--version")


@pytest.mark.parametrize("there", [True, False])
def test_the_folder_of_the_cmake_package(there, tmp_path, monkeypatch, run):
    folder = tmp_path / "lib" / "cmake" / "lucid_onnx"
    if there:
        folder.mkdir(parents=True)
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
    if there:
        assert run("--cmake-dir") == (0, f"{folder}\n", "")
    else:
        message = f"lucid-onnx: error: {folder}: lucid_onnx was installed without its native library\n"
        assert run("--cmake-dir") == (2, "", message)
    assert run("fuse", "-h") == run("fuse", "--help")


def test_no_arguments_show_the_help(run):
    code, out, _ = run()
    assert code == 0
    assert all(command in out for command in ("demo", "build", "run", "info", "inspect", "fuse", "lower"))


@pytest.mark.parametrize("command", ["demo", "build", "run", "info", "inspect", "fuse", "lower"])
def test_help_has_an_example(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"Example: lucid-onnx {command} " in " ".join(out.split())


@pytest.mark.parametrize("form", ["portable", "standard"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_build_then_run_is_the_reference(run, dtype, mode, form):
    rng = np.random.default_rng(0)
    table = rng.standard_normal((20, 5)).astype(dtype)
    indices, offsets = rng.integers(0, 20, 30), np.array([0, 4, 4, 20])
    weights = rng.standard_normal(30).astype(dtype)
    np.save("table.npy", table)
    np.save("indices.npy", indices)
    np.save("offsets.npy", offsets)
    np.save("weights.npy", weights)
    weighted = mode == "sum"
    code, out, err = run(
        *("build", "table.npy", "-o", "m.onnx", "--mode", mode, "--form", form),
        *("--max-norm", "1.5", "--padding-idx", "-1"),
        *(["--per-sample-weights"] if weighted else []),
    )
    assert (code, err) == (0, "")
    assert "wrote m.onnx (" in out
    assert f"table {dtype} [20, 5]" in out
    assert f"{form} form, opset 18" in out
    assert "inputs: indices int64 [num_indices], offsets int64 [num_bags]" in out
    assert f"outputs: output {dtype} [num_bags, 5]" in out
    weights_given = ["-i", "per_sample_weights=weights.npy"] if weighted else []
    code, out, err = run("run", "m.onnx", "--no-native", *BAG, *weights_given, "-o", "pooled.npy")
    assert (code, err) == (0, "")
    assert re.search(rf"output +{dtype} +\[4, 5\] ", out)
    expected = lucid_onnx.reference.embedding_bag(
        indices,
        table,
        offsets,
        mode=mode,
        max_norm=1.5,
        padding_idx=-1,
        per_sample_weights=weights if weighted else None,
    )
    pooled = np.load("pooled.npy")
    if dtype == BFLOAT16:
        assert "wrote pooled.npy (bfloat16 as float32)" in out
        assert pooled.dtype == np.float32
    else:
        assert pooled.dtype == dtype
    tolerance = {"float64": 1e-12, "float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}[dtype.name]
    np.testing.assert_allclose(pooled, expected.astype(pooled.dtype), rtol=tolerance, atol=tolerance)


@needs_library
@pytest.mark.parametrize("form", ["portable", "native"])
def test_run_on_the_native_kernel(run, form):
    np.save("table.npy", np.arange(15, dtype=np.float32).reshape(5, 3))
    np.save("indices.npy", np.array([[1, 2], [4, 0]], np.int32))
    assert run("build", "table.npy", "-o", "m.onnx", "--two-d", "--index-dtype", "int32", "--form", form)[0] == 0
    code, out, err = run("run", "m.onnx", "--native", "-i", "indices=indices.npy", "-o", "outputs")
    assert (code, err) == (0, "")
    assert f"native kernels: registered ({info.library().active})" in out
    np.testing.assert_array_equal(np.load("outputs/output.npy"), [[4.5, 5.5, 6.5], [6, 7, 8]])


def test_run_tells_who_ran_and_how_long_it_took(bag, run):
    """The native kernels run one node, a function many, and a model without our nodes has none."""
    assert run("lower", "model.onnx", "-o", "standard.onnx")[0] == 0
    before = sorted(Path().iterdir())
    outs = {}
    for model, options in itertools.product(("model.onnx", "standard.onnx"), ((), ("--no-native",))):
        for profile in ((), ("--profile",)):
            code, out, err = run("run", model, *BAG, *options, *profile)
            assert (code, err) == (0, "")
            outs[model, bool(options), bool(profile)] = out
    assert sorted(Path().iterdir()) == before
    portable, lines = outs["model.onnx", True, True], outs["model.onnx", True, True].splitlines()
    assert "native kernels: not registered; in functions: 1 node (output)" in portable
    (row,) = (line for line in lines if " function " in line)
    assert row.split()[:3] == ["output", "EmbeddingBag", "function"]
    assert int(row.split()[3]) > 50
    assert "native kernels: not registered\n" in outs["standard.onnx", True, False]
    last = outs["standard.onnx", True, True].splitlines()[-1]
    assert re.fullmatch(r"\d+ others +\d+ +\d+\.\d{3} +\d+ % *", last)
    if library_path() is None:
        return
    active = info.library().active
    assert f"native kernels: registered ({active}), and ran 1 node (output)\n" in outs["model.onnx", False, False]
    assert [line.split()[:4] for line in outs["model.onnx", False, True].splitlines()[4:]] == [
        ["EmbeddingBag_0", "EmbeddingBag", "native", "1"]
    ]
    nothing = "native kernels: nothing to run: the model has no ai.lucid nodes, see `lucid-onnx inspect`"
    assert nothing in outs["standard.onnx", False, False]
    assert "registered" not in outs["standard.onnx", False, False]


def test_profiles_read_external_data_where_it_is(run):
    np.save("t.npy", np.random.default_rng(0).standard_normal((512, 8)).astype(np.float32))
    np.save("i.npy", np.array([[5, 6]]))
    Path("folder").mkdir()
    built = run("build", "t.npy", "-o", "folder/m.onnx", "--external-data", "--two-d", "--mode", "sum")
    assert built[0] == 0
    assert run("run", "folder/m.onnx", "-i", "indices=i.npy", "--profile", "-o", "pooled.npy")[0] == 0
    np.testing.assert_allclose(np.load("pooled.npy")[0], np.load("t.npy")[5:7].sum(0), rtol=1e-5)


def test_include_last_offset(run):
    np.save("table.npy", np.eye(3, dtype=np.float32))
    np.save("indices.npy", np.array([0, 1, 2, 2]))
    np.save("offsets.npy", np.array([0, 1, 3]))
    assert run("build", "table.npy", "-o", "m.onnx", "--mode", "sum", "--include-last-offset")[0] == 0
    assert run("run", "m.onnx", "--no-native", *BAG, "-o", "p.npy")[0] == 0
    np.testing.assert_array_equal(np.load("p.npy"), [[1, 0, 0], [0, 1, 1]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_safetensors_tables_are_read_bit_by_bit(run, dtype):
    table = np.random.default_rng(0).standard_normal((7, 3)).astype(dtype)
    table[0, 0] = np.nan
    write_safetensors("t.safetensors", {"bias": table[0], "embedding.weight": table}, metadata={"format": "pt"})
    assert run("build", "t.safetensors:embedding.weight", "-o", "m.onnx")[0] == 0
    assert table_of("m.onnx").tobytes() == table.tobytes()


def test_a_single_tensor_needs_no_key(run):
    table = np.ones((2, 3), np.float32)
    write_safetensors("t.safetensors", {"weight": table})
    assert run("build", "t.safetensors", "-o", "m.onnx")[0] == 0
    np.testing.assert_array_equal(table_of("m.onnx"), table)


def test_the_library_of_safetensors_writes_the_same_layout(run):
    numpy_files = pytest.importorskip("safetensors.numpy")
    table = np.arange(6, dtype=np.float32).reshape(2, 3)
    numpy_files.save_file({"other": np.zeros(3, np.int64), "w": table}, "t.safetensors")
    assert run("build", "t.safetensors:w", "-o", "m.onnx")[0] == 0
    np.testing.assert_array_equal(table_of("m.onnx"), table)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
@pytest.mark.parametrize("name", ["t.npy", "t.safetensors"])
def test_empty_tables(run, name, shape):
    table = np.zeros(shape, np.float32)
    np.save("t.npy", table)
    write_safetensors("t.safetensors", {"w": table})
    assert run("build", name, "-o", "m.onnx")[0] == 0
    assert table_of("m.onnx").shape == shape


def test_npy_layouts(run):
    table = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.save("big_endian.npy", table.astype(">f4"))
    np.save("fortran.npy", np.asfortranarray(table))
    for name in ("big_endian.npy", "fortran.npy"):
        assert run("build", name, "-o", "m.onnx")[0] == 0
        np.testing.assert_array_equal(table_of("m.onnx"), table)


def test_external_data(run):
    table = np.random.default_rng(0).standard_normal((512, 8)).astype(np.float32)
    np.save("t.npy", table)
    code, out, err = run("build", "t.npy", "-o", "m.onnx", "--external-data")
    assert (code, err) == (0, "")
    assert "wrote m.onnx.data (16.0 KiB)" in out
    assert Path("m.onnx").stat().st_size < table.nbytes
    np.testing.assert_array_equal(table_of("m.onnx"), table)
    assert run("build", "t.npy", "-o", "inside.onnx", "--no-external-data")[0] == 0
    assert not Path("inside.onnx.data").exists()


@pytest.mark.parametrize("raw", [False, True], ids=["float32", "raw"])
def test_bfloat16_inputs(run, raw):
    table = np.ones((4, 2), BFLOAT16)
    weights = np.array([0.5, 2, np.nan], BFLOAT16)
    np.save("t.npy", table)
    np.save("indices.npy", np.array([0, 1, 2]))
    np.save("offsets.npy", np.array([0, 2]))
    np.save("weights.npy", weights if raw else weights.astype(np.float32))
    assert run("build", "t.npy", "-o", "m.onnx", "--mode", "sum", "--per-sample-weights")[0] == 0
    assert run("run", "m.onnx", "--no-native", *BAG, "-i", "per_sample_weights=weights.npy", "-o", "p.npy")[0] == 0
    np.testing.assert_array_equal(np.load("p.npy"), [[2.5, 2.5], [np.nan, np.nan]])


def test_several_outputs_go_to_a_folder(run):
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])
    outs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in ("a/b", "c")]
    nodes = [helper.make_node("Neg", ["x"], ["a/b"]), helper.make_node("Abs", ["x"], ["c"])]
    graph = helper.make_graph(nodes, "g", [x], outs)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), "m.onnx")
    np.save("x.npy", np.array([1, -2], np.float32))
    assert run("run", "m.onnx", "-i", "x=x.npy", "-o", "results")[0] == 0
    assert sorted(p.name for p in Path("results").iterdir()) == ["a_b.npy", "c.npy"]
    np.testing.assert_array_equal(np.load("results/a_b.npy"), [-1, 2])


@pytest.mark.parametrize("name", ["out.csv", "out.txt", "pooled.v2"])
def test_outputs_are_npy_files(bag, run, refused, name):
    message = f"--output {name}: outputs are written as .npy files; give FILE.npy for one output, or a folder, whose "
    assert refused("run", "model.onnx", *BAG, "-o", name) == message + "name has no dot or which exists"
    Path(name).mkdir()
    assert run("run", "model.onnx", *BAG, "-o", name)[0] == 0
    assert (Path(name) / "output.npy").is_file()
    assert run("run", "model.onnx", *BAG, "-o", "pooled.NPY")[0] == 0
    assert Path("pooled.NPY").is_file()


def test_info(run):
    code, out, err = run("info")
    assert (code, err) == (0, "")
    assert re.search(rf"^lucid-onnx +{re.escape(lucid_onnx.__version__)}$", out, re.M)
    assert re.search(rf"^onnx +{re.escape(onnx.__version__)}$", out, re.M)
    assert "CPUExecutionProvider" in out


def test_info_json(run):
    np.save("t.npy", np.ones((6, 4), np.float16))
    options = ("--max-norm", "0.1", "--norm-type", "inf", "--padding-idx", "2")
    assert run("build", "t.npy", "-o", "m.onnx", "--mode", "max", *options)[0] == 0
    code, out, err = run("info", "m.onnx", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["lucid_onnx"] == lucid_onnx.__version__
    assert found["numpy"] == np.__version__
    assert "CPUExecutionProvider" in found["providers"]
    assert found["model"]["form"] == "portable"
    assert found["model"]["opset"] == 18
    assert found["model"]["file_bytes"] == Path("m.onnx").stat().st_size
    assert found["model"]["inputs"] == [
        {"name": "indices", "dtype": "int64", "shape": ["num_indices"]},
        {"name": "offsets", "dtype": "int64", "shape": ["num_bags"]},
    ]
    assert found["model"]["outputs"] == [{"name": "output", "dtype": "float16", "shape": ["num_bags", 4]}]
    assert found["model"]["nodes"] == [
        {
            "name": "output",
            "op": "EmbeddingBag",
            "form": "portable",
            "mode": "max",
            "table": {"name": "weight", "dtype": "float16", "shape": [6, 4]},
            "table_bytes": 48,
            "table_external": False,
            "padding_idx": 2,
            "max_norm": pytest.approx(0.1, rel=1e-12),
            "norm_type": "inf",
            "include_last_offset": False,
            "numbers_bytes": None,
            "attributes": {
                "mode": "max",
                "padding_idx": 2,
                "max_norm": pytest.approx(0.1, rel=1e-12),
                "norm_type": "inf",
                "include_last_offset": False,
                "negative": "refuse",
                "divisor": None,
            },
            "changed": "padding_idx 2, max_norm 0.1, norm_type inf",
        }
    ]


def test_every_attribute_is_shown(run):
    """By `info`, by `inspect` of the same bag in standard operators, and in the picture of it."""
    np.save("t.npy", np.ones((6, 4), np.float32))
    options = ("--mode", "sqrtn", "--divisor", "weights", "--negative", "skip", "--padding-idx", "2")
    assert run("build", "t.npy", "-o", "m.onnx", "--per-sample-weights", *options)[0] == 0
    changed = "padding_idx 2, negative skip, divisor weights"
    (node,) = json.loads(run("info", "m.onnx", "--json")[1])["model"]["nodes"]
    assert node["changed"] == changed
    assert f" {changed} " in f"{run('info', 'm.onnx')[1]} ".replace("\n", " ")
    assert run("lower", "m.onnx", "-o", "s.onnx")[0] == 0
    assert changed in " ".join(run("inspect", "s.onnx")[1].split())
    (fused,) = json.loads(run("inspect", "s.onnx", "--json")[1])["fused"]
    assert fused["changed"] == changed
    assert fused["attributes"] == node["attributes"]
    assert run("inspect", "s.onnx", "--svg", "s.svg")[0] == 0
    assert f">sqrtn, {changed}<" in Path("s.svg").read_text()


def test_info_names_the_files_of_a_model(run):
    np.save("t.npy", np.ones((600, 4), np.float32))
    Path("folder").mkdir()
    assert run("build", "t.npy", "-o", "folder/m.onnx", "--external-data")[0] == 0
    data = Path("folder/m.onnx.data")
    for size in (data.stat().st_size, None):
        code, out, err = run("info", "folder/m.onnx")
        assert (code, err) == (0, "")
        cached = size if sys.platform == "linux" else None  # it was written a moment ago
        told = "missing" if size is None else "9.4 KiB" if cached is None else "9.4 KiB, 9.4 KiB of it in memory"
        assert f"external data: {data} ({told})\n" in out
        found = json.loads(run("info", "folder/m.onnx", "--json")[1])
        assert found["model"]["external_data"] == [{"path": str(data), "file_bytes": size, "cached_bytes": cached}]
        data.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("path", "why", "toolkit", "lines"),
    [
        (None, None, None, ["CUDA library not installed"]),
        ("/a/lib.so", "no driver", None, ["CUDA library /a/lib.so", "does not run here: no driver"]),
        (
            "/a/lib.so",
            None,
            CudaToolkit("13.0", 580),
            ["CUDA library /a/lib.so", "built with CUDA 13.0, which needs NVIDIA driver 580 or later", "runs here"],
        ),
    ],
)
def test_info_has_the_cuda_library(run, monkeypatch, path, why, toolkit, lines):
    monkeypatch.setattr(installation, "cuda_toolkit", lambda: toolkit)
    monkeypatch.setattr(installation, "find_cuda_library", lambda: path)
    monkeypatch.setattr(installation, "why_no_cuda", lambda: why)
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: providers)
    code, out, err = run("info")
    assert (code, err) == (0, "")
    first, *others = lines
    assert out.splitlines()[-len(lines) :] == [first, *(" " * 13 + line for line in others)]
    found = json.loads(run("info", "--json")[1])
    versions = None if toolkit is None else list(toolkit)
    assert found["cuda_library"] == (None if path is None else {"path": path, "problem": why, "toolkit": versions})


def test_a_cuda_library_needs_onnxruntimes_provider(run, monkeypatch):
    monkeypatch.setattr(installation, "find_cuda_library", lambda: "/a/lib.so")
    monkeypatch.setattr(installation, "why_no_cuda", lambda: None)
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    assert "does not run here: onnxruntime has no CUDAExecutionProvider: pip " in run("info")[1]


def test_info_of_a_model(run, bag):
    code, out, err = run("info", "model.onnx")
    assert (code, err) == (0, "")
    assert "portable form" in out
    assert re.search(r"^output +EmbeddingBag +portable +sum +weight +float32 +\[5, 3\] +60 B +- *$", out, re.M)


@pytest.mark.skipif(
    library_path() is None or sys.platform != "linux", reason="the native library moves tables on Linux"
)
def test_info_tells_where_tables_would_lie(run, refused):
    np.save("t.npy", np.ones((40_000, 64), np.float32))
    assert run("build", "t.npy", "-o", "m.onnx", "--external-data")[0] == 0
    code, out, err = run("info", "m.onnx", "--table-memory", "hugepage_copy")
    assert (code, err) == (0, "")
    assert re.search(r"^table memory 'hugepage_copy', \S+ [KMGT]?i?B free:$", out, re.M)
    assert re.search(r"^weight +a file +\S+ MiB +copied +10\.0 MiB +5 *$", out, re.M)
    (table,) = json.loads(run("info", "m.onnx", "--table-memory", "mmap", "--json")[1])["table_memory"]["tables"]
    assert table == {
        "name": "weight",
        "bytes": 10_240_000,
        "external": True,
        "plan": "stays",
        "copied_bytes": 0,
        "huge_pages": 0,
    }
    assert refused("info", "m.onnx", "--table-memory", "swap").startswith("table memory 'swap' is not one of 'auto'")


@pytest.mark.parametrize("form", ["standard", "native"])
def test_info_tells_the_form(run, form):
    np.save("t.npy", np.ones((2, 2), np.float32))
    assert run("build", "t.npy", "-o", "m.onnx", "--form", form)[0] == 0
    found = info.model("m.onnx")
    assert found.form == form
    assert len(found.nodes) == (form == "native")


def test_info_finds_bags_in_subgraphs():
    body = helper.make_graph(
        [lucid_onnx.make_node("table", "ids", None, "pooled", mode="sum", name="inner")],
        "then",
        [],
        [helper.make_tensor_value_info("pooled", TensorProto.FLOAT, None)],
    )
    graph = helper.make_graph(
        [helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)],
        "g",
        [
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("ids", TensorProto.INT64, ["B", "L"]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [helper.make_tensor("table", TensorProto.FLOAT, [2, 3], [0.0] * 6)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    lucid_onnx.save(lucid_onnx.to_form(model, "portable"), "m.onnx")
    found = info.model("m.onnx")
    assert [(n.name, n.op, n.form, n.table.shape, n.table_bytes) for n in found.nodes] == [
        ("inner", "EmbeddingBag2D", "portable", (2, 3), 24)
    ] * 2


@needs_library
def test_info_of_the_library(run, monkeypatch):
    found = info.library()
    assert found is not None
    assert found.path == lucid_onnx.get_library_path()
    assert found.version == lucid_onnx.__version__
    able = [isa.name for isa in found.isas if isa.supported]
    assert found.active == able[-1]
    assert not found.forced
    monkeypatch.setenv(info.FORCE_ISA, able[0])
    forced = info.library()
    assert forced is not None
    assert (forced.active, forced.forced) == (able[0], True)
    assert f"{able[0]}, forced by LUCID_FORCE_ISA" in run("info")[1]


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["bogus"], r"No such command 'bogus'\.?"),
        (["build", "-o", "x.onnx"], r"Missing argument 'TABLE'\.?"),
        (["build", "table.npy"], r"Missing option '--output'.*"),
        (["build", "table.npy", "-o", "x.onnx", "--nope"], r"No such option: --nope.*"),
        (["build", "no.npy", "-o", "x.onnx"], r"no\.npy: no such file"),
        (["build", ".", "-o", "x.onnx"], r"\.: is a directory"),
        (["build", "table.npy", "-o", "."], r"--output \.: is a directory"),
        (["build", "table.npy", "-o", "no/x.onnx"], r"--output no/x\.onnx: there is no directory no"),
        (["build", "table.npy", "-o", "table.npy"], r"--output table\.npy: is the table itself"),
        (["build", "indices.npy", "-o", "x.onnx"], r"indices\.npy: weight has dtype int64, expected float32, .*"),
        (["build", "line.npy", "-o", "x.onnx"], r"line\.npy: weight has shape \[3\], expected \[V, D\]"),
        (["build", "table.npy", "-o", "x.onnx", "--mode", "avg"], r"mode = 'avg' is not one of .*"),
        (["build", "table.npy", "-o", "x.onnx", "--max-norm", "nan"], r"max_norm = nan must be >= 0"),
        (["build", "table.npy", "-o", "x.onnx", "--max-norm", "-1"], r"max_norm = -1\.0 must be >= 0"),
        (["build", "table.npy", "-o", "x.onnx", "--max-norm", "big"], r".*'--max-norm'.*'big' is not a number"),
        (["build", "table.npy", "-o", "x.onnx", "--norm-type", "0"], r"norm_type = 0\.0 must be > 0"),
        (["build", "table.npy", "-o", "x.onnx", "--padding-idx", "5"], r"padding_idx = 5 is outside \[-5, 5\), .*"),
        (
            ["build", "table.npy", "-o", "x.onnx", "--padding-idx", "1.5"],
            r".*'--padding-idx'.*'1\.5' is not an integer",
        ),
        (["build", "table.npy", "-o", "x.onnx", "--opset", "15"], r"opset = 15 is outside \[16, 26\]"),
        (["build", "table.npy", "-o", "x.onnx", "--form", "fast"], r"form = 'fast' is not one of .*"),
        (["build", "table.npy", "-o", "x.onnx", "--index-dtype", "int8"], r"index_dtype = int8 is not one of .*"),
        (["build", "table.npy", "-o", "x.onnx", "--per-sample-weights"], r"per_sample_weights needs mode 'sum', .*"),
        (["run", "no.onnx"], r"no\.onnx: no such file"),
        (["run", "."], r"\.: is a directory"),
        (["run", "model.onnx"], r"--input indices: missing; model\.onnx takes int64 \[num_indices\]"),
        (["run", "model.onnx", *BAG[:2]], r"--input offsets: missing; model\.onnx takes .*"),
        (["run", "model.onnx", *BAG, "-i", "x=line.npy"], r"--input x: .* no such input; it has: indices, offsets"),
        (["run", "model.onnx", *BAG, "-i", "offsets=o.npy"], r"--input offsets: given twice, offsets\.npy and o\.npy"),
        (["run", "model.onnx", "-i", "indices"], r"--input indices: expected NAME=FILE\.npy"),
        (["run", "model.onnx", *BAG[:2], "-i", "offsets=no.npy"], r"no\.npy: no such file"),
        (
            ["run", "model.onnx", *BAG[:2], "-i", "offsets=line.npy"],
            r"--input offsets: line\.npy has dtype float32, model\.onnx takes int64",
        ),
        (
            ["run", "model.onnx", *BAG[2:], "-i", "indices=square.npy"],
            r"--input indices: square\.npy has shape \[2, 2\], model\.onnx takes \[num_indices\]",
        ),
        (["run", "model.onnx", *BAG, "--provider", "tpu"], r"--provider tpu: is not one of cpu, cuda"),
        (["run", "model.onnx", *BAG, "-o", "no/x.npy"], r"--output no/x\.npy: there is no directory no"),
        (["run", "model.onnx", *BAG, "-o", "model.onnx"], r"--output model\.onnx: is neither a folder nor FILE\.npy"),
        (["info", "no.onnx"], r"no\.onnx: no such file"),
        (["info", "."], r"\.: is a directory"),
        (["info", "table.npy"], r"table\.npy: not an ONNX model: .*"),
        (["demo", "-o", "."], r"--output \.: is a directory"),
        (["demo", "-o", "no/x.onnx"], r"--output no/x\.onnx: there is no directory no"),
        (["demo", "--query", "qqqq zzzz"], r"query 'qqqq zzzz': the text has none of its words"),
        (["demo", "--query", ""], r"query '': the text has none of its words"),
    ],
)
def test_mistakes(bag, refused, arguments, line):
    np.save("line.npy", np.ones(3, np.float32))
    np.save("square.npy", np.ones((2, 2), np.int64))
    found = refused(*arguments)
    assert re.fullmatch(line, found), found


def npy(descr, shape="(2, 3)"):
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"junk",
        b"\x93NUMPY",
        b"\x93NUMPY\x01\x00",
        b"\x93NUMPY\x09\x00\x76\x00{}",
        b"\x93NUMPY\x01\x00\x10\x00{garbage        ",
        b"\x93NUMPY\x01\x00\x10\x00{0: 1}          ",
        npy("'<f4'") + b"short",
        npy("'<f4'", "(-1, 3)"),
        npy("'<f4'", "(99999999999999999999, 3)"),
        npy("'<f4'", "(1000000000000, 1000000000000)"),
        npy("'<f4'", "(4294967296, 4294967296)"),
        npy("'<f4'", "(2305843009213693952, 2)"),
        npy("'O'") + b"\x80\x04N.",
        npy("[('a', '<f4'), ('b', 'O')]", "(1,)"),
        npy("'nonsense'"),
    ],
)
def test_broken_npy_files(refused, content):
    Path("t.npy").write_bytes(content)
    assert refused("build", "t.npy", "-o", "m.onnx").startswith("t.npy: ")


def test_pickles_are_not_run(refused, tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "trapped",))

    np.save("t.npy", np.array([Trap()], object), allow_pickle=True)
    assert refused("build", "t.npy", "-o", "m.onnx").startswith("t.npy: cannot be read as an array of numbers: ")


def safetensors(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


ENTRY = {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", r"broken .*a header of 0 bytes in a file of 0"),
        (b"\xff" * 8, r"broken .*a header of \d+ bytes in a file of 8"),
        (safetensors(b"nonsense"), r"broken .*not JSON: .*"),
        (safetensors(b"\xff\xfe\xff"), r"broken .*not JSON: .*"),
        (safetensors(b"[" * 100_000), r"broken .*not JSON: .*"),
        (safetensors([1, 2]), r"broken .*not a JSON object"),
        (safetensors({}), r"which tensor\? .* it has: none"),
        (safetensors({"w": ENTRY}, b"short"), r"broken .*tensor 'w', F32 \[1, 2\], lies at 0 to 8 of 5 bytes of data"),
        (safetensors({"w": ENTRY | {"shape": [2, 2]}}, b"8" * 8), r"broken .*lies at 0 to 8 of 8 bytes of data"),
        (safetensors({"w": ENTRY | {"data_offsets": [-8, 0]}}, b"8" * 8), r"broken .*lies at -8 to 0 of .*"),
        (safetensors({"w": ENTRY | {"shape": [-1, -2]}}, b"8" * 8), r"broken .*is described by .*"),
        (safetensors({"w": ENTRY | {"shape": "12"}}, b"8" * 8), r"broken .*is described by .*"),
        (safetensors({"w": 7}), r"broken .*tensor 'w' is described by 7"),
        (safetensors({"w": ENTRY | {"dtype": "I64"}}, b"8" * 8), r"tensor 'w' has dtype I64, expected one of F32, .*"),
        (safetensors({"w": ENTRY | {"shape": [2]}}, b"8" * 8), r"weight has shape \[2\], expected \[V, D\]"),
    ],
)
def test_broken_safetensors_files(refused, content, line):
    Path("t.safetensors").write_bytes(content)
    found = refused("build", "t.safetensors", "-o", "m.onnx")
    assert re.fullmatch(rf"t\.safetensors: {line}", found.replace("broken .safetensors file: ", "broken ")), found


def test_safetensors_keys_are_listed(refused):
    table = np.ones((2, 3), np.float32)
    write_safetensors("t.safetensors", {"users": table, "items": table})
    assert refused("build", "t.safetensors", "-o", "m.onnx") == (
        "t.safetensors: which tensor? add :KEY to the file's name; it has: users, items"
    )
    assert refused("build", "t.safetensors:shops", "-o", "m.onnx") == (
        "t.safetensors: no tensor 'shops'; it has: users, items"
    )


@pytest.mark.parametrize("command", ["run", "info"])
@pytest.mark.parametrize("content", [b"", b"not an ONNX model", b"\x08\x07"])
def test_broken_models(refused, command, content):
    Path("m.onnx").write_bytes(content)
    assert refused(command, "m.onnx").startswith("m.onnx: ")


def test_external_data_that_is_gone(run, refused):
    np.save("t.npy", np.ones((512, 8), np.float32))
    np.save("indices.npy", np.array([1]))
    np.save("offsets.npy", np.array([0]))
    assert run("build", "t.npy", "-o", "m.onnx", "--external-data")[0] == 0
    Path("m.onnx.data").unlink()
    found = refused("run", "m.onnx", "--no-native", *BAG)
    assert found.startswith("m.onnx: ")
    assert "m.onnx.data" in found
    assert ".cc:" not in found


def test_an_index_outside_the_table(bag, refused):
    np.save("indices.npy", np.array([1, 5]))
    np.save("offsets.npy", np.array([0]))
    found = refused("run", "model.onnx", "--no-native", *BAG)
    assert re.fullmatch(r"model\.onnx: Gather: .*idx=5 .*", found), found


@needs_library
def test_an_index_outside_the_table_of_the_native_kernel(bag, refused):
    np.save("indices.npy", np.array([1, 5]))
    np.save("offsets.npy", np.array([0]))
    assert (
        refused("run", "model.onnx", "--native", *BAG) == "model.onnx: EmbeddingBag: indices[1] = 5 is outside [0, 5)"
    )


def test_a_native_model_without_the_library(run, refused):
    np.save("t.npy", np.ones((2, 2), np.float32))
    assert run("build", "t.npy", "-o", "m.onnx", "--form", "native")[0] == 0
    found = refused("run", "m.onnx", "--no-native")
    assert found.startswith("m.onnx: ")
    assert found.endswith("(a model in the native form needs the native library)")


def test_native_without_a_library(bag, refused, monkeypatch):
    monkeypatch.setattr(installation, "get_library_path", _no_library)
    assert refused("run", "model.onnx", "--native", *BAG) == ("--native: the native library is not installed")


def test_without_a_library_models_run_as_standard_operators(bag, run, monkeypatch):
    monkeypatch.setattr(installation, "get_library_path", _no_library)
    code, out, _ = run("run", "model.onnx", *BAG)
    assert code == 0
    assert "native kernels: not registered" in out
    assert "library      not installed" in run("info")[1]


def _no_library():
    raise FileNotFoundError("lucid_onnx was installed without its native library")


def test_a_library_that_is_none(refused, monkeypatch):
    Path("liblucid.so").write_bytes(b"not a library")
    monkeypatch.setattr(installation, "get_library_path", lambda: str(Path("liblucid.so").absolute()))
    assert "liblucid.so" in refused("info")


@needs_library
@pytest.mark.parametrize("command", [["info"], ["run", "model.onnx", *BAG], ["demo"]], ids=lambda c: c[0])
def test_an_instruction_set_that_there_is_not(bag, refused, monkeypatch, command):
    monkeypatch.setenv(info.FORCE_ISA, "sse9")
    assert refused(*command).startswith("LUCID_FORCE_ISA = 'sse9' is not an instruction set of this machine; ")


def test_cuda_that_there_is_not(bag, refused):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    assert refused("run", "model.onnx", *BAG, "--provider", "cuda") == (
        f"--provider cuda: this onnxruntime has no CUDAExecutionProvider: {installation.install_gpu()}"
    )


@pytest.mark.parametrize(
    ("installed", "commands"),
    [
        ({}, "pip install 'lucid-onnx[gpu]'"),
        ({"onnxruntime-gpu": "1.30.0"}, "pip install 'lucid-onnx[gpu]'"),
        ({"onnxruntime": "1.32.0"}, "pip uninstall -y onnxruntime, then pip install 'lucid-onnx[gpu]'"),
    ],
)
def test_the_gpu_distribution_never_goes_beside_another(monkeypatch, installed, commands):
    monkeypatch.setattr(installation, "_distributions", lambda: installed)
    assert installation.install_gpu() == commands


def test_float32_that_is_no_bfloat16(run, refused):
    np.save("t.npy", np.ones((4, 2), BFLOAT16))
    np.save("indices.npy", np.array([0, 1]))
    np.save("offsets.npy", np.array([0]))
    np.save("weights.npy", np.array([0.5, 0.1], np.float32))
    assert run("build", "t.npy", "-o", "m.onnx", "--mode", "sum", "--per-sample-weights")[0] == 0
    assert refused("run", "m.onnx", *BAG, "-i", "per_sample_weights=weights.npy") == (
        "--input per_sample_weights: weights.npy has 0.100000001 at [1], which is not exact in bfloat16"
    )


def test_an_unknown_bag_in_a_model(refused):
    node = helper.make_node("EmbeddingBug", ["w"], ["y"], domain="ai.lucid", name="bug")
    value = helper.make_tensor_value_info("w", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "g", [value], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    onnx.save(helper.make_model(graph), "m.onnx")
    assert refused("info", "m.onnx").startswith("m.onnx: node 'bug': ai.lucid::EmbeddingBug is not one of EmbeddingBag")


@pytest.mark.parametrize("before", [None, b"precious"])
def test_a_failed_write_leaves_what_was_there(bag, run, monkeypatch, before):
    """The disk is full while the outputs are written."""
    if before is not None:
        Path("p.npy").write_bytes(before)
    files = sorted(Path().iterdir())

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array", full)
    assert run("run", "model.onnx", "--no-native", *BAG, "-o", "p.npy") == (
        2,
        "",
        "lucid-onnx: error: p.npy: cannot be written: No space left on device\n",
    )
    assert sorted(Path().iterdir()) == files
    assert before is None or Path("p.npy").read_bytes() == before
    assert run("run", "model.onnx", "--no-native", *BAG, "-o", "folder")[0] == 2
    assert sorted(Path().iterdir()) == files


@pytest.mark.parametrize(
    ("raw", "condensed"),
    [
        (
            "[ONNXRuntimeError] : 1 : FAIL : Load model from m.onnx failed:Fatal error: x:Y(-1) is not registered",
            "Fatal error: x:Y(-1) is not registered",
        ),
        (
            "\x1b[1;31m[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running "
            "Reshape node. Name:'' Status Message: /onnxruntime_src/onnxruntime/core/providers/cpu/reshape_helper.h:45 "
            "onnxruntime::ReshapeHelper::ReshapeHelper(const onnxruntime::TensorShape&, std::vector<int>&, bool) "
            "size != 0 was false. The tensor cannot be reshaped.\n\x1b[m",
            "Reshape: size != 0 was false. The tensor cannot be reshaped.",
        ),
        (
            "[ONNXRuntimeError] : 1 : FAIL : D:\\a\\_work\\1\\s\\core\\graph\\graph.cc:415 "
            "onnxruntime::Graph::Resolve(int) const A wrong graph.\nStacktrace:\nframe 1\nframe 2",
            "A wrong graph.",
        ),
        (
            "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Non-zero status code returned while running EmbeddingBag "
            "node. Name:'users' Status Message: EmbeddingBag: indices[1] = 9 is outside [0, 4)",
            "EmbeddingBag 'users': indices[1] = 9 is outside [0, 4)",
        ),
    ],
)
def test_onnxruntime_errors_are_condensed(raw, condensed):
    assert cli_files.condensed(raw) == condensed


def test_a_defect_shows_its_traceback(bag, monkeypatch):
    def defect(*_args, **_kwargs):
        raise KeyError("a defect")

    monkeypatch.setattr(cli_files, "read_feeds", defect)
    with pytest.raises(KeyError, match="a defect"):
        cli.main(["run", "model.onnx", *BAG])


# As processes.


def process(code_or_module, *arguments):
    command = [sys.executable, *code_or_module, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("module", ["lucid_onnx", "lucid_onnx.cli"])
def test_as_a_module(bag, module):
    done = process(["-m", module], "run", "model.onnx", "-i", "indices=indices.npy")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == ("lucid-onnx: error: --input offsets: missing; model.onnx takes int64 [num_bags]\n")


@pytest.mark.parametrize("arguments", [("--help",), ("info", "model.onnx", "--json")], ids=" ".join)
def test_output_that_nobody_reads(bag, arguments):
    """As in ``lucid-onnx info model.onnx | true``: no traceback, and the exit code of a process that SIGPIPE ends."""
    command = [sys.executable, "-m", "lucid_onnx", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as started:
        started.stdout.close()
        assert started.stderr.read() == b""
        assert started.wait(60) == cli.EXIT_BROKEN_PIPE == 141


def test_completion():
    """The script for a shell, and what it asks for."""
    environment = {**os.environ, "COLUMNS": "100"}
    command = [sys.executable, "-m", "lucid_onnx"]
    shown = subprocess.run(
        [*command, "--show-completion", "bash"], capture_output=True, text=True, timeout=60, env=environment
    )
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "complete -o default -F _lucid_onnx_completion lucid-onnx" in shown.stdout
    asked = {"_LUCID_ONNX_COMPLETE": "complete_bash", "COMP_WORDS": "lucid-onnx fuse --si", "COMP_CWORD": "2"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**environment, **asked})
    assert done.stdout.split() == ["--single-file"]
    asked |= {"COMP_WORDS": "lucid-onnx lower --ragged p", "COMP_CWORD": "3"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**environment, **asked})
    assert done.stdout.split() == ["pieces", "padded"]


def test_the_version_as_a_module():
    done = process(["-m", "lucid_onnx"], "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"lucid-onnx {lucid_onnx.__version__}\n", "")


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_the_extras_are_asked_for(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; from lucid_onnx.cli import main; sys.exit(main(['info']))"
    done = process(["-c", code])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (f"lucid-onnx: error: {missing} is not installed: pip install 'lucid-onnx[cli]'\n")


def test_without_onnxruntime_models_are_built_and_not_run(bag):
    start = (
        "import sys; sys.modules['onnxruntime'] = None; from lucid_onnx.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    assert process(["-c", start], "build", "table.npy", "-o", "m.onnx").returncode == 0
    assert "onnxruntime  not installed: pip install" in process(["-c", start], "info", "m.onnx").stdout
    for command in (["run", "m.onnx", *BAG], ["demo"]):
        done = process(["-c", start], *command)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == (
            "lucid-onnx: error: onnxruntime is not installed: pip install 'lucid-onnx[cpu]' (or 'lucid-onnx[gpu]')\n"
        )


def with_module(name, source):
    """How to start the command line where a module is what ``source`` does."""
    Path("planted").mkdir(exist_ok=True)
    Path("planted", f"{name}.py").write_text(source)
    return [
        "-c",
        "import sys; sys.path.insert(0, 'planted'); from lucid_onnx.cli import main; sys.exit(main(sys.argv[1:]))",
    ]


GLIBCXX = "/lib/libstdc++.so.6: version `GLIBCXX_3.4.29' not found"


def test_an_onnxruntime_that_does_not_load(bag):
    start = with_module("onnxruntime", f"raise ImportError({GLIBCXX!r})")
    for command in (["run", "model.onnx", *BAG], ["demo"]):
        done = process(start, *command)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"lucid-onnx: error: onnxruntime is installed but does not load: {GLIBCXX}\n"
    done = process(start, "info")
    assert done.returncode == 0
    assert f"onnxruntime  installed but does not load: {GLIBCXX}" in done.stdout
    found = json.loads(process(start, "info", "--json").stdout)
    assert found["onnxruntime"] is None
    assert found["onnxruntime_problem"] == f"onnxruntime is installed but does not load: {GLIBCXX}"
    session = process([start[0], start[1].partition("from")[0] + "import lucid_onnx; lucid_onnx.InferenceSession"])
    assert session.stderr.endswith(f"\nImportError: onnxruntime is installed but does not load: {GLIBCXX}\n")


def test_a_part_of_onnxruntime_that_is_missing(bag):
    start = with_module("onnxruntime", "import onnxruntime_pybind11_state_of_another_build")
    assert process(start, "run", "model.onnx", *BAG).stderr == (
        "lucid-onnx: error: onnxruntime is installed but does not load: "
        "No module named 'onnxruntime_pybind11_state_of_another_build'\n"
    )
    start = with_module("onnxruntime", "")  # what uninstalling one of two distributions leaves
    assert re.fullmatch(
        r"lucid-onnx: error: onnxruntime is installed but some of its files are missing: pip uninstall -y "
        r"onnxruntime\S*, then pip install 'lucid-onnx\[cpu\]' \(or 'lucid-onnx\[gpu\]'\)\n",
        process(start, "run", "model.onnx", *BAG).stderr,
    )


@pytest.mark.parametrize(
    "source",
    [
        "raise KeyboardInterrupt",
        # As an extension module does it.
        "try:\n    raise KeyboardInterrupt\nexcept BaseException as error:\n    raise ImportError('failed') from error",
    ],
)
def test_ctrl_c_while_onnxruntime_is_imported(bag, source):
    start = with_module("onnxruntime", source)
    for command in (["run", "model.onnx", *BAG], ["demo"], ["info"]):
        done = process(start, *command)
        assert (done.returncode, done.stdout, done.stderr) == (130, "", ""), command


def test_two_distributions_of_onnxruntime(bag):
    for name, version in (("onnxruntime", "1.32.0"), ("onnxruntime-gpu", "1.30.0")):
        folder = Path("planted", f"{name.replace('-', '_')}-{version}.dist-info")
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    start = with_module("unused", "")
    warning = (
        "onnxruntime 1.32.0 and onnxruntime-gpu 1.30.0 are installed together and overwrite each other's files: "
        "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'lucid-onnx[cpu]' (or 'lucid-onnx[gpu]')"
    )
    assert f"warning      {warning}\n" in process(start, "info").stdout
    assert json.loads(process(start, "info", "--json").stdout)["onnxruntime_problem"] == warning
    done = process(start, "run", "model.onnx", *BAG)
    assert done.returncode == 0
    assert f"RuntimeWarning: {warning}" in done.stderr
    assert "--provider cuda" in process(start, "run", "model.onnx", *BAG, "--provider", "cuda").stderr
    start = with_module("onnxruntime", f"raise ImportError({GLIBCXX!r})")
    assert process(start, "demo").stderr == (
        f"lucid-onnx: error: onnxruntime is installed but does not load: {GLIBCXX}; {warning}\n"
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (f"raise ImportError({GLIBCXX!r})", GLIBCXX),
        ("import a_part_of_it", "No module named 'a_part_of_it'"),
    ],
)
def test_other_packages_that_do_not_load(bag, source, message):
    done = process(with_module("typer", source), "info")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"lucid-onnx: error: a package of the command line does not load: {message}\n"
    Path("planted", "typer.py").unlink()
    done = process(with_module("onnx_ir", source), "inspect", "model.onnx")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"lucid-onnx: error: lucid_onnx.rewrite does not load: {message}\n"
