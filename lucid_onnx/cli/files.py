"""The files that the command line reads and writes, and its error messages of one line."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from lucid_onnx.builder import Replacing
from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.sources import checkpoint, npy

if TYPE_CHECKING:
    import onnxruntime

    from lucid_onnx.rewrite import FuseReport, QuantizeReport

#: Exit codes.
EXIT_DIFFERS, EXIT_ERROR, EXIT_INTERRUPTED = 1, 2, 130
#: Nobody reads the output any more: what a shell reports of other tools, which SIGPIPE ends.
EXIT_BROKEN_PIPE = 141
#: onnxruntime's names of the element types that a .npy file can hold, and bfloat16.
_DTYPES = {
    f"tensor({name})": np.dtype(dtype)
    for name, dtype in {
        "float": np.float32,
        "double": np.float64,
        "float16": np.float16,
        "bfloat16": spec.BFLOAT16,
        "bool": np.bool_,
        **{f"{sign}int{bits}": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
    }.items()
}
#: Arguments of functions whose options are spelled otherwise, where a message names them.
_SPELLED = re.compile(r"\b(assume_nonempty|longest_bag|merge_tables|min_bytes|single_file)(?:=True)?\b")


class UserError(Exception):
    """A mistake of the user; the message is one line."""


def spelled(message: str) -> str:
    """A message about arguments of a function as one about options of its command."""
    return _SPELLED.sub(lambda match: "--" + match[1].replace("_", "-"), message)


def check_report(report: Path | None, output: Path) -> None:
    if report is not None:
        check_output(report, "--report")
        if report.absolute() == output.absolute():
            raise UserError(f"--report {report}: is the model to write")


def write_report(path: Path, report: FuseReport | QuantizeReport) -> None:
    with writing(path), Replacing(path) as files:
        files.open(path.name).write(json.dumps(finite(report.as_dict()), indent=2, allow_nan=False).encode())


@contextlib.contextmanager
def model_errors(model: str) -> Iterator[None]:
    """Turn a ValueError about a model into a `UserError` that names its file or the argument."""
    try:
        yield
    except ValueError as error:
        about_options = ("form = ", "dtype = ", "min_bytes = ", "ragged = ", "longest_bag = ", "single_file = ")
        message = str(error) if str(error).startswith((f"{model}: ", *about_options)) else f"{model}: {error}"
        raise UserError(spelled(message)) from error


@contextlib.contextmanager
def rewriting_files(model: str, output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        beside = error.filename is not None and Path(os.fspath(error.filename)).parent == Path(model).parent
        if error.filename == model or (beside and isinstance(error, FileNotFoundError)):  # read, not written
            raise UserError(f"{error.filename}: {error.strerror}") from error
        raise UserError(f"{output}: cannot be written: {error.strerror or error}") from error


def finite(data: Any) -> Any:
    """Data for JSON, which has no infinity: it becomes the string "inf"."""
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [finite(value) for value in data]
    return str(data) if isinstance(data, float) and not math.isfinite(data) else data


@contextlib.contextmanager
def user_errors(*errors: type[Exception], prefix: str = "") -> Iterator[None]:
    """Turn these exceptions into `UserError`."""
    try:
        yield
    except errors as error:
        raise UserError(f"{prefix}{error}") from error


@contextlib.contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{os.fspath(path)}: {error.strerror or error}") from error


@contextlib.contextmanager
def reading_any(path: str | os.PathLike[str]) -> Iterator[None]:
    """As `reading`, of what may also read other files: the error names the one that it is about."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{os.fspath(error.filename or path)}: {error.strerror or error}") from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def runtime_errors(prefix: str) -> Iterator[None]:
    """Turn onnxruntime's own exceptions, which have no common base, and plain RuntimeErrors into `UserError`."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    classes = tuple(c for c in vars(state).values() if isinstance(c, type) and issubclass(c, Exception))
    try:
        yield
    except Exception as error:
        if not isinstance(error, classes) and type(error) is not RuntimeError:
            raise
        raise UserError(prefix + condensed(str(error)).removeprefix(prefix)) from error


def condensed(message: str) -> str:
    """An onnxruntime error without colours, codes, and the place in its sources."""
    message = re.sub(r"\x1b\[[0-9;]*m", "", message)
    message = message.split("\nStacktrace:")[0]
    message = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", "", message)
    message = re.sub(r"Load model from .*? failed:\s*", "", message)
    message = re.sub(r"Non-zero status code returned while running (\S+) node\. Name:", r"\1 ", message)
    message = re.sub(r"^(\w+) ('.*?') Status Message: (?:\1: )?", r"\1 \2: ", message).replace(" '': ", ": ", 1)
    source = r"\S*\b[\w-]+\.(?:cc|cpp|cu|cuh|h|hpp):\d+\s+"
    signature = r"(?:(?:[\w:<>~*&]+\s+)*[\w:<>~]+(?:\(\))?\([^()]*\)\s*(?:const\s+)?|\w+\s+(?=[A-Z]))?"
    return re.sub(source + signature, "", message).strip()


def check_file(path: str) -> None:
    if os.path.isdir(path):
        raise UserError(f"{path}: is a directory")
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file")
    if not os.path.isfile(path):
        raise UserError(f"{path}: is not a regular file")


def check_output(path: Path, option: str = "--output") -> None:
    if path.is_dir():
        raise UserError(f"{option} {path}: is a directory")
    if not path.parent.is_dir():
        raise UserError(f"{option} {path}: there is no directory {path.parent}")


def read_npy(path: str, other: str = "file") -> np.ndarray:
    """The array of a .npy file, mapped and in native byte order; raw items of two bytes are bfloat16."""
    check_file(path)
    with user_errors(ValueError), reading(path):
        return npy.read(path, other)


def split_key(table: str) -> tuple[str, str | None]:
    """The file and the key of ``file.safetensors:key``; None for a key that is not given."""
    path, found, key = table.rpartition(":")
    return (path, key) if found and path.endswith(".safetensors") else (table, None)


def read_table(table: str) -> np.ndarray:
    path, key = split_key(table)
    check_file(path)
    rows = _read_safetensors(path, key) if path.endswith(".safetensors") else read_npy(path, "or .safetensors file")
    with user_errors(TypeError, ValueError, prefix=f"{table}: "):
        spec.check_table(rows)
    return rows


def _read_safetensors(path: str, key: str | None) -> np.ndarray:
    """One tensor of a file, mapped."""
    with user_errors(ValueError), reading(path):
        if key is None:
            names = checkpoint.names(path)
            if len(names) != 1:
                raise UserError(f"{path}: which tensor? add :KEY to the file's name; it has: {checkpoint.named(names)}")
            (key,) = names
        return checkpoint.read(path, key)


def named_files(inputs: Iterable[str]) -> dict[str, str]:
    files: dict[str, str] = {}
    for given in inputs:
        name, found, path = given.partition("=")
        if not (name and found and path):
            raise UserError(f"--input {given}: expected NAME=FILE.npy")
        if name in files:
            raise UserError(f"--input {name}: given twice, {files[name]} and {path}")
        files[name] = path
    return files


def read_feeds(session: onnxruntime.InferenceSession, model: str, files: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The inputs, checked against what the model takes."""

    wanted = {i.name: i for i in session.get_inputs()}
    for name in files:
        if name not in wanted:
            raise UserError(f"--input {name}: {model} has no such input; it has: {', '.join(wanted) or 'none'}")
    for name, value in wanted.items():
        if name not in files:
            raise UserError(f"--input {name}: missing; {model} takes {_type(value)} {shape_text(value.shape)}")
    feeds = {}
    for name, value in wanted.items():
        if value.type not in _DTYPES:
            raise UserError(f"--input {name}: {model} takes {value.type}, which no .npy file can hold")
        dtype = _DTYPES[value.type]
        feeds[name] = _read_feed(name, files[name], model, dtype, value.shape)
    return feeds


def _type(value: Any) -> str:
    """The dtype of an input as NumPy calls it; onnxruntime's own name for what is no tensor of numbers."""
    return _DTYPES[value.type].name if value.type in _DTYPES else value.type


def _read_feed(name: str, path: str, model: str, dtype: np.dtype, shape: Sequence[int | str | None]) -> np.ndarray:
    array = read_npy(path)
    if dtype == spec.BFLOAT16 and array.dtype == np.float32:
        array = _exact_bfloat16(name, path, array)
    if array.dtype != dtype:
        raise UserError(f"--input {name}: {path} has dtype {array.dtype}, {model} takes {dtype}")
    # onnxruntime gives [] both for a scalar and for an unknown rank.
    expected = [d if isinstance(d, int) else None for d in shape]
    fits = len(expected) == array.ndim and all(e in (None, d) for e, d in zip(expected, array.shape, strict=True))
    if shape and not fits:
        raise UserError(
            f"--input {name}: {path} has shape {shape_text(array.shape)}, {model} takes {shape_text(shape)}"
        )
    return array


def _exact_bfloat16(name: str, path: str, array: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        rounded = array.astype(spec.BFLOAT16)
    lost = (rounded.astype(np.float32) != array) & ~np.isnan(array)
    if lost.any():
        where = np.unravel_index(int(lost.argmax()), lost.shape)
        position = ", ".join(str(int(i)) for i in where)
        raise UserError(
            f"--input {name}: {path} has {array[where]:.9g} at [{position}], which is not exact in bfloat16"
        )
    return rounded


def targets_of(output: Path, names: Sequence[str]) -> dict[str, Path]:
    """The file of each output."""
    if output.suffix.lower() == ".npy":
        check_output(output)
        if len(names) != 1:
            raise UserError(f"--output {output}: one file, but the model has {len(names)} outputs; name a folder")
        return {names[0]: output}
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: is neither a folder nor FILE.npy")
    if output.suffix and not output.exists():
        raise UserError(
            f"--output {output}: outputs are written as .npy files; give FILE.npy for one output, or a folder, whose "
            "name has no dot or which exists"
        )
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no directory {output.parent}")
    targets = {name: output / (re.sub(r"[^\w.-]", "_", name) + ".npy") for name in names}
    if len(set(targets.values())) != len(targets):
        raise UserError(f"--output {output}: outputs {', '.join(names)} would share a file name")
    return targets


def write_arrays(output: Path, arrays: Mapping[Path, tuple[str, Any]]) -> None:
    """Write all of them or none; bfloat16 as float32."""
    for name, array in arrays.values():
        if not isinstance(array, np.ndarray) or array.dtype.hasobject:
            raise UserError(
                f"--output {output}: output {name!r} is not an array of numbers, so that no .npy file can hold it"
            )
    folder = next(iter(arrays)).parent
    with writing(output), contextlib.ExitStack() as stack:
        made = None
        if not folder.exists():  # it appears with all of the files in it
            made = folder.with_name(f".{folder.name[:50]}.{secrets.token_hex(4)}")
            made.mkdir()
            stack.callback(shutil.rmtree, made, ignore_errors=True)
        first = next(iter(arrays))
        with Replacing(first if made is None else made / first.name) as files:
            for path, (_, array) in arrays.items():
                _write_npy(files.open(path.name), array)
        if made is not None:
            made.rename(folder)


def _write_npy(file: BinaryIO, array: np.ndarray) -> None:
    plain = array.astype(np.float32) if array.dtype == spec.BFLOAT16 else array
    np.lib.format.write_array(file, np.ascontiguousarray(plain), allow_pickle=False)


def shape_text(shape: Sequence[int | str | None] | None) -> str:
    return "?" if shape is None else f"[{', '.join('?' if d is None else str(d) for d in shape)}]"
