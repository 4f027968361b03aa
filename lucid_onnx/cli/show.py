"""The output of the command line: tables, sizes and lines."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lucid_onnx.builder import LARGEST_MESSAGE, load, model_files, text_file
from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.runtime import info
from lucid_onnx.runtime.placement import NodeTime

from .files import shape_text, spelled

if TYPE_CHECKING:
    from lucid_onnx.rewrite import FuseReport, QuantizeReport
    from lucid_onnx.rewrite.tables import RowErrors


def new_console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 160)


def say(console: Console, line: str) -> None:
    console.print(Text(line), soft_wrap=True)


def new_table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def bytes_text(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def preview(result: Any) -> str:
    if not isinstance(result, np.ndarray):
        return str(result)[:60]
    numbers = result.dtype.kind in "fV" or result.dtype == spec.BFLOAT16
    first = [f"{float(v):.6g}" if numbers else str(v) for v in result.flat[:4]]
    return ", ".join(first) + (", ..." if result.size > 4 else "")


def _values(values: Iterable[info.Value]) -> str:
    return ", ".join(f"{v.name} {v.dtype} {shape_text(v.shape)}" for v in values) or "none"


def show_written(console: Console, files: Sequence[str], note: str = "", *, source: str | None = None) -> None:
    """Name a model that was written, and the other files that it needs.

    Args:
        source: the model that it was made from, whose files were not written.
    """
    sizes = [os.path.getsize(name) for name in files]
    kept = {os.path.realpath(name) for name in (() if source is None else model_files(source))}
    text = None if len(files) == 1 else text_file(load(files[0]))
    packed = ", or use --single-file" if sum(sizes) < LARGEST_MESSAGE else ""
    for k, (name, size) in enumerate(zip(files, sizes, strict=True)):
        named = f"{name} ({bytes_text(size)})"
        single = "" if os.path.basename(name) == text else packed
        if k == 0:
            say(console, f"wrote {named}{note}")
        elif os.path.realpath(name) in kept:
            say(console, f"it needs {named} beside it: keep the files together{single}")
        else:
            say(console, f"wrote {named}, which it needs beside it: keep the files together{single}")


def show_built(files: Sequence[str], rows: np.ndarray, model: onnx.ModelProto, form: str) -> None:
    console = new_console()
    show_written(console, files)
    opset = info.opset(model)
    say(console, f"table {rows.dtype} {shape_text(rows.shape)}, {bytes_text(rows.nbytes)}; {form} form, opset {opset}")
    say(console, f"inputs: {_values(info.inputs(model))}")
    say(console, f"outputs: {_values(info.outputs(model))}")


def show_smaller(dtype: str, size: int, errors: RowErrors) -> None:
    lost = f"rows lost {errors.mean:.3g} of their length on average, {errors.largest:.3g} at most"
    say(new_console(), f"the table was written as {dtype}, {bytes_text(size)}: {lost}")


def show_installation(console: Console, found: info.Installation) -> None:
    for name in ("lucid_onnx", "python", "numpy", "onnx"):
        say(console, f"{name.replace('_', '-'):<12} {getattr(found, name)}")
    problem = (found.onnxruntime_problem or "").removeprefix("onnxruntime is ")
    say(console, f"{'onnxruntime':<12} {found.onnxruntime or problem}")
    if found.onnxruntime is not None:
        if problem:
            say(console, f"{'warning':<12} {problem}")
        say(console, f"{'providers':<12} {', '.join(found.providers)}")
    library = found.library
    if library is None:
        say(console, f"{'library':<12} not installed: bags run as standard operators")
    else:
        _show_library(console, library)
    cuda = found.cuda_library
    if cuda is None:
        say(console, f"{'CUDA library':<12} not installed")
    else:
        say(console, f"{'CUDA library':<12} {cuda.path}")
        if cuda.toolkit is not None:
            needs = f"which needs NVIDIA driver {cuda.toolkit.driver} or later"
            say(console, f"{'':<12} built with CUDA {cuda.toolkit.version}, {needs}")
        say(console, f"{'':<12} {'runs here' if cuda.problem is None else f'does not run here: {cuda.problem}'}")


def _show_library(console: Console, library: info.Library) -> None:
    say(console, f"{'library':<12} {library.path}")
    say(console, f"{'':<12} version {library.version}")
    isas = ", ".join(isa.name + ("" if isa.supported else " (not on this machine)") for isa in library.isas)
    say(console, f"{'has':<12} {isas}")
    say(console, f"{'runs':<12} {library.active}{f', forced by {info.FORCE_ISA}' if library.forced else ''}")


def show_model(console: Console, found: info.Model) -> None:
    say(console, "")
    say(console, f"{found.path} ({bytes_text(found.file_bytes)}), opset {found.opset}, {found.form} form")
    for data in found.external_data:
        size = "missing" if data.file_bytes is None else bytes_text(data.file_bytes)
        if data.cached_bytes is not None:
            size += f", {bytes_text(data.cached_bytes)} of it in memory"
        say(console, f"external data: {data.path} ({size})")
    say(console, f"inputs: {_values(found.inputs)}")
    say(console, f"outputs: {_values(found.outputs)}")
    if not found.nodes:
        say(console, f"no {spec.DOMAIN} nodes")
        return
    table = new_table("node", "operator", "form", "mode", "table", "dtype", "shape", "bytes", "attributes")
    for node in found.nodes:
        table.add_row(
            Text(node.name),
            node.op,
            node.form,
            node.mode,
            Text(node.table.name),
            node.table.dtype,
            shape_text(node.table.shape),
            "-" if node.table_bytes is None else bytes_text(node.table_bytes),
            node.changed or "-",
        )
    console.print(table)


def show_table_memory(console: Console, found: info.TableMemory) -> None:
    free = "unknown" if found.free_bytes is None else bytes_text(found.free_bytes)
    say(console, f"table memory {found.choice!r}, {free} free:")
    table = new_table("table", "stored in", "bytes", "at session start", "copied", "huge pages")
    for t in found.tables:
        where = "a file" if t.external else "the model"
        copied = bytes_text(t.copied_bytes) if t.copied_bytes else "-"
        table.add_row(Text(t.name), where, bytes_text(t.bytes), t.plan, copied, str(t.huge_pages or "-"))
    console.print(table)


#: How many nodes a profile shows.
_SHOWN_TIMES = 15


def show_times(console: Console, times: Sequence[NodeTime]) -> None:
    """The nodes of a run, the longest first, and the sum of those that are not shown."""
    whole = sum(node.milliseconds for node in times) or 1.0
    table = new_table("node", "operator", "ran by", "kernels", "ms", "part")
    for node in times[:_SHOWN_TIMES]:
        table.add_row(Text(node.name), Text(node.op), node.by, str(node.count), *_time(node.milliseconds, whole))
    rest = times[_SHOWN_TIMES:]
    if rest:
        count, spent = sum(node.count for node in rest), sum(node.milliseconds for node in rest)
        table.add_row(f"{len(rest)} others", "", "", str(count), *_time(spent, whole))
    console.print(table)


def _time(milliseconds: float, whole: float) -> tuple[str, str]:
    return f"{milliseconds:.3f}", f"{100 * milliseconds / whole:.0f} %"


def show_fused(console: Console, report: FuseReport, verb: str) -> None:
    if not (report.fused or report.unfused or report.merged or report.unmerged):
        say(console, "nothing to fuse: no bag is written out in standard operators")
        return
    if report.fused:
        columns = ("from", "operator", "mode", "table", "dtype", "shape", "bytes", "attributes")
        table = new_table(verb, *columns)
        for f in report.fused:
            table.add_row(
                Text(f.where),
                f.pattern,
                f.op,
                f.mode,
                Text(f.table if f.table_from is None else f"{f.table} (computed by {f.table_from})"),
                f.table_dtype,
                shape_text(f.table_shape),
                "-" if f.table_bytes is None else bytes_text(f.table_bytes),
                f.changed or "-",
            )
        console.print(table)
    if report.unfused:
        table = new_table("not fused", "looks like", "why")
        for u in report.unfused:
            table.add_row(Text(u.where), u.pattern, Text(spelled(u.reason)))
        console.print(table)
    if report.merged:
        table = new_table("merged", "operator", "mode", "tables")
        for m in report.merged:
            table.add_row(Text(m.where), m.op, m.mode, Text(f"{len(m.tables)}: {', '.join(m.tables)}"))
        console.print(table)
    if report.unmerged:
        table = new_table("not merged", "read by", "why")
        for bag in report.unmerged:
            table.add_row(Text(bag.bag), Text(bag.where), Text(bag.reason))
        console.print(table)


def show_quantized(console: Console, report: QuantizeReport) -> None:
    if report.quantized:
        columns = ("from", "to", "shape", "bytes before", "after", "largest row error", "of row", "mean row error")
        table = new_table("table", *columns, "bags")
        for q in report.quantized:
            table.add_row(
                Text(q.table),
                q.dtype_before,
                q.dtype,
                shape_text(q.shape),
                bytes_text(q.bytes_before),
                f"{bytes_text(q.bytes_after)} ({q.bytes_before / q.bytes_after:.2f}x smaller)",
                f"{q.largest_row_error:.3g}",
                "-" if q.worst_row is None else str(q.worst_row),
                f"{q.mean_row_error:.3g}",
                Text(", ".join(q.bags)),
            )
        console.print(table)
    if report.unquantized:
        table = new_table("skipped", "why", "bags")
        for u in report.unquantized:
            table.add_row(Text(u.table), Text(u.reason), Text(", ".join(u.bags)))
        console.print(table)
