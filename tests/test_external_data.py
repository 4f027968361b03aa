"""External data that is reached by links, that is no file, and that is a small constant."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

import lucid_onnx
from lucid_onnx.builder import loading
from lucid_testing.models import Small, run_lowered
from lucid_testing.torch_exports import Export

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

TOOLS: dict[str, Callable[..., Any]] = {
    "fuse": lucid_onnx.fuse,
    "lower": lucid_onnx.lower,
    "quantize": lucid_onnx.quantize,
}
_checks_links = pytest.mark.skipif(
    tuple(int(x) for x in ort.__version__.split(".")[:2]) < (1, 26), reason="this onnxruntime does not look at links"
)
SECRET = b"secret" * 20_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with model.onnx, in standard form (bags.onnx: with nodes), and its table in model.onnx.data."""
    found = tmp_path / "model"
    found.mkdir()
    table = np.random.default_rng(0).standard_normal((1000, 20)).astype(np.float32)
    model = lucid_onnx.build_model(table, mode="mean")
    lucid_onnx.save(model, found / "model.onnx", external_data=True)
    (tmp_path / "secret").write_bytes(SECRET)
    return found


def ways_to_lie(folder: Path) -> dict[str, Callable[[], None]]:
    """Where the data of a model may be, by name: each moves it there."""
    data = folder / "model.onnx.data"

    def moved(place: str, link: str | None = None) -> None:
        target = folder / place
        target.parent.mkdir(exist_ok=True, parents=True)
        data.rename(target)
        data.symlink_to(link or target)

    def cache() -> None:
        moved("../blobs/1", "../blobs/1")
        (folder / "model.onnx").rename(folder / "../blobs/0")
        (folder / "model.onnx").symlink_to("../blobs/0")

    def split_cache() -> None:
        moved("../blobs/1", "../blobs/1")
        (folder / "../others").mkdir()
        (folder / "model.onnx").rename(folder / "../others/0")
        (folder / "model.onnx").symlink_to("../others/0")

    def linked_folder() -> None:
        folder.rename(folder.parent / "really")
        folder.symlink_to("really")

    def secret() -> None:
        data.unlink()
        data.symlink_to("../secret")

    def links() -> None:
        data.unlink()
        (folder / "below").mkdir()
        (folder / "below" / "link").symlink_to("../../secret")
        data.symlink_to("below/link")

    return {
        "a file": lambda: None,
        "a link in the folder": lambda: moved("other.bin", "other.bin"),
        "a link to a folder below": lambda: moved("below/data", "below/data"),
        "an absolute link in the folder": lambda: moved("other.bin"),
        "a cache": cache,
        "the folder is a link": linked_folder,
        "a cache of two folders": split_cache,
        "a link out of the folder": secret,
        "a link of links out of the folder": links,
    }


def loads(path: Path) -> bool:
    try:
        ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception:
        return False
    return True


WAYS = tuple(ways_to_lie(Path()))


@_checks_links
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tool", TOOLS)
def test_what_onnxruntime_loads_is_what_the_tools_take(tool: str, way: str, folder: Path, tmp_path: Path) -> None:
    ways_to_lie(folder)[way]()
    path = folder / "model.onnx"
    allowed = loads(path)
    assert allowed == ("of the folder" not in way and "of two" not in way)
    (tmp_path / "out").mkdir()
    outputs = [folder / "new.onnx", tmp_path / "out" / "new.onnx", *([path] if tool != "quantize" else [])]
    for output in outputs:
        before = sorted(tmp_path.rglob("*"))
        if allowed:
            expected = run_lowered(path)
            TOOLS[tool](path, output)
            np.testing.assert_allclose(run_lowered(output), expected, atol=0.1 if tool == "quantize" else 0)
            assert loads(output)
        else:
            with pytest.raises(ValueError, match=r"initializer 'weight' has its data at 'model.onnx.data'") as caught:
                TOOLS[tool](path, output)
            real = os.path.realpath(folder / "model.onnx.data")
            home = os.path.dirname(os.path.realpath(path))
            assert f"which is really {real}, outside of the model's folder, {home}" in str(caught.value)
            assert sorted(tmp_path.rglob("*")) == before
    for copy in tmp_path.rglob("*"):
        assert copy.name == "secret" or not copy.is_file() or copy.is_symlink() or SECRET[:99] not in copy.read_bytes()


def test_a_cache_is_not_written_to(folder: Path) -> None:
    """`fuse` in place of a link puts a file in the place of the link, and the file that the link led to stays."""
    ways_to_lie(folder)["a cache"]()
    blobs = folder.parent / "blobs"
    before = {p.name: p.read_bytes() for p in blobs.iterdir()}
    lucid_onnx.lower(folder / "model.onnx", folder / "model.onnx")
    assert {p.name: p.read_bytes() for p in blobs.iterdir()} == before
    assert not (folder / "model.onnx").is_symlink()
    assert sorted(p.name for p in folder.iterdir()) == ["model.onnx", "model.onnx.1.data"]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("kind", ["folder", "fifo", "device", "loop"])
def test_what_is_no_file_is_not_opened(tool: str, kind: str, folder: Path) -> None:
    data = folder / "model.onnx.data"
    data.unlink()
    if kind == "folder":
        data.mkdir()
    elif kind == "fifo":
        os.mkfifo(data)
    elif kind == "device":
        data.symlink_to("/dev/zero")
    else:
        data.symlink_to("model.onnx.data")
    text = r"is not a regular file|outside of the model's folder|[Ss]ymbolic links"
    with pytest.raises((ValueError, OSError), match=text):
        TOOLS[tool](folder / "model.onnx", folder / "new.onnx")
    assert not (folder / "new.onnx").exists()


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("location", "/etc/passwd", "outside of the model's folder"),
        ("location", "../secret", "outside of the model's folder"),
        ("location", "below/../../secret", "outside of the model's folder"),
        ("location", "a\0b", "outside of the model's folder"),
        ("location", "C:/secret", "outside of the model's folder"),
        ("location", "", "outside of the model's folder"),
        ("offset", "-1", r"has its data at -1 to"),
        ("offset", "1e3", r"its external data is described by"),
        ("length", "79999", r"has 79999 bytes in .*, and its shape takes 80000"),
        ("length", "99999999999999999999", r"has its data at 0 to 99999999999999999999 of .*, which has 80000 bytes"),
    ],
)
def test_bad_places(key: str, value: str, text: str, folder: Path) -> None:
    path = folder / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    next(e for e in model.graph.initializer[0].external_data if e.key == key).value = value
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=text):
        lucid_onnx.quantize(path, folder / "new.onnx")
    assert sorted(p.name for p in folder.iterdir()) == ["model.onnx", "model.onnx.data"]


# ---- Small constants.


@pytest.mark.parametrize("name", ["sum-17", "mean-17", "max-17"])
@pytest.mark.parametrize("attributes", [False, True])
def test_small_constants_in_external_data(
    name: str, attributes: bool, legacy: Callable[[str], Export], tmp_path: Path
) -> None:
    """As many export scripts write models: what `fuse` finds does not depend on where a number is stored."""
    export = legacy(name)
    expected = lucid_onnx.fuse(export.path)
    for part in ("sum", "mean", "max"):
        if part in name:
            assert [f.mode for f in expected.fused] == [part]
    onnx.save_model(
        onnx.load(export.path),
        tmp_path / "m.onnx",
        save_as_external_data=True,
        size_threshold=0,
        location="m.data",
        convert_attribute=attributes,
    )
    stored = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    assert all(t.data_location == TensorProto.EXTERNAL for t in stored.graph.initializer)
    report = lucid_onnx.fuse(tmp_path / "m.onnx", tmp_path / "fused.onnx")
    assert (report.fused, report.unfused) == (expected.fused, expected.unfused)
    lucid_onnx.lower(tmp_path / "fused.onnx", tmp_path / "m.onnx")
    again = lucid_onnx.fuse(tmp_path / "m.onnx")
    assert [f.mode for f in again.fused] == [f.mode for f in expected.fused]


def test_tables_in_external_data_are_merged(tmp_path: Path) -> None:
    """Constants decide in `merging` too: here the axes of an Unsqueeze."""
    g = Small()
    parts = []
    for _ in range(2):
        bag = g("ReduceSum", g("Gather", "table", "i"), np.array([1], np.int64), keepdims=0)
        parts.append(g("Unsqueeze", bag, np.array([1], np.int64)))
    model = g.model(g("ReduceSum", g("Concat", *parts, axis=1), np.array([1], np.int64), keepdims=0))
    expected = lucid_onnx.fuse(model, merge_tables=True)
    assert len(expected.merged) == 1
    onnx.save_model(model, tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0, location="m.data")
    assert lucid_onnx.fuse(tmp_path / "m.onnx", merge_tables=True).merged == expected.merged


def test_no_table_is_needed_to_look_at_a_model(folder: Path) -> None:
    (folder / "model.onnx.data").unlink()
    assert lucid_onnx.fuse(folder / "model.onnx").unfused == ()


def test_constants_that_share_a_few_bytes_do_not_fill_the_memory(tmp_path: Path) -> None:
    """30,000 tensors of 60,000 bytes that are one place of a file: of 1.8 GB a hundredth may be read."""
    (tmp_path / "m.data").write_bytes(bytes(60_000))
    model = lucid_onnx.build_model(np.eye(3, dtype=np.float32), form="standard")
    for k in range(30_000):
        tensor = model.graph.initializer.add(name=f"c{k}", data_type=TensorProto.INT64, dims=[7500])
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="m.data")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    proto = loading.load(tmp_path / "m.onnx")
    loading.ExternalData(tmp_path / "m.onnx").read_small(proto)
    assert 2**20 < proto.ByteSize() < 2**26


def test_no_file_of_the_current_folder_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model without a path has its data nowhere, though a file of that name lies in the current folder."""
    g = Small()
    g.table = np.ones((5000, 4), np.float32)
    model = g.model(g.reduced(g("Mul", g("Gather", "table", "i"), g.kept(3))))
    lucid_onnx.save(model, tmp_path / "m.onnx", external_data=True)
    monkeypatch.chdir(tmp_path)
    assert lucid_onnx.fuse("m.onnx").fused[0].padding_idx == 3
    light = onnx.load("m.onnx", load_external_data=False)
    assert lucid_onnx.fuse(light).fused[0].padding_idx is None


def test_no_row_is_read_through_a_link_out_of_the_folder(tmp_path: Path) -> None:
    g = Small()
    g.table = np.ones((5000, 4), np.float32)
    model = g.model(g.reduced(g("Mul", g("Gather", "table", "i"), g.kept(3))))
    (tmp_path / "model").mkdir()
    path = tmp_path / "model" / "m.onnx"
    lucid_onnx.save(model, path, external_data=True)
    path.with_name("m.onnx.data").rename(tmp_path / "secret")
    path.with_name("m.onnx.data").symlink_to("../secret")
    with pytest.raises(ValueError, match="outside of the model's folder"):
        lucid_onnx.fuse(path)
