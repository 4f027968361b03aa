"""What is on disk after a writer died: the old files or the new ones, whole, whatever it was about to do."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import lucid_onnx
from lucid_testing.processes import run_script

#: Dies before its k-th change of a folder or wait for the disk, for every k, and looks at what is left.
_CRASHES = r"""
import itertools, json, os, pathlib, shutil, sys
import numpy as np
import onnx
import lucid_onnx
from lucid_onnx.cli import files as cli_files


def content(path):
    # A model with its data; raises where one of the two is not whole.
    if path.suffix != ".onnx":
        return path.read_bytes()
    model = onnx.load(path, load_external_data=False)
    found = [model.graph.node[0].op_type.encode(), str(len(model.functions)).encode()]
    for tensor in model.graph.initializer:
        found.append(tensor.raw_data)
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entry = {e.key: e.value for e in tensor.external_data}
            with open(path.parent / entry["location"], "rb") as file:
                file.seek(int(entry.get("offset", 0)))
                data = file.read(int(entry.get("length", -1)))
            assert len(data) == int(entry["length"]), (entry, len(data))
            found.append(data)
    return b"|".join(found)


def contents(folder):
    return {str(p.relative_to(folder)): content(p) for p in folder.rglob("*")
            if p.is_file() and not any(part.startswith(".") for part in p.relative_to(folder).parts)
            and not p.name.endswith(".data")}


def dying(write, count):
    # Run write() with its count-th step being death; gives whether it came that far.
    pid = os.fork()
    if pid == 0:
        left = [count]
        def patched(function):
            def step(*arguments, **keywords):
                left[0] -= 1
                if not left[0]:
                    os._exit(9)
                return function(*arguments, **keywords)
            return step
        for name in ("replace", "rename", "fsync", "unlink", "mkdir", "close", "rmdir"):
            setattr(os, name, patched(getattr(os, name)))
        try:
            write()
        except BaseException as error:
            print("failed:", repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, 9), status
    return status == 9


def model(value, mode="sum"):
    return lucid_onnx.build_model(np.full((2000, 2), value, np.float32), mode=mode)


root = pathlib.Path("root").resolve()


def pair(value, name="m.onnx"):
    lucid_onnx.save(model(value), root / name, external_data=True)


def none():
    pass


def linked():
    pair(1)
    (root.parent / "blobs").mkdir()
    for k, name in enumerate(("m.onnx", "m.onnx.data")):
        os.rename(root / name, root.parent / "blobs" / str(k))
        os.symlink(f"../blobs/{k}", root / name)


class Report:
    def as_dict(self):
        return {"value": 7}


def text():
    (root / "r.json").write_bytes(b"old")


def arrays():
    cli_files.write_arrays(root / "out", {root / "out" / f"{k}.npy": (str(k), np.full(3, k)) for k in range(3)})


def old_arrays():
    (root / "out").mkdir()
    for k in range(3):
        np.save(root / "out" / f"{k}.npy", np.zeros(5))


CASES = {
    "save, nothing there": (none, lambda: lucid_onnx.save(model(2), root / "m.onnx", external_data=True)),
    "save over a pair": (lambda: pair(1), lambda: lucid_onnx.save(model(2), root / "m.onnx", external_data=True)),
    "save one file over a pair": (lambda: pair(1), lambda: lucid_onnx.save(model(2), root / "m.onnx")),
    "save a pair over one file": (
        lambda: lucid_onnx.save(model(1), root / "m.onnx"),
        lambda: lucid_onnx.save(model(2), root / "m.onnx", external_data=True),
    ),
    "fuse in place": (lambda: pair(1), lambda: lucid_onnx.fuse(root / "m.onnx", root / "m.onnx", form="native")),
    "fuse in place of links": (linked, lambda: lucid_onnx.fuse(root / "m.onnx", root / "m.onnx")),
    "lower over another pair": (
        lambda: (pair(1), pair(2, "n.onnx")), lambda: lucid_onnx.lower(root / "m.onnx", root / "n.onnx")
    ),
    "lower over a pair in another folder": (
        lambda: ((root / "a").mkdir(), pair(1, "a/m.onnx"), pair(2, "n.onnx")),
        lambda: lucid_onnx.lower(root / "a" / "m.onnx", root / "n.onnx"),
    ),
    "quantize over another pair": (
        lambda: (pair(1), pair(2, "n.onnx")), lambda: lucid_onnx.quantize(root / "m.onnx", root / "n.onnx")
    ),
    "a report": (text, lambda: cli_files.write_report(root / "r.json", Report())),
    "outputs to a new folder": (none, arrays),
    "outputs to a folder": (old_arrays, arrays),
}
each_file_alone = {"outputs to a folder"}

for name, (prepare, write) in CASES.items():
    def fresh():
        for folder in (root, root.parent / "blobs"):
            shutil.rmtree(folder, ignore_errors=True)
        root.mkdir()
        prepare()
        return contents(root)

    before = fresh()
    write()
    after = contents(root)
    assert before != after or "links" in name, name
    for count in itertools.count(1):
        assert fresh() == before
        died = dying(write, count)
        found = contents(root)
        if name in each_file_alone:
            assert all(found[f] in (before[f], after[f]) for f in before), (name, count)
        else:
            assert found in (before, after), (name, count, sorted(found))
        if not died:
            assert found == after
            break
        write()  # and what is left is in nobody's way
        assert contents(root) == after, (name, count)
    print(name, count - 1, flush=True)
    assert count > 2, name
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.timeout(300)
def test_whatever_dies_when(tmp_path: Path) -> None:
    """Every writer of files, killed at each of its steps: a reader finds the old model with its data, or the new."""
    pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")
    done = run_script(_CRASHES, tmp_path, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "done", done.stdout


def model(value: float) -> onnx.ModelProto:
    return lucid_onnx.build_model(np.full((2000, 2), value, np.float32), mode="sum")


def value(path: Path) -> float:
    (tensor,) = onnx.load(path).graph.initializer
    return float(onnx.numpy_helper.to_array(tensor)[0, 0])


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_new_data_never_has_an_old_name(tmp_path: Path) -> None:
    """A reader that has read a model and not yet its data finds that data, or none."""
    path = tmp_path / "m.onnx"
    for k, data in enumerate(["m.onnx.data", "m.onnx.1.data", "m.onnx.2.data"]):
        lucid_onnx.save(model(k), path, external_data=True)
        assert names(tmp_path) == sorted([data, "m.onnx"])
        assert value(path) == k
    lucid_onnx.save(model(4), path)
    assert names(tmp_path) == ["m.onnx"]


def test_data_that_another_model_needs_stays(tmp_path: Path) -> None:
    pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")
    path = tmp_path / "m.onnx"
    lucid_onnx.save(model(1), path, external_data=True)
    lucid_onnx.lower(path, tmp_path / "other.onnx")
    lucid_onnx.save(model(2), path, external_data=True)
    assert (value(path), value(tmp_path / "other.onnx")) == (2, 1)
    (tmp_path / "other.onnx").unlink()
    (tmp_path / "m.onnx.3.data").write_bytes(b"of nobody")
    lucid_onnx.save(model(3), path, external_data=True)
    assert names(tmp_path) == ["m.onnx", "m.onnx.3.data", "m.onnx.4.data", "m.onnx.data"]


def test_everything_is_on_disk_before_the_model_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lucid_onnx.save(model(1), tmp_path / "m.onnx", external_data=True)
    steps: list[str] = []

    def plainly(path: Any) -> str:
        name = Path(path).name
        return "folder" if path == os.fspath(tmp_path) else name.rpartition(".")[0][1:] if name[0] == "." else name

    def recorded(name: str, function: Any) -> None:
        def step(first: Any, *rest: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{first}") if name == "fsync" else rest[-1] if rest else first
            steps.append(f"{name} {plainly(path)}")
            return function(first, *rest)

        monkeypatch.setattr(os, name, step)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("no /proc/self/fd to see which file is meant")
    recorded("fsync", os.fsync)
    recorded("replace", os.replace)
    lucid_onnx.save(model(2), tmp_path / "m.onnx", external_data=True)
    assert steps == [
        "fsync m.onnx.1.data",
        "fsync m.onnx",
        "replace m.onnx.1.data",
        "fsync folder",
        "replace m.onnx",
        "fsync folder",
    ]


def test_no_other_thread_sees_another_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The umask is one for the process: who sets it, sets it for files that others make."""

    def refuse(mask: int) -> int:
        raise AssertionError(f"umask({mask})")

    monkeypatch.setattr(os, "umask", refuse)
    lucid_onnx.save(model(1), tmp_path / "m.onnx", external_data=True)
    assert value(tmp_path / "m.onnx") == 1


def test_writers_at_once_leave_a_whole_model(tmp_path: Path) -> None:
    path, errors = tmp_path / "m.onnx", []

    def write(k: int) -> None:
        try:
            for _ in range(5):
                lucid_onnx.save(model(k), path, external_data=True)
        except FileExistsError:  # another one took the name of the data first
            errors.append(k)

    threads = [threading.Thread(target=write, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) < 3
    assert value(path) in (0, 1, 2)
