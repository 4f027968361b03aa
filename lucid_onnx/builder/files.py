"""Models as files: written whole or not at all, with large tables as external data."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

#: What protobuf can hold in one message, less room for the graph around the tables.
_LARGEST_MESSAGE = 2**31 - 2**24


#: External data begins on a page, so that a runtime can map it, and huge pages can back it.
_ALIGNMENT = 4096


def save(
    model: onnx.ModelProto,
    path: str | os.PathLike[str],
    *,
    external_data: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
    tables: Mapping[str, memoryview] | None = None,
) -> None:
    """Write a model, with its tables in ``<path>.data`` beside it where one file cannot hold them.

    Both files appear whole or not at all.

    Args:
        model: the model; its initializers hold their data, but for those in ``tables``.
        path: the .onnx file.
        external_data: False and True force the tables into the file and out of it (all but those under 4 KiB); None
            puts them outside only where the model would pass the 2 GiB that a protobuf message can have.
        progress: called with the bytes written and the bytes to write while tables go out.
        tables: the little-endian bytes, by name, of initializers that have a dtype and dims but no data. They are
            written from where they are; a model that held them would be a second copy.

    Raises:
        ValueError: external_data=False for a model that is too large, or an initializer without its data.
        OSError: the files cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder")
    tables = tables or {}
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL and tensor.name not in tables:
            raise ValueError(f"initializer {tensor.name!r} is external data that was not loaded: use onnx.load first")
    sizes = [tables[t.name].nbytes if t.name in tables else _size(t) for t in model.graph.initializer]
    too_large = sum(sizes) > _LARGEST_MESSAGE
    if external_data is None:
        external_data = too_large
    elif too_large and not external_data:
        raise ValueError(f"external_data = False, but {sum(sizes)} bytes of tables do not fit one protobuf file")
    with Replacing(path) as files:
        if external_data and max(sizes, default=0) >= _ALIGNMENT:
            model = _externalise(model, sizes, path.name + ".data", files.open(path.name + ".data"), progress, tables)
        elif tables:
            light, model = model, onnx.ModelProto()
            model.CopyFrom(light)
            fill_tables(model, tables)
        files.open(path.name).write(model.SerializeToString())


def fill_tables(model: onnx.ModelProto, tables: Mapping[str, memoryview]) -> None:
    """Give the initializers named in ``tables`` their data, where they are (see `save`)."""
    for tensor in model.graph.initializer:
        if tensor.name in tables:
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            tensor.raw_data = tables[tensor.name].tobytes()


class Replacing:
    """Temporary files beside ``path`` that take their places together when the block ends well."""

    def __init__(self, path: Path) -> None:
        self._folder = path.parent
        self._open: dict[str, Any] = {}

    def open(self, name: str) -> Any:
        self._open[name] = tempfile.NamedTemporaryFile(  # noqa: SIM115  # closed in __exit__
            dir=self._folder, prefix=f".{name}.", delete=False
        )
        return self._open[name]

    def __enter__(self) -> Replacing:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            for file in self._open.values():
                file.close()
            if error is None:
                self._take_places()
        finally:
            for file in self._open.values():
                file.close()
                Path(file.name).unlink(missing_ok=True)

    def _take_places(self) -> None:
        """Put the files where they belong. One is replaced atomically; of several, all are or none."""
        mask = _umask()
        moved: list[tuple[Path, Path | None]] = []
        try:
            for name, file in self._open.items():
                os.chmod(file.name, 0o666 & ~mask)
                target, aside = self._folder / name, None
                if len(self._open) > 1 and target.is_file():
                    aside = self._folder / f".old{Path(file.name).name}"
                    os.replace(target, aside)
                moved.append((target, aside))
                os.replace(file.name, target)
        except BaseException:
            for target, aside in reversed(moved):
                if aside is not None:
                    os.replace(aside, target)
                elif len(moved) > 1 and target.is_file():
                    target.unlink()
            raise
        for _, aside in moved:
            if aside is not None:
                aside.unlink()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _externalise(
    model: onnx.ModelProto,
    sizes: list[int],
    location: str,
    file: Any,
    progress: Callable[[int, int], None] | None,
    tables: Mapping[str, memoryview],
) -> onnx.ModelProto:
    """A copy of the model that refers to its tables in ``file``, where they are written."""
    light = without_initializers(model)
    written = 0
    for tensor, size in zip(model.graph.initializer, sizes, strict=True):
        if size < _ALIGNMENT:
            light.graph.initializer.append(tensor)
            continue
        offset = -(-file.tell() // _ALIGNMENT) * _ALIGNMENT
        file.seek(offset)
        data = tables[tensor.name] if tensor.name in tables else memoryview(tensor.raw_data)
        for begin in range(0, size, 2**26):
            written += file.write(data[begin : begin + 2**26])
            if progress is not None:
                progress(written, sum(sizes))
        light.graph.initializer.append(
            TensorProto(
                name=tensor.name,
                data_type=tensor.data_type,
                dims=tensor.dims,
                data_location=TensorProto.EXTERNAL,
                external_data=[
                    onnx.StringStringEntryProto(key=key, value=str(value))
                    for key, value in (("location", location), ("offset", offset), ("length", size))
                ],
            )
        )
    fill_tables(light, {name: data for name, data in tables.items() if data.nbytes < _ALIGNMENT})
    return light


def without_initializers(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of all but the graph's initializers, which are not looked at."""
    light = onnx.ModelProto()
    for field, value in model.ListFields():
        if field.name != "graph":
            _assign(light, field.name, value)
    for field, value in model.graph.ListFields():
        if field.name != "initializer":
            _assign(light.graph, field.name, value)
    return light


def _assign(message: Any, name: str, value: Any) -> None:
    if isinstance(value, (str, bytes, int, float)):
        setattr(message, name, value)
    elif hasattr(value, "CopyFrom"):
        getattr(message, name).CopyFrom(value)
    else:
        getattr(message, name).extend(value)


def _size(tensor: onnx.TensorProto) -> int:
    """The bytes of an initializer's raw data; 0 for the small ones that are written element by element."""
    return len(tensor.raw_data) if tensor.HasField("raw_data") else 0
