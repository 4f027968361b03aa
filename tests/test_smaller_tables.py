"""Making tables smaller: the native kernel writes NumPy's bytes, and `build` needs no memory for its table."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import lucid_onnx
from lucid_onnx import native
from lucid_onnx.builder import Streamed, file_region, save, streamed
from lucid_onnx.ops.embedding_bag.spec import BFLOAT16
from lucid_onnx.ops.quantized_embedding_bag import table as tables
from lucid_onnx.ops.quantized_embedding_bag.spec import CODES_TYPES
from lucid_onnx.rewrite.tables import Rows, Smaller
from lucid_testing.kernels import needs_library

FLOATS = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16, np.dtype(np.float64))
#: Around the lanes and the blocks of the kernel.
DIMS = (0, 1, 2, 3, 7, 8, 9, 50, 64, 511, 512, 513, 1500)


def random_rows(dtype: np.dtype, dim: int, kind: str, count: int = 23) -> np.ndarray:
    """Rows of every size that a float32 has, or of one size, or of halves, between which values often lie."""
    random = np.random.default_rng(dim)
    rows = random.standard_normal((count, dim))
    if kind == "of every size":
        rows *= 10.0 ** random.integers(-46, 37, size=(count, 1))
    elif kind == "halves":
        rows = np.round(rows * 2) / 2
        rows[:: max(1, count // 5)] = rows[:1]
        rows[-1] = -0.0
    largest = 60000 if dtype == np.float16 else 1e38
    return rows.clip(-largest, largest).astype(dtype)


def same_bits(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return (a is None) == (b is None) and (a is None or b is None or (a.dtype, a.tobytes()) == (b.dtype, b.tobytes()))


@needs_library
@pytest.mark.parametrize("kind", ["of every size", "of one size", "halves"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_kernel_quantizes_as_numpy(dtype: np.dtype, kind: str) -> None:
    for dim, codes_type in itertools.product(DIMS, CODES_TYPES.values()):
        rows = random_rows(dtype, dim, kind)
        found = native.quantize_rows(rows, codes_type)
        assert found is not None
        assert found.losses is not None
        wide = rows.astype(np.float64)
        expected = tables.quantize_rows(wide, *tables.extremes(wide), codes_type)
        assert all(itertools.starmap(same_bits, zip(found[:3], expected.smaller[:3], strict=True))), (dim, codes_type)
        lost = np.abs(wide - expected.meant)
        np.testing.assert_array_equal(found.losses.furthest, lost.max(axis=1, initial=0))
        # Sums of as many squares, in another order.
        for got, terms in ((found.losses.squares, wide), (found.losses.lost, lost)):
            np.testing.assert_allclose(got, (terms**2).sum(axis=1), rtol=1e-12, atol=1e-300)


@needs_library
@pytest.mark.parametrize("kind", ["of every size", "of one size", "halves"])
@pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
@pytest.mark.parametrize("to", [np.dtype(np.float16), BFLOAT16], ids=str)
def test_the_kernel_rounds_as_numpy(dtype: np.dtype, to: np.dtype, kind: str) -> None:
    for dim in DIMS:
        rows = random_rows(dtype, dim, kind)
        found = native.round_rows(rows, to)
        with np.errstate(over="ignore"):
            expected = rows.astype(to)
        assert found is not None
        done = len(found.values)
        assert same_bits(found.values, expected[:done])
        if done < len(rows):  # it stops where a number would become infinite
            assert np.isinf(expected[done].astype(np.float32)).any()
        assert np.isfinite(expected[:done].astype(np.float32)).all()


@needs_library
def test_every_float16_and_what_lies_between_two_is_rounded_as_numpy_rounds() -> None:
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    between = (halves[:-1].astype(np.float64) + halves[1:]) / 2
    numbers = [
        halves,
        between,
        np.nextafter(between.astype(np.float32), 0),
        np.nextafter(between.astype(np.float32), 9e9),
    ]
    rows = np.concatenate([n.astype(np.float32) for n in numbers])[:, None]
    rows = np.concatenate([rows, -rows])
    for to in (np.dtype(np.float16), BFLOAT16):
        found = native.round_rows(rows, to)
        assert found is not None
        assert same_bits(found.values, rows.astype(to))


@needs_library
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf, 3e38])
def test_the_kernel_stops_at_a_row_that_is_odd(odd: float) -> None:
    for place in (0, 5, 8, 12):
        rows = np.ones((9, 13), np.float32)
        rows[4, place] = odd
        for codes_type in CODES_TYPES.values():
            found = native.quantize_rows(rows, codes_type)
            assert found is not None
            assert len(found.values) == 4
        if odd != 3e38:
            found = native.round_rows(rows, BFLOAT16)
            assert found is not None
            assert len(found.values) == 4


def test_an_odd_row_is_found_wherever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.ones((3000, 100), np.float32)
    rows[2345, 67] = np.inf
    for quantizer in (native.quantize_rows, tables._nothing):
        monkeypatch.setattr(tables, "native_rows", quantizer)
        with pytest.raises(ValueError, match=r"weight\[2345, 67\] = inf has no code"):
            lucid_onnx.QuantizedTable.quantize(rows)
    rows[2345, 67] = 3e38  # beyond what the kernel takes; NumPy goes on
    tables_of = []
    for quantizer in (native.quantize_rows, tables._nothing):
        monkeypatch.setattr(tables, "native_rows", quantizer)
        tables_of.append(lucid_onnx.QuantizedTable.quantize(rows, "uint8"))
    assert all(same_bits(getattr(tables_of[0], n), getattr(tables_of[1], n)) for n in ("codes", "scale", "bias"))


@needs_library
@pytest.mark.parametrize("dtype", ["int8", "uint4", "float16"])
def test_errors_are_counted_alike(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows of zeros, and of float64 rows whose squares are no numbers, too."""
    rows = random_rows(np.dtype(np.float32 if dtype == "float16" else np.float64), 20, "of one size", 5000)
    rows[7] = 0
    if dtype != "float16":
        rows[[30, 4000]] *= 1e-200
    found = []
    for without in (False, True):
        if without:
            monkeypatch.setattr(native, "quantize_rows", lambda rows, kind: None)
            monkeypatch.setattr(native, "round_rows", lambda rows, kind: None)
        smaller = Smaller(Rows(rows.shape, rows.dtype, lambda begin, end: rows[begin:end]), dtype)
        values = [part.values for _, part in smaller]
        found.append((smaller.errors, np.concatenate(values)))
    (ours, codes), (numpys, expected) = found
    assert same_bits(codes, expected)
    assert ours.worst == numpys.worst
    assert ours.difference == numpys.difference
    for name in ("largest", "mean"):  # sums in another order
        np.testing.assert_allclose(getattr(ours, name), getattr(numpys, name), rtol=1e-12)


# ---- Streams.


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_mapped_table_is_read_from_its_file(dtype: np.dtype, tmp_path: Path) -> None:
    rows = random_rows(dtype, 9, "of one size")
    np.save(tmp_path / "rows.npy", rows.view(np.uint16) if dtype == BFLOAT16 else rows)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r").view(dtype)
    for part in (mapped, mapped[3:11]):
        region = file_region(part)
        assert region is not None
        assert (tmp_path / "rows.npy").read_bytes()[region[1] :][: part.nbytes] == part.tobytes()
        assert b"".join(streamed(part).parts()) == part.tobytes()
    for other in (rows, mapped[:, 1:3], mapped[::2], np.asfortranarray(mapped)):
        assert file_region(other) is None
        assert b"".join(streamed(other).parts()) == other.tobytes()


@pytest.mark.parametrize("external", [False, True])
def test_a_streamed_model_is_the_model(external: bool, tmp_path: Path) -> None:
    """Byte for byte as protobuf reads it, with small and large initializers in any order."""
    arrays = {f"t{k}": np.full((k, 100), k, np.float32) for k in (3, 200, 1, 0, 50, 4)}
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            [onnx.helper.make_node("Identity", ["t3"], ["out"])],
            "tables",
            [],
            [onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [3, 100])],
            [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
        ),
        producer_name="somebody",
        functions=[onnx.helper.make_function("f", "F", ["x"], ["y"], [onnx.helper.make_node("Neg", ["x"], ["y"])], [])],
    )
    model.metadata_props.add(key="a", value="b")
    model.graph.initializer[1].doc_string = "behind the data"
    light = onnx.ModelProto()
    light.CopyFrom(model)
    streams = {name: arrays[name] for name in ("t200", "t1", "t0", "t4")}
    for tensor in light.graph.initializer:
        if tensor.name in streams:
            tensor.ClearField("raw_data")

    def parts(array: np.ndarray) -> Streamed:
        return Streamed(array.nbytes, lambda: (memoryview(row.tobytes()) for row in array))

    seen: list[tuple[int, int]] = []
    save(
        light,
        tmp_path / "m.onnx",
        external_data=external,
        tables={name: parts(array) for name, array in streams.items()},
        progress=lambda *done: seen.append(done),
    )
    if not external:
        assert (tmp_path / "m.onnx").read_bytes() == model.SerializeToString()
    found = onnx.load(tmp_path / "m.onnx")
    for tensor in found.graph.initializer:
        tensor.ClearField("data_location")
        tensor.ClearField("external_data")
    assert found == model
    assert seen[-1][0] == seen[-1][1] > 0


def build(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    from lucid_onnx.cli import main

    assert main(["build", *map(str, arguments)]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int4", "uint4", "float16", "bfloat16", None])
def test_build_writes_what_the_builders_write(
    dtype: str | None, beside: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("typer")
    pytest.importorskip("onnx_ir")
    rows = random_rows(np.dtype(np.float32), 33, "of one size", 500)
    np.save(tmp_path / "rows.npy", rows)
    options = [] if dtype is None else ["--dtype", dtype]
    out = tmp_path / "m.onnx"
    said = build(capsys, tmp_path / "rows.npy", "-o", out, "--mode", "mean", *options, *["--external-data"] * beside)
    if dtype in CODES_TYPES:
        table = lucid_onnx.QuantizedTable.quantize(rows, str(dtype))
        expected = lucid_onnx.build_quantized_model(table, mode="mean")
    else:
        kept = rows if dtype is None else rows.astype(BFLOAT16 if dtype == "bfloat16" else dtype)
        expected = lucid_onnx.build_model(kept, mode="mean")
    found = onnx.load(out)
    for tensor in found.graph.initializer:
        tensor.ClearField("data_location")
        tensor.ClearField("external_data")
    assert found == expected
    assert ("rows lost" in said) == (dtype is not None)


@pytest.mark.parametrize("options", [[], ["--external-data"]])
def test_a_table_that_does_not_fit_leaves_no_file(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("typer")
    pytest.importorskip("onnx_ir")
    from lucid_onnx.cli import main

    rows = np.ones((5000, 64), np.float32)
    rows[4321, 2] = np.nan
    np.save(tmp_path / "rows.npy", rows)
    before = sorted(tmp_path.iterdir())
    out = str(tmp_path / "m.onnx")
    assert main(["build", str(tmp_path / "rows.npy"), "-o", out, "--dtype", "int8", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the table cannot be int8: its element [4321, 2] is nan, which has no quantized value" in line
    assert main(["build", str(tmp_path / "rows.npy"), "-o", out, "--dtype", "float32"]) == 2
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_build_does_not_hold_its_table(tmp_path: Path) -> None:
    """A table of 256 MiB; Python with what it imports takes about 100 MiB."""
    pytest.importorskip("typer")
    pytest.importorskip("onnx_ir")
    rows = np.lib.format.open_memmap(tmp_path / "rows.npy", "w+", np.float32, (2**20, 64))  # a hole in the file
    del rows
    program = (
        "import resource, sys; from lucid_onnx.cli import main;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; code = main(sys.argv[1:]);"
        "print('grown by', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, 'KiB'); sys.exit(code)"
    )
    for options in ([], ["--external-data"], ["--dtype", "int8"]):
        command = [sys.executable, "-c", program, "build", str(tmp_path / "rows.npy"), "-o", str(tmp_path / "m.onnx")]
        done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout.split("grown by ")[1].split()[0]) < 100 * 1024
