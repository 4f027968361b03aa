"""The commands that make a model and run it: demo, build, run."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.text import Text

from lucid_onnx.builder import ExternalData, build_light_model, load, remember_data, save, streamed
from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.runtime import info
from lucid_onnx.runtime.installation import install_gpu
from lucid_onnx.runtime.library import PROVIDERS
from lucid_onnx.runtime.placement import name_nodes, node_times

from . import demo as cli_demo
from . import files as cli_files
from . import show as cli_show
from .extras import need_onnxruntime, rewriting
from .files import EXIT_DIFFERS, UserError
from .options import SMALLER_DTYPES, AnyForm, Opset, TableBeside, choice
from .progress import writing_bar

if TYPE_CHECKING:
    import onnx

    from lucid_onnx.runtime.session import InferenceSession


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The model to write; a file of that name is replaced.")
    ] = Path(cli_demo.DEFAULT_OUTPUT),
    query: Annotated[
        list[str] | None, typer.Option("--query", "-q", help="A query, instead of three examples. Repeatable.")
    ] = None,
) -> int:
    """Search Python's documentation with one model, in all of its forms.

    Pools the documentation that comes with Python with one model: with the native kernel, with the same file without
    the library, with its standard form and with NumPy. Prints the hits, the times, what ran, and the largest
    difference. The exit code is 1 if that is beyond the tolerance. Nothing is downloaded. The model (64 MiB) is
    written to the current directory, or to --output.

    Example: `lucid-onnx demo --query "how do I leave a loop early"`
    """
    need_onnxruntime()
    cli_files.check_output(output)
    _isa()
    with cli_files.user_errors(cli_demo.DemoError), cli_files.runtime_errors(f"{output}: "), cli_files.writing(output):
        result = cli_demo.run(output, query or cli_demo.QUERIES)
    cli_demo.show(result, cli_show.new_console())
    return 0 if result.agrees else EXIT_DIFFERS


def build(
    table: Annotated[
        str, typer.Argument(metavar="TABLE", help="The rows: TABLE.npy, TABLE.safetensors or TABLE.safetensors:KEY.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The model to write; a file of that name is replaced.")
    ],
    *,
    two_d: Annotated[bool, typer.Option("--two-d", help="Indices are [B, L], a bag per row; no offsets.")] = False,
    per_sample_weights: Annotated[
        bool, typer.Option("--per-sample-weights", help="The model takes a weight per index; mode sum only.")
    ] = False,
    index_dtype: Annotated[str, choice(("int32", "int64"), "int32 or int64, of indices and offsets.")] = "int64",
    form: AnyForm = "portable",
    opset: Opset = spec.DEFAULT_OPSET,
    external_data: TableBeside = None,
    dtype: Annotated[
        str | None,
        choice(
            SMALLER_DTYPES, "Make the table smaller: quantized values, or 16-bit floats. By default it stays as it is."
        ),
    ] = None,
    no_external_data: Annotated[bool, typer.Option("--no-external-data", hidden=True)] = False,
    **attributes: Any,
) -> None:
    """Make a model of one bag from a table.

    The table is [V, D], of any dtype that `lucid_onnx.embedding_bag` takes. A .npy file has no bfloat16: raw items of
    two bytes, which numpy.save writes for ml_dtypes.bfloat16, are read as bfloat16.

    Example: `lucid-onnx build users.npy -o users.onnx --mode sum --per-sample-weights`
    """
    rows = cli_files.read_table(table)
    cli_files.check_output(output)
    if output.exists() and output.samefile(cli_files.split_key(table)[0]):
        raise UserError(f"--output {output}: is the table itself")
    options: dict[str, Any] = {
        "two_d": two_d,
        "per_sample_weights": per_sample_weights,
        "index_dtype": index_dtype,
        "form": form,
        "opset": opset,
        **attributes,
    }
    build_smaller = None if dtype is None else rewriting("build_smaller", ".building")
    errors = None
    with cli_files.user_errors(TypeError, ValueError):
        if build_smaller is None:
            model, tables = build_light_model(rows.shape, rows.dtype, **options), {"weight": streamed(rows)}
        else:
            model, tables, errors = build_smaller(rows, dtype, **options)
    external = False if no_external_data else external_data
    with cli_files.user_errors(ValueError), cli_files.writing(output), writing_bar() as progress:
        files = save(model, output, external_data=external, progress=progress, tables=tables)
    cli_show.show_built(files, rows, model, form)
    if errors is not None:
        cli_show.show_smaller(str(dtype), sum(t.nbytes for t in tables.values()), errors)


def run(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The .onnx file.")],
    inputs: Annotated[
        list[str] | None, typer.Option("--input", "-i", metavar="NAME=FILE.npy", help="An input. Repeatable.")
    ] = None,
    texts: Annotated[
        list[str] | None,
        typer.Option("--text", "-t", metavar="TEXT", help="A text, for a model that was imported. Repeatable."),
    ] = None,
    labels: Annotated[
        int | None,
        typer.Option(
            "--labels", metavar="K", help="How many labels of each text, if the model has labels; 1 if not given."
        ),
    ] = None,
    native: Annotated[
        bool | None,
        typer.Option("--native/--no-native", help="Use the native kernels; by default if they are installed."),
    ] = None,
    provider: Annotated[str, choice(PROVIDERS, "cpu or cuda.")] = "cpu",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the outputs: a folder, or FILE.npy for a single output."),
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Show how long each node took, and whether the native kernels ran it.")
    ] = False,
) -> None:
    """Run a model over .npy files, or over texts.

    `--text` is for a model that `lucid-onnx import` wrote, with the file beside it that encodes texts.

    With `--profile` it runs twice, and the times are of the second run. A function is one line for all of its nodes.

    A .npy file has no bfloat16. bfloat16 outputs are written as float32, which is exact. bfloat16 inputs are read from
    float32 if every value is exact in bfloat16, or from raw items of two bytes, as numpy.save writes
    ml_dtypes.bfloat16.

    Example: `lucid-onnx run users.onnx --input indices=ids.npy --input offsets=starts.npy -o pooled.npy`
    """
    if texts and inputs:
        raise UserError("--text: is given with --input, and one excludes the other")
    if labels is not None and not texts:
        raise UserError("--labels: needs --text")
    if labels is not None and labels < 1:
        raise UserError(f"--labels {labels}: must be at least 1")
    files = cli_files.named_files(inputs or [])
    ort = need_onnxruntime()
    isa = _isa() if native is not False else None
    if native and isa is None:
        raise UserError("--native: the native library is not installed")
    with tempfile.TemporaryDirectory(prefix="lucid_onnx") as folder:
        beginning = Path(folder) / "profile" if profile else None
        _run(ort, model, texts or files, labels, isa, provider, output, beginning)


def _run(
    ort: Any,
    model: str,
    given: list[str] | dict[str, str],
    labels: int | None,
    isa: str | None,
    provider: str,
    output: Path | None,
    profile: Path | None,
) -> None:
    """`run` over texts or files, with the beginning of the profile's path; None measures the run as a whole alone."""
    named = None if profile is None else _with_named_nodes(model)
    session = _session(ort, model, model if named is None else named, isa is not None, provider, profile)
    if isinstance(given, list):
        feeds = _text_feeds(session, model, given, labels)
    else:
        feeds = cli_files.read_feeds(session, model, given)
    names = [o.name for o in session.get_outputs()]
    targets = None if output is None else cli_files.targets_of(output, names)
    options = ort.RunOptions()
    options.log_severity_level = 4
    with cli_files.runtime_errors(f"{model}: "):
        if profile is not None:
            session.run(None, feeds, options)
        begin = time.perf_counter()
        results = session.run(None, feeds, options)
        seconds = time.perf_counter() - begin
    arrays = {name: _plain(result) for name, result in zip(names, results, strict=True)}
    table = cli_show.new_table("output", "dtype", "shape", "values")
    for name, result in arrays.items():
        dtype = type(result).__name__
        if isinstance(result, np.ndarray):
            dtype = "string" if result.dtype.kind == "U" else str(result.dtype)
        table.add_row(Text(name), dtype, cli_files.shape_text(np.shape(result)), Text(cli_show.preview(result)))
    if output is not None and targets is not None:
        cli_files.write_arrays(output, {targets[name]: (name, array) for name, array in arrays.items()})
    console = cli_show.new_console()
    console.print(table)
    cli_show.say(console, f"{seconds * 1e3:.3g} ms on {provider}; native kernels: {_who_ran(session, isa)}")
    if named is not None:
        cli_show.show_times(console, node_times(session.end_profiling(), named))
    for name, path in (targets or {}).items():
        as_float32 = " (bfloat16 as float32)" if arrays[name].dtype == spec.BFLOAT16 else ""
        cli_show.say(console, f"wrote {path}{as_float32}")


def _text_feeds(
    session: InferenceSession, model: str, texts: Sequence[str], labels: int | None
) -> dict[str, np.ndarray]:
    """The inputs of a model for texts, of which so many labels are wanted."""
    from lucid_onnx.sources.encoder import TextEncoder

    with cli_files.user_errors(ValueError, ImportError), cli_files.reading_any(model):
        encoder = TextEncoder(model, session=session)
        if labels is not None and not encoder.has_labels:
            raise UserError(f"--labels: {model} has no labels")
        return encoder.feeds(texts, labels)


def _plain(result: Any) -> Any:
    """Strings in an array of their own dtype, not one of objects, which a .npy file cannot have."""
    return result.astype(np.str_) if isinstance(result, np.ndarray) and result.dtype == object else result


def _isa() -> str | None:
    """The instruction set of the native kernels; None if they are not installed."""
    with cli_files.user_errors(OSError, ValueError):
        library = info.library()
    return None if library is None else library.active


def _who_ran(session: InferenceSession, isa: str | None) -> str:
    """What the native kernels ran, and what runs in functions."""
    try:
        ours, functions = session.native_nodes, session.function_nodes
    except ValueError:  # a file that only onnxruntime reads, in its own format
        return "not registered" if isa is None else f"registered ({isa})"
    if isa is None:
        ran = "not registered"
    elif ours:
        ran = f"registered ({isa}), and ran {_count(ours, 'node')}"
    else:
        ran = "nothing to run: the model has no ai.lucid nodes, see `lucid-onnx inspect`"
    return f"{ran}; in functions: {_count(functions, 'node')}" if functions else ran


def _count(names: Sequence[str], what: str) -> str:
    """How many, and the names of a few."""
    few = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {what}{'s' if len(names) > 1 else ''} ({few})"


def _with_named_nodes(model: str) -> onnx.ModelProto:
    """The model, with names by which a profile tells the nodes of functions."""
    cli_files.check_file(model)
    with cli_files.user_errors(ValueError), cli_files.reading(model):
        proto = load(model)
    name_nodes(proto)
    remember_data(proto, ExternalData(model))
    return proto


def _session(
    ort: Any, model: str, source: str | onnx.ModelProto, native: bool, provider: str, profile: Path | None
) -> InferenceSession:
    """A session on ``source``, which is the model that messages name ``model``."""
    from lucid_onnx.runtime.session import InferenceSession

    if provider not in PROVIDERS:
        raise UserError(f"--provider {provider}: is not one of {', '.join(PROVIDERS)}")
    wanted = PROVIDERS[provider]
    if wanted[0] not in ort.get_available_providers():
        raise UserError(f"--provider {provider}: this onnxruntime has no {wanted[0]}: {install_gpu()}")
    cli_files.check_file(model)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    try:
        with cli_files.user_errors(ValueError), cli_files.reading(model), cli_files.runtime_errors(f"{model}: "):
            session = InferenceSession(source, native=native, providers=wanted, session_options=options)
    except UserError as error:
        if native or f"{spec.DOMAIN}:" not in str(error):
            raise
        raise UserError(f"{error} (a model in the native form needs the native library)") from error
    if wanted[0] not in session.get_providers():
        raise UserError(f"--provider {provider}: {wanted[0]} did not start; is CUDA installed?")
    return session
