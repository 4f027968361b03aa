"""Broken files through every command that reads files: ``python fuzz/models.py --seconds 60``.

Mutates models, .npy, .safetensors, fastText's files and vectors of words, and runs a command line over each, in a
child. A command must end with exit code 0, or 2 and one line on stderr, within 10 seconds of CPU time and 2 GiB.
Everything else is a finding: it is printed, its file is written to --findings, and the exit code is 1. Cases are
numbered, and a number always makes the same case: ``--first N --cases 1`` runs one again.
``tests/test_hostile_files.py`` runs fuzz/corpus/, where a finding belongs once its defect is mended.

Models are not run: ONNX Runtime's own parser of models is not ours to test.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import copy
import functools
import gc
import io
import itertools
import json
import os
import random
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import typer.main
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper

import lucid_onnx
from lucid_onnx import cli
from lucid_onnx.cli import app

SECONDS = 10  #: of CPU time that a command may take
PATIENCE = 120  #: seconds without an answer, after which a command hangs
MEMORY = 2**31  #: bytes that it may take beyond what the process has before it
#: What each kind of file is given to.
COMMANDS = {
    ".onnx": (
        "inspect FILE --json",
        "inspect FILE --svg out.svg",
        "info FILE",
        "fuse FILE -o out.onnx --report out.json",
        "fuse FILE -o out.onnx --merge-tables --assume-nonempty --form standard",
        "lower FILE -o out.onnx",
        "lower FILE -o out.onnx --form portable --ragged loop",
        "quantize FILE -o out.onnx",
        "quantize FILE -o out.onnx --dtype uint4 --form standard",
    ),
    ".npy": ("build FILE -o out.onnx",),
    ".safetensors": ("build FILE -o out.onnx", "build FILE:w -o out.onnx"),
    ".ftz": ("import FILE -o out.onnx", "import FILE -o out.onnx --dtype int8 --form standard"),
    ".vec": (
        "import FILE -o out.onnx",
        "import FILE -o out.onnx --dtype uint4 --layout ragged",
        "import FILE -o out.onnx --format text-vectors",
        "import FILE -o out.onnx --format word2vec",
    ),
}
_INTEGERS = (-1, 0, 1, 2, 3, 7, 8, 64, 2**16, 2**31 - 1, 2**31, 2**62, 2**63 - 1, -(2**31), -(2**63))
_WORDS = (
    "",
    "w",
    "weight",
    "indices",
    "ai.lucid",
    "If",
    "Loop",
    "Gather",
    "EmbeddingBag",
    "a\0b",
    "../x",
    "é",
    "x" * 300,
)


class Case(NamedTuple):
    """A file, its kind, and the command line that reads it."""

    content: bytes
    suffix: str
    command: str


class Finding(NamedTuple):
    """A case that did not end as it has to, and how it ended."""

    number: int
    case: Case
    what: str


# ---- Files to begin with.


def _models() -> Iterator[onnx.ModelProto]:
    table = np.arange(60, dtype=np.float32).reshape(12, 5)
    forms: Sequence[Any] = ("portable", "standard", "native")
    for form in forms:
        yield lucid_onnx.build_model(table, mode="mean", form=form, padding_idx=1)
        yield lucid_onnx.build_model(table, two_d=True, mode="max", form=form, max_norm=1.0)
        yield lucid_onnx.build_collection_model([table, table], form=form)
    quantized = lucid_onnx.QuantizedTable.quantize(table, "uint4")
    yield lucid_onnx.build_quantized_model(quantized, form="portable")
    yield lucid_onnx.build_grad_model(mode="sum", per_sample_weights=True, form="native")
    yield lucid_onnx.lower(lucid_onnx.build_model(table, mode="sum"), ragged="loop")
    yield _gathers()
    for model in (_gathers(), lucid_onnx.build_model(table, mode="sum", form="standard")):
        for tensor in model.graph.initializer:
            _put_outside(tensor)
        yield model


def _gathers() -> onnx.ModelProto:
    """Bags as exporters write them: merged by a Concat, one in a branch."""
    inner = helper.make_graph(
        [
            helper.make_node("Gather", ["w", "i"], ["g2"], axis=0),
            helper.make_node("ReduceSum", ["g2", "axes"], ["t"], keepdims=0),
        ],
        "branch",
        [],
        [helper.make_tensor_value_info("t", TensorProto.FLOAT, ["b", 5])],
    )
    nodes = [
        helper.make_node("Gather", ["w", "i"], ["g0"], axis=0),
        helper.make_node("ReduceSum", ["g0", "axes"], ["s0"], keepdims=0),
        helper.make_node("Gather", ["w", "i"], ["g1"], axis=0),
        helper.make_node("ReduceSum", ["g1", "axes"], ["s1"], keepdims=0),
        helper.make_node("Concat", ["s0", "s1"], ["c"], axis=1),
        helper.make_node("If", ["yes"], ["y"], then_branch=inner, else_branch=inner),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("i", TensorProto.INT64, ["b", 3])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", d]) for n, d in (("c", 10), ("y", 5))],
        [
            numpy_helper.from_array(np.arange(60, dtype=np.float32).reshape(12, 5), "w"),
            numpy_helper.from_array(np.array([1]), "axes"),
            numpy_helper.from_array(np.array(True), "yes"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def _put_outside(tensor: onnx.TensorProto) -> None:
    """Let a tensor have its data in the file ``data``, which is 4 KiB of zeros."""
    length = len(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "data"), ("offset", 0), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def _npy() -> Iterator[bytes]:
    for dtype in ("<f4", "<f2", ">f8"):
        file = io.BytesIO()
        np.save(file, np.arange(12).reshape(4, 3).astype(dtype))
        yield file.getvalue()


def _safetensors() -> Iterator[dict[str, Any]]:
    yield {"w": {"dtype": "F32", "shape": [4, 3], "data_offsets": [0, 48]}}
    yield {
        "__metadata__": {"format": "pt"},
        "w": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
        "v": {"dtype": "F64", "shape": [0, 3], "data_offsets": [12, 12]},
    }


def _fasttext() -> Iterator[bytes]:
    """Small models that fastText has trained."""
    recorded = Path(__file__).resolve().parents[1] / "tests" / "fasttext_recorded.json"
    for entry in json.loads(recorded.read_text())["models"].values():
        yield zlib.decompress(base64.b85decode(entry["file"]))


#: Vectors of words as GloVe, fastText and word2vec write them.
_VECTORS = (
    b"king 0.50 0.68\nqueen 0.37 1.05\n, -1e-3 2\n",
    b"3 2\nking 0.50 0.68\nqueen 0.37 1.05\n</s> 0 -0.25\n",
    b"2 3\nking " + struct.pack("<3f", 0.5, 1, -2) + b"\nqueen " + struct.pack("<3f", 1, 2, 3) + b"\n",
)
_FIELDS = (
    b"nan",
    b"inf",
    b"-1e999",
    b"1" * 400,
    b"0x10",
    b"1_0",
    b"\xff\xfe",
    b"\0",
    b"",
    b" ",
    b"\n",
    b"\r\n",
    b"\xc2\xa0",
)


# ---- Mutations.


class Mutator:
    """Makes the case of a number."""

    def __init__(self) -> None:
        self._models = list(_models())
        self._npy = list(_npy())
        self._safetensors = list(_safetensors())
        self._fasttext = list(_fasttext())

    def case(self, number: int) -> Case:
        """Always the same for a number."""
        r = random.Random(number)
        suffix = r.choices(list(COMMANDS), (16, 2, 2, 3, 2))[0]
        make: dict[str, Callable[[random.Random], bytes]] = {
            ".onnx": self._model,
            ".npy": self._array,
            ".safetensors": self._checkpoint,
            ".ftz": self._words,
            ".vec": self._vectors,
        }
        return Case(make[suffix](r), suffix, r.choice(COMMANDS[suffix]))

    def _model(self, r: random.Random) -> bytes:
        model = onnx.ModelProto()
        model.CopyFrom(r.choice(self._models))
        if r.random() < 0.15:
            return _bytes(r, model.SerializeToString())
        for _ in range(r.choice((1, 1, 1, 2, 4))):
            _change(r, model)
        try:
            return model.SerializeToString()
        except ValueError:  # text that is no UTF-8
            return b""

    def _array(self, r: random.Random) -> bytes:
        content = r.choice(self._npy)
        if r.random() < 0.3:
            return _bytes(r, content)
        header = content[10:128].decode()
        for _ in range(r.choice((1, 1, 2))):
            old, new = r.choice((("4, 3", r.choice(_SHAPES)), ("<f", r.choice(_DTYPES)), ("False", r.choice(_FLAGS))))
            header = header.replace(old, new) if r.random() < 0.8 else _text(r, header)
        encoded = header.encode("latin1", "replace")
        if r.random() < 0.5:
            return b"\x93NUMPY\x02\x00" + len(encoded).to_bytes(4, "little") + encoded + content[128:]
        return b"\x93NUMPY\x01\x00" + (len(encoded) & 0xFFFF).to_bytes(2, "little") + encoded + content[128:]

    def _checkpoint(self, r: random.Random) -> bytes:
        header = json.loads(json.dumps(r.choice(self._safetensors)))
        for _ in range(r.choice((1, 1, 2))):
            entry = header.get("w", {})
            key = r.choice(("dtype", "shape", "data_offsets"))
            if r.random() < 0.2:
                header[r.choice(_WORDS)] = copy.deepcopy(r.choice(_VALUES))
            elif isinstance(entry, dict):
                value = entry.get(key)
                if isinstance(value, list) and value and r.random() < 0.7:
                    value[r.randrange(len(value))] = copy.deepcopy(r.choice(_VALUES))
                else:
                    entry[key] = copy.deepcopy(r.choice(_VALUES))
        text = json.dumps(header)
        encoded = (_text(r, text) if r.random() < 0.3 else text).encode("utf-8", "replace")
        content = len(encoded).to_bytes(8, "little") + encoded + bytes(60)
        return _bytes(r, content) if r.random() < 0.2 else content

    def _words(self, r: random.Random) -> bytes:
        content = r.choice(self._fasttext)
        if r.random() < 0.4:
            return _bytes(r, content)
        data = bytearray(content)
        for _ in range(r.choice((1, 1, 2, 4))):
            form = r.choice("iqb")
            ends = 2 ** (8 * struct.calcsize("<" + form) - 1)
            value = r.choice(_INTEGERS) if r.random() < 0.7 else r.randrange(-3, 3000)
            # The numbers of the head, and those anywhere else.
            place = 4 * r.randrange(24) if r.random() < 0.5 else r.randrange(len(data) - 8)
            struct.pack_into("<" + form, data, place, max(-ends, min(value, ends - 1)))
        return bytes(data)

    def _vectors(self, r: random.Random) -> bytes:
        content = r.choice(_VECTORS)
        if r.random() < 0.4:
            return _bytes(r, content)
        fields = content.split(b" ")
        for _ in range(r.choice((1, 1, 2, 4))):
            value = b"%d" % r.choice(_INTEGERS) if r.random() < 0.4 else r.choice(_FIELDS)
            fields[r.randrange(len(fields))] = value if r.random() < 0.7 else value * r.choice((2, 1000))
        return b" ".join(fields)


_SHAPES = ("4,", "", "True, 3", "-1, 3", "4, 3.0", "4, 3, " * 40, "0, 3", f"{2**62}, 4", "1+1" * 2000, "-" * 3000 + "1")
_SHAPES += ("(" * 300, "[1]", "'4', 3", "4, 3L", f"1{'0' * 3000}, 1", "lambda: 0, 3", "4, *3")
_DTYPES = ("O", ">U", "|V", "<c", "<f2,<f", "[('a', '<f", "é", "<M", "\0", "<f" * 500)
_FLAGS = ("True", "1", "None", "[]", "()")
_VALUES: tuple[Any, ...] = (
    True,
    None,
    -1,
    0,
    1.5,
    2**62,
    10**400,
    "x",
    [],
    {},
    [[1]],
    [True, 16],
    [1] * 100,
    [2**60] * 70,
)
_VALUES += ([0, 2**62], "F32", "I64", [[[[]]]], {"a": 1}, float("inf"))


def _bytes(r: random.Random, content: bytes) -> bytes:
    data = bytearray(content)
    for _ in range(r.choice((1, 2, 8))):
        place = r.randrange(len(data) + 1)
        kind = r.randrange(4)
        if kind == 0:
            del data[place:]
        elif kind == 1:
            data[place:place] = bytes(r.randrange(256) for _ in range(r.randrange(9)))
        elif kind == 2 and place < len(data):
            data[place] = r.randrange(256)
        else:
            del data[place : place + r.randrange(9)]
    return bytes(data)


def _text(r: random.Random, text: str) -> str:
    place = r.randrange(len(text) + 1)
    return (
        text[:place]
        + r.choice(("", ",", "[", "{", "(" * 100, "9" * 50, '"', "'", "+1", "\\u", "\0"))
        + text[place + 1 :]
    )


def _change(r: random.Random, message: Any) -> None:
    """Change something in a message or far inside of it."""
    while True:
        fields = message.ListFields()
        if not fields or r.random() < 0.1:
            break
        field, value = r.choice(fields)
        if field.message_type is None:
            break
        inner = value
        if not hasattr(value, "ListFields"):
            if not len(value) or r.random() < 0.1:
                break
            inner = r.choice(value)
        message = inner
    if not message.DESCRIPTOR.fields:
        return
    there = [f for f, _ in message.ListFields()]
    field = r.choice(there if there and r.random() < 0.7 else list(message.DESCRIPTOR.fields))
    value = getattr(message, field.name)
    repeated = hasattr(value, "append") or hasattr(value, "add")
    if r.random() < 0.15:
        message.ClearField(field.name)
    elif repeated and len(value) and r.random() < 0.6:
        _rearrange(r, value)
    elif field.message_type is not None:
        with contextlib.suppress(DecodeError, ValueError, AttributeError):
            (value.add() if repeated else value).MergeFromString(bytes(r.randrange(9) for _ in range(r.randrange(5))))
    else:
        scalar = _scalar(r, field)
        if repeated:
            count = r.choice((1, 1, 3, 70))
            value.extend(itertools.repeat(scalar, count))
        else:
            setattr(message, field.name, scalar)


def _rearrange(r: random.Random, value: Any) -> None:
    items = list(value)
    kind = r.randrange(4)
    if kind == 0:
        del value[r.randrange(len(items))]
        return
    if kind == 1:
        value.extend([r.choice(items)])
        return
    if kind == 2:
        r.shuffle(items)
    else:
        items = items[: r.randrange(len(items) + 1)]
    copies = [type(i).FromString(i.SerializeToString()) if hasattr(i, "SerializeToString") else i for i in items]
    del value[:]
    value.extend(copies)


def _scalar(r: random.Random, field: Any) -> Any:
    kind = field.cpp_type
    if kind == field.CPPTYPE_STRING:
        if field.type == field.TYPE_BYTES:
            return bytes(r.randrange(256) for _ in range(r.choice((0, 1, 4, 8, 240))))
        return r.choice(_WORDS)
    if kind in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return r.choice((0.0, -1.0, float("inf"), float("nan"), 1e30))
    if kind == field.CPPTYPE_ENUM:
        return r.choice([v.number for v in field.enum_type.values])
    number = r.choice(_INTEGERS + tuple(range(30)))
    if kind in (field.CPPTYPE_INT32, field.CPPTYPE_UINT32):
        number = max(-(2**31), min(2**31 - 1, number))
    return abs(number) if kind in (field.CPPTYPE_UINT32, field.CPPTYPE_UINT64) else number


# ---- Running.


class TooLongError(BaseException):
    """A command took longer than it may; not an Exception, which it might catch."""


def run(case: Case, folder: Path) -> str | None:
    """What is wrong with how a command ends over a file, in ``folder``; None if it ends as it has to.

    The folder is the current one from then on: run it in a child.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / f"file{case.suffix}").write_bytes(case.content)
    (folder / "data").write_bytes(bytes(4096))
    os.chdir(folder)
    out, err = io.StringIO(), io.StringIO()
    arguments = case.command.replace("FILE", f"file{case.suffix}").split()
    begin = time.process_time()
    try:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main(arguments)
    except TooLongError:
        return f"took longer than {SECONDS} s, at:\n{traceback.format_exc(limit=-8)}"
    except Exception:
        return traceback.format_exc(limit=-8)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if time.process_time() - begin > SECONDS:
        return f"took {time.process_time() - begin:.1f} s"
    error = err.getvalue()
    if code == 2 and (error.count("\n") != 1 or "out of memory" in error or len(error) > 5000):
        return f"exit code 2 with {error[:1000]!r}"
    return None if code in (0, 2) else f"exit code {code}: {error[:1000]}"


def _limit() -> None:
    """Limits of this process, which has to be a child."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))

    def stop(*_: Any) -> None:
        raise TooLongError

    signal.signal(signal.SIGPROF, stop)
    # What takes longer than most of the cases: making the commands.
    app._app = functools.cache(app._app)
    typer.main.get_command = functools.cache(typer.main.get_command)
    gc.freeze()
    warnings.simplefilter("ignore")
    null = os.open(os.devnull, os.O_WRONLY)  # C++ libraries write to the terminal
    os.dup2(null, 2)


def search(numbers: range, case: Callable[[int], Case], until: float = float("inf")) -> Iterator[Finding | int]:
    """Run cases in a child, and in another one if it crashes or hangs. Yields the number of each case that ended well.

    Args:
        until: the time.monotonic() at which to stop.
    """
    number = numbers.start
    while number < numbers.stop and time.monotonic() < until:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            _work(range(number, numbers.stop), case, until, writing)
        os.close(writing)
        ended = "the process ended"
        try:
            with os.fdopen(reading, "rb") as lines:
                while number < numbers.stop:
                    if not select.select([lines], [], [], PATIENCE)[0]:
                        ended = f"hung for more than {PATIENCE} s"
                        break
                    if not (line := lines.readline()):
                        break
                    found = json.loads(line)
                    yield number if found is None else Finding(number, case(number), found)
                    number += 1
        finally:
            os.kill(pid, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if number < numbers.stop and (status or "hung" in ended) and time.monotonic() < until:
            yield Finding(number, case(number), f"{ended}, with status {status}")
            number += 1


def _work(numbers: range, case: Callable[[int], Case], until: float, writing: int) -> None:
    """The child: a line of JSON for each case, null if it ended well."""
    memory = "/dev/shm"  # where nothing waits for a disk
    with tempfile.TemporaryDirectory(prefix="fuzz", dir=memory if os.path.isdir(memory) else None) as folder:
        _limit()
        for number in numbers:
            if time.monotonic() >= until:
                break
            found = run(case(number), Path(folder, "case"))
            os.write(writing, json.dumps(found).encode() + b"\n")
    os._exit(0)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the exit code is 1 if there are findings."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="how long to go on")
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--cases", type=int, default=2**62, help="how many cases at most")
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"), help="the folder for files that fail")
    given = parser.parse_args(argv)
    begin = time.monotonic()
    done = findings = 0
    for found in search(
        range(given.first, given.first + given.cases), Mutator().case, time.monotonic() + given.seconds
    ):
        done += 1
        if isinstance(found, Finding):
            findings += 1
            given.findings.mkdir(exist_ok=True)
            file = given.findings / f"{found.number}{found.case.suffix}"
            file.write_bytes(found.case.content)
            print(f"{found.number}: {found.case.command} ({file})\n{found.what}", flush=True)
    seconds = time.monotonic() - begin
    print(f"{done} cases from {given.first} on in {seconds:.0f} s, {findings} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
