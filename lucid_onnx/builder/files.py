"""Models as files: written whole or not at all, with large tables as external data."""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto

#: What protobuf can hold in one message, less room for the graph around the tables.
LARGEST_MESSAGE = 2**31 - 2**24


#: External data begins on a page, so that a runtime can map it, and huge pages can back it.
_ALIGNMENT = 4096


_PART = 2**22  # bytes that are read and written at a time


class Streamed(NamedTuple):
    """The bytes of a table, which need not be in memory at once."""

    nbytes: int
    parts: Callable[[], Iterable[memoryview]]  #: all of them, in order


def streamed(table: np.ndarray) -> Streamed:
    """The little-endian bytes of a table. Of a file that is mapped they are read, and not mapped.

    What was touched of a mapping counts as memory of the process, until others need it.
    """
    region = file_region(table)

    def read() -> Iterator[memoryview]:
        assert region is not None
        path, offset = region
        with open(path, "rb") as file:
            file.seek(offset)
            for begin in range(0, table.nbytes, _PART):
                part = file.read(min(_PART, table.nbytes - begin))
                if len(part) != min(_PART, table.nbytes - begin):
                    raise OSError(5, "the file ends before its table", os.fspath(path))
                yield memoryview(part)

    if region is not None:
        return Streamed(table.nbytes, read)
    return _in_parts(np.ascontiguousarray(table).reshape(-1).view(np.uint8).data)


def _in_parts(data: memoryview) -> Streamed:
    return Streamed(data.nbytes, lambda: (data[k : k + _PART] for k in range(0, data.nbytes, _PART)))


def file_region(table: np.ndarray) -> tuple[Path, int] | None:
    """The file whose bytes a mapped table is, one after another, and where it begins; None of any other table."""
    mapped: Any = table
    while mapped is not None and not (isinstance(mapped, np.memmap) and isinstance(mapped.base, mmap.mmap)):
        mapped = getattr(mapped, "base", None)
    if mapped is None or mapped.filename is None or not table.flags.c_contiguous:
        return None
    return Path(mapped.filename), mapped.offset + table.ctypes.data - mapped.ctypes.data


def save(
    model: onnx.ModelProto,
    path: str | os.PathLike[str],
    *,
    external_data: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
    tables: Mapping[str, memoryview | Streamed] | None = None,
) -> tuple[str, ...]:
    """Write a model, with its tables in ``<path>.data`` beside it where one file cannot hold them.

    Whoever reads ``path`` finds the old model with its data or the new one, whole, even if this process dies. So data
    never takes the place of old data: where ``<path>.data`` is there, it goes to ``<path>.1.data``, and so on. Data
    that only the old model referred to is removed last.

    Args:
        model: the model; its initializers hold their data, but for those in ``tables``.
        path: the .onnx file.
        external_data: False and True force the tables into the file and out of it (all but those under 4 KiB); None
            puts them outside only where the model would pass the 2 GiB that a protobuf message can have.
        progress: called with the bytes written and the bytes to write while tables go out.
        tables: the little-endian bytes, by name, of initializers that have a dtype and dims but no data. They are
            written from where they are, or part by part if they are `Streamed`; a model that held them would be a
            second copy.

    Returns:
        The files that were written: ``path``, and that of its external data if there is one.

    Raises:
        ValueError: external_data=False for a model that is too large, or an initializer without its data.
        OSError: the files cannot be written.
    """
    return save_beside(model, path, {}, external_data=external_data, progress=progress, tables=tables)


def save_beside(
    model: onnx.ModelProto,
    path: str | os.PathLike[str],
    others: Mapping[str, bytes],
    *,
    external_data: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
    tables: Mapping[str, memoryview | Streamed] | None = None,
) -> tuple[str, ...]:
    """`save`, with other files in the model's folder, by their names: all of them are in place before the model is."""
    streams = {name: _in_parts(t) if isinstance(t, memoryview) else t for name, t in (tables or {}).items()}
    return _save(
        model,
        Path(path),
        external_data=external_data,
        progress=progress,
        tables=streams,
        durable=True,
        others=others,
    )


def save_temporarily(model: onnx.ModelProto, path: str | os.PathLike[str]) -> None:
    """`save` for a model that this process reads and removes: nothing waits for the disk."""
    _save(model, Path(path), external_data=None, progress=None, tables={}, durable=False)


def _save(
    model: onnx.ModelProto,
    path: Path,
    *,
    external_data: bool | None,
    progress: Callable[[int, int], None] | None,
    tables: Mapping[str, Streamed],
    durable: bool,
    others: Mapping[str, bytes] | None = None,
) -> tuple[str, ...]:
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder")
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL and tensor.name not in tables:
            raise ValueError(f"initializer {tensor.name!r} is external data that was not loaded: use onnx.load first")
    sizes = [tables[t.name].nbytes if t.name in tables else _size(t) for t in model.graph.initializer]
    too_large = sum(sizes) > LARGEST_MESSAGE
    if external_data is None:
        external_data = too_large
    elif too_large and not external_data:
        raise ValueError(f"external_data = False, but {sum(sizes)} bytes of tables do not fit one protobuf file")
    written = [path]
    with Replacing(path, durable=durable) as files:
        if external_data and max(sizes, default=0) >= _ALIGNMENT:
            location, file = files.open_data()
            model = _externalise(model, sizes, location, file, progress, tables)
            written.append(path.with_name(location))
            tables = {}
        for name, content in (others or {}).items():
            files.open(name).write(content)
            written.append(path.with_name(name))
        _write_model(files.open_model(), model, tables, progress)
    return tuple(map(os.fspath, written))


def fill_tables(model: onnx.ModelProto, tables: Mapping[str, memoryview]) -> None:
    """Give the initializers named in ``tables`` their data, where they are (see `save`)."""
    for tensor in model.graph.initializer:
        if tensor.name in tables:
            _fill(tensor, tables[tensor.name].tobytes())


def _fill(tensor: onnx.TensorProto, data: bytes) -> None:
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")
    tensor.raw_data = data


#: The fields ModelProto.graph, GraphProto.initializer and TensorProto.raw_data of onnx.proto. (protobuf's encoding:
#: protobuf.dev/programming-guides/encoding)
_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9


def _tag(number: int, length: int) -> bytes:
    """What is before the bytes of a field: its number and kind, and their length."""
    return bytes([number << 3 | 2]) + _varint(length)


def _around(message: Any, number: int) -> tuple[bytes, bytes]:
    """A message without a field: what is serialised before it, and what behind it."""
    before, behind = type(message)(), type(message)()
    for field, value in message.ListFields():
        if field.number != number:
            _assign(before if field.number < number else behind, field.name, value)
    return before.SerializeToString(), behind.SerializeToString()


def _varint(number: int) -> bytes:
    """An integer as protobuf writes lengths."""
    parts = []
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])


def _write_model(
    file: Any,
    model: onnx.ModelProto,
    tables: Mapping[str, Streamed],
    progress: Callable[[int, int], None] | None,
) -> None:
    """Serialise a model with its ``tables``, which pass by in parts; the bytes are those of SerializeToString."""
    if not tables:
        file.write(model.SerializeToString())
        return
    before_graph, behind_graph = _around(model, _GRAPH)
    before, behind = _around(model.graph, _INITIALIZER)
    parts: list[tuple[bytes, Streamed | None, bytes]] = []
    whole = len(before) + len(behind)
    for tensor in model.graph.initializer:
        table = tables.get(tensor.name)
        if table is None:
            head, tail, size = tensor.SerializeToString(), b"", 0
        else:
            stub = onnx.TensorProto()
            stub.CopyFrom(tensor)
            _fill(stub, b"")
            head, tail = _around(stub, _RAW_DATA)
            head, size = head + _tag(_RAW_DATA, table.nbytes), table.nbytes
        size += len(head) + len(tail)
        head = _tag(_INITIALIZER, size) + head
        parts.append((head, table, tail))
        whole += len(head) + len(tail) + (0 if table is None else table.nbytes)
    file.write(before_graph + _tag(_GRAPH, whole) + before)
    done, total = 0, sum(t.nbytes for t in tables.values())
    for head, table, tail in parts:
        file.write(head)
        for data in () if table is None else table.parts():
            done += file.write(data)
            if progress is not None:
                progress(done, total)
        file.write(tail)
    file.write(behind + behind_graph)


class Replacing:
    """Files beside ``path`` that appear when the block ends well, and not at all if it ends in an error.

    Each name holds its old content, whole, until one rename puts the new one there; all bytes are on disk by then.
    External data of a model never takes the place of a file: it gets a name of its own (`open_data`) and is in place
    before the model (`open_model`) is. So a process that dies at any moment leaves a model with the data that
    belongs to it. What remains then is a hidden temporary file, or data that no model refers to.

    Args:
        path: the main file.
        durable: wait until the disk has the bytes; False for files that need not outlive a crash.
    """

    def __init__(self, path: Path, *, durable: bool = True) -> None:
        self._folder, self._name, self._durable = path.parent, path.name, durable
        self._data: dict[str, Any] = {}
        self._open: dict[str, Any] = {}
        self._is_model = False

    def open(self, name: str) -> Any:
        """A binary file that takes the place of the one of that name."""
        self._open[name] = self._temporary(name)
        return self._open[name]

    def open_model(self) -> Any:
        """The model at ``path``. Data that only the old model there referred to is removed when the block ends."""
        self._is_model = True
        return self.open(self._name)

    def open_data(self) -> tuple[str, Any]:
        """A new file for external data, and the location that the model's tensors give for it.

        It is ``<name>.data``, or ``<name>.1.data`` and so on: behind all that there are, so that a model that was read
        before never finds new data under the old name.
        """
        numbers = [number for number, _ in self._data_files()]
        number = max(numbers, default=-1) + 1 + len(self._data)
        location = f"{self._name}.{number}.data" if number else f"{self._name}.data"
        self._data[location] = self._temporary(location)
        return location, self._data[location]

    def __enter__(self) -> Replacing:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        files = [*self._data.values(), *self._open.values()]
        try:
            if error is None:
                for file in files:
                    file.flush()
                    if self._durable:
                        os.fsync(file.fileno())
                    file.close()
                self._take_places()
        finally:
            for file in files:
                file.close()
                Path(file.name).unlink(missing_ok=True)

    def _temporary(self, name: str) -> Any:
        """A new hidden file with the permissions that the process gives to new files."""
        while True:
            path = self._folder / f".{name[:50]}.{secrets.token_hex(4)}"
            try:
                with _about(self._folder / name):
                    return open(path, "x+b")  # closed in __exit__
            except FileExistsError:
                continue

    def _take_places(self) -> None:
        for name in self._open:
            if (self._folder / name).is_dir():
                raise IsADirectoryError(21, "it is a folder", str(self._folder / name))
        old = self._old_data() if self._is_model else []
        placed: list[Path] = []
        try:
            for location, file in self._data.items():
                target = self._folder / location
                os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))  # nobody else takes the name now
                placed.append(target)
                with _about(target):
                    os.replace(file.name, target)
            if self._data:
                self._sync_folder()
            for name, file in self._open.items():
                with _about(self._folder / name):
                    os.replace(file.name, self._folder / name)
                placed.clear()
        except BaseException:
            for target in placed:
                target.unlink(missing_ok=True)
            raise
        self._sync_folder()
        with contextlib.suppress(OSError):  # what cannot be removed, or is not known to be of no use, stays
            for path in old:
                models = (self._folder / self._name, *self._folder.glob("*.onnx"))
                if not any(_refers(model, path.name) for model in models):
                    path.unlink()

    def _old_data(self) -> list[Path]:
        """The data that the model at ``path`` refers to now, as far as it has names that `open_data` gives."""
        try:
            return [path for _, path in self._data_files() if _refers(self._folder / self._name, path.name)]
        except PermissionError:
            return []

    def _data_files(self) -> list[tuple[int, Path]]:
        """The files with names that `open_data` gives, with their numbers."""
        pattern = re.compile(re.escape(self._name) + r"(?:\.([1-9]\d{0,8}))?\.data")
        found = ((pattern.fullmatch(path.name), path) for path in self._folder.iterdir())
        return [(int(match[1] or 0), path) for match, path in found if match]

    def _sync_folder(self) -> None:
        if not self._durable or os.name == "nt":  # Windows opens no folders
            return
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def _about(path: Path) -> Iterator[None]:
    """Errors name ``path``, which the caller knows, and no temporary file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _refers(model: Path, location: str) -> bool:
    """Whether a model file has a tensor with its data at ``location``. It is searched for, and not parsed."""
    if not model.is_file() or not model.stat().st_size:
        return False
    entry = onnx.StringStringEntryProto(key="location", value=location).SerializeToString()
    with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(entry) >= 0


def _externalise(
    model: onnx.ModelProto,
    sizes: list[int],
    location: str,
    file: Any,
    progress: Callable[[int, int], None] | None,
    tables: Mapping[str, Streamed],
) -> onnx.ModelProto:
    """A copy of the model that refers to its tables in ``file``, where they are written."""
    light = without_initializers(model)
    written, total = 0, sum(size for size in sizes if size >= _ALIGNMENT)
    for tensor, size in zip(model.graph.initializer, sizes, strict=True):
        if size < _ALIGNMENT:
            light.graph.initializer.append(tensor)
            if tensor.name in tables:
                _fill(light.graph.initializer[-1], b"".join(tables[tensor.name].parts()))
            continue
        offset = -(-file.tell() // _ALIGNMENT) * _ALIGNMENT
        file.seek(offset)
        data = tables[tensor.name] if tensor.name in tables else _in_parts(memoryview(tensor.raw_data))
        for part in data.parts():
            written += file.write(part)
            if progress is not None:
                progress(written, total)
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
        if tensor.doc_string:
            light.graph.initializer[-1].doc_string = tensor.doc_string
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
