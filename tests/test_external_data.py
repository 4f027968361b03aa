"""External data that is reached by links, that is no file, and that is a small constant."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import lucid_onnx
from lucid_testing.models import run_lowered

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
