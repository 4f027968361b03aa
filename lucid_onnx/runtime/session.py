"""Sessions: an onnxruntime.InferenceSession with the native kernels registered, which takes and returns bfloat16."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import tempfile
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import onnx
from onnx import TensorProto, helper

from lucid_onnx.builder import (
    ExternalData,
    data_of,
    functions,
    is_external,
    load,
    remember_data,
    renamed,
    restore_names,
    save_temporarily,
    tensors,
)
from lucid_onnx.ops.attributes import check_choice
from lucid_onnx.ops.embedding_bag.spec import BFLOAT16

from .installation import distributions_problem, load_onnxruntime
from .library import (
    CPU,
    CUDA,
    CUDA_PLUGIN,
    CudaBounds,
    Provider,
    check_provider,
    find_cuda_library,
    get_library_path,
    why_no_cuda,
)
from .placement import Placement, placement

load_onnxruntime()  # an error says what is wrong with it
import onnxruntime as ort  # noqa: E402
from onnxruntime.capi import onnxruntime_pybind11_state as _state  # noqa: E402

_problem = distributions_problem()
if _problem is not None:
    warnings.warn(_problem, RuntimeWarning, stacklevel=2)

#: Where constant tables of 8 MiB and more lie.
TableMemory = Literal["auto", "inplace", "hugepage_copy", "mmap"]
TABLE_MEMORY: tuple[str, ...] = get_args(TableMemory)
#: The session config entries that the library reads, with what they are if nobody sets them.
_TABLE_MEMORY_ENTRY = "lucid.table_memory"
_BOUNDS_ENTRY = "lucid.bounds_check"
_ENTRIES = {_TABLE_MEMORY_ENTRY: "auto", _BOUNDS_ENTRY: "report", "lucid.max_output_bytes": ""}
#: onnxruntime's own entry, from 1.24 on: the folder of the external data of a model that is not a file.
_FOLDER_ENTRY = "session.model_external_initializers_file_folder_path"
_HAS_FOLDER_ENTRY = tuple(int(part) for part in ort.__version__.split(".")[:2]) >= (1, 24)
#: onnxruntime's own entry of a run: "1" does not wait for the device at its end.
_NO_WAIT_ENTRY = "disable_synchronize_execution_providers"
#: Held while a session starts whose options have that entry for its sake alone.
_folder_lock = threading.RLock()

#: Larger models go to onnxruntime by a file: a protobuf message has 2 GiB at most, and is copied on its way.
_LARGEST_IN_MEMORY = 2**30

_BFLOAT16_TYPE = "tensor(bfloat16)"
_FLOAT32_SUFFIX = "__float32"


class _Registration(NamedTuple):
    """What `register` did to a SessionOptions."""

    provider: str
    entries: dict[str, str]


#: By SessionOptions object: onnxruntime fails on a second registration, and does not tell of the first.
_registered: weakref.WeakKeyDictionary[ort.SessionOptions, _Registration] = weakref.WeakKeyDictionary()
_registering = threading.Lock()


def register(
    session_options: ort.SessionOptions, *, provider: Provider = "cpu", table_memory: TableMemory | None = None
) -> None:
    """Register the native kernels on ``session_options``. A second call with the same settings does nothing.

    Args:
        session_options: for any number of sessions, with the session configuration ``lucid.bounds_check``, if any, set
            before this.
        provider: "cpu", or "cuda" for the kernels of CUDAExecutionProvider and those of the CPU.
        table_memory: where constant tables of 8 MiB and more lie. It sets the session config entry
            ``lucid.table_memory``. If it is None, the entry decides, and without an entry "auto" does. onnxruntime
            before 1.24 sees only an entry that was set before this call.

            - "inplace": a table in memory gets huge pages in place; external data, which onnxruntime maps from its
              file, stays in the page cache.
            - "hugepage_copy": external data is copied to huge pages, once for all sessions of the process that read
              the same file. Without memory for it no session starts. Linux only.
            - "mmap": tables stay where they are.
            - "auto": "inplace"; external data is copied too if a quarter of the free memory is left afterwards.

    Raises:
        FileNotFoundError: there is no native library.
        RuntimeError: the library reports an error, for instance that LUCID_FORCE_ISA names an instruction set that
            this machine lacks; or the CUDA kernels cannot run on this machine.
        ValueError: an unknown provider or table_memory; the options were registered with other settings before, which
            onnxruntime cannot change, or by ``register_custom_ops_library``.
    """
    check_provider(provider)
    if table_memory is not None:
        check_choice("table_memory", table_memory, TABLE_MEMORY)
    path = get_library_path()
    if provider == "cuda":
        why = why_no_cuda()
        if why is not None:
            raise RuntimeError(f"provider = 'cuda', but {why}")
        path = find_cuda_library() or path
    with _registering:
        entries = {name: _entry(session_options, name, default) for name, default in _ENTRIES.items()}
        if table_memory is not None:
            entries[_TABLE_MEMORY_ENTRY] = table_memory
        before = _registered.get(session_options)
        if before is not None:
            _check_same(before, _Registration(provider, entries))
            return
        if table_memory is not None:
            session_options.add_session_config_entry(_TABLE_MEMORY_ENTRY, table_memory)
        try:
            session_options.register_custom_ops_library(path)
        except Exception as error:  # onnxruntime has an exception class per status code
            if _ALREADY in str(error):
                raise ValueError(_REGISTERED_ELSEWHERE) from error
            raise RuntimeError(f"{path}: {error}") from error
        _registered[session_options] = _Registration(provider, entries)


#: What onnxruntime says on a second registration: at once, or when the session is created.
_ALREADY = "Domain already set in registry"
_REGISTERED_ELSEWHERE = (
    "the native kernels of lucid_onnx were registered on these session options by register_custom_ops_library: call "
    "lucid_onnx.register in its place, or give the options to onnxruntime.InferenceSession"
)


def _entry(session_options: ort.SessionOptions, name: str, default: str) -> str:
    try:
        return str(session_options.get_session_config_entry(name))
    except Exception:  # it has no other way to ask whether there is one
        return default


def _check_same(before: _Registration, now: _Registration) -> None:
    differences = [
        f"{name} = {before.entries[name]!r} then, {value!r} now"
        for name, value in now.entries.items()
        if value != before.entries[name]
    ]
    if now.provider == "cuda" and before.provider == "cpu":  # the library of CUDA has the kernels of the CPU too
        differences.insert(0, "provider = 'cpu' then, 'cuda' now")
    if differences:
        raise ValueError(
            "the native kernels of lucid_onnx were registered on these session options with other settings "
            f"({'; '.join(differences)}): use a new onnxruntime.SessionOptions"
        )


def _provider(providers: Sequence[Any], options: Sequence[dict[Any, Any]] | None = None) -> Provider:
    """The provider whose kernels a session of these providers needs, "cpu" or "cuda".

    Raises:
        ValueError: one of them is the CUDA provider in its form of a plugin.
    """
    names = [p if isinstance(p, str) else p[0] for p in providers]
    if CUDA_PLUGIN in names:
        raise ValueError(
            f"providers: {CUDA_PLUGIN} is not supported, as lucid_onnx has no kernels for it: use {CUDA}, or "
            "native=False"
        )
    if CUDA not in names or CUDA not in ort.get_available_providers():
        return "cpu"
    at = names.index(CUDA)
    beside = options[at] if options and at < len(options) else {}
    given = beside if isinstance(providers[at], str) else providers[at][1]
    why = why_no_cuda(int(given.get("device_id", 0)))
    if why is None:
        return "cuda"
    warnings.warn(f"the bags of this session run on the CPU: {why}", RuntimeWarning, stacklevel=3)
    return "cpu"


class InferenceSession(ort.InferenceSession):
    """An onnxruntime.InferenceSession that runs ``ai.lucid`` nodes on the native kernels and takes bfloat16.

    It takes onnxruntime's own arguments, by position or by name, and these beside them.

    Args:
        path_or_bytes: a path, the bytes of a model, or an onnx.ModelProto (also one over 2 GiB). What `fuse`, `lower`
            and `quantize` return finds the external data of the file that it was made of, as long as that lies there.
        sess_options: used as given, and registered (see `register`); they serve any number of sessions. Without them
            onnxruntime logs nothing but fatal errors: what is wrong is an exception, with onnxruntime's whole text. Its
            warnings are seen with ``onnxruntime.SessionOptions()``.
        providers: execution providers, by default those that ``sess_options`` has, or ``["CPUExecutionProvider"]``.
            With CUDAExecutionProvider among them the CUDA kernels are registered too. If they cannot run, a
            RuntimeWarning says why. CudaPluginExecutionProvider is rejected.
        provider_options: as onnxruntime's, a dict per provider.
        model: another name of ``path_or_bytes``.
        native: use the native kernels; False runs the function bodies of the model.
        session_options: another name of ``sess_options``.
        table_memory: where large constant tables lie; see `register`. It needs the native kernels.
        **kwargs: passed to onnxruntime.InferenceSession.

    bfloat16 arrays have the dtype ml_dtypes.bfloat16, in feeds and in what `run` returns.

    Raises:
        FileNotFoundError: no such model file, or no native library.
        TypeError: no model, or one argument by both of its names.
        ValueError: an onnx.ModelProto with external data that was not loaded and whose folder is not known, or data
            outside of it; a bad ``table_memory``; options that were registered with other settings.
        RuntimeError: see `register`. A model that onnxruntime rejects raises onnxruntime's own exceptions.
    """

    def __init__(
        self,
        path_or_bytes: str | os.PathLike[str] | bytes | onnx.ModelProto | None = None,
        sess_options: ort.SessionOptions | None = None,
        providers: Sequence[Any] | None = None,
        provider_options: Sequence[dict[Any, Any]] | None = None,
        *,
        model: str | os.PathLike[str] | bytes | onnx.ModelProto | None = None,
        native: bool = True,
        session_options: ort.SessionOptions | None = None,
        table_memory: TableMemory | None = None,
        **kwargs: Any,
    ) -> None:
        model = _one_of(path_or_bytes=path_or_bytes, model=model)
        if model is None:
            raise TypeError("InferenceSession needs a model: path_or_bytes")
        given = _one_of(sess_options=sess_options, session_options=session_options)
        options = _quiet() if given is None else given
        providers = list(providers or ([] if _has_providers(options) else [CPU]))
        bounds = None
        self._asks = False
        if native:
            provider = _provider(providers, provider_options)
            # Otherwise every node of a run waits for the GPU. These options are this session's alone, so that
            # nobody else runs it and does not ask.
            self._asks = provider == "cuda" and given is None
            if self._asks:
                options.add_session_config_entry(_BOUNDS_ENTRY, "run")
            register(options, provider=provider, table_memory=table_memory)
            if _registered[options].provider == "cuda":
                bounds = CudaBounds()
        elif table_memory is not None:
            raise ValueError(
                f"table_memory = {table_memory!r}, but native = False: table_memory needs the native kernels"
            )
        with contextlib.ExitStack() as stack:
            model = _with_our_names(model) if native else model
            source = _source(model, options, given is not None, stack)
            try:
                with bounds or contextlib.nullcontext():
                    super().__init__(source, options, providers or None, provider_options, **kwargs)
            except Exception as error:
                if _ALREADY in str(error):
                    raise ValueError(_REGISTERED_ELSEWHERE) from error
                if isinstance(source, str) and not isinstance(model, (str, os.PathLike)):  # a file for this call alone
                    raise type(error)(str(error).replace(source, "the model")) from None
                if isinstance(model, bytes) and _names_data(str(error), model):
                    raise ValueError(f"{error} (the bytes of a model do not say where it is: give its path)") from error
                raise
        if native and CUDA_PLUGIN in self.get_providers():  # which options may choose that do not name it here
            warnings.warn(
                f"the bags of this session run on the CPU: lucid_onnx has no kernels for {CUDA_PLUGIN}",
                RuntimeWarning,
                stacklevel=2,
            )
        self._cuda_bounds = bounds
        self._placement: Callable[[], Placement] = functools.cache(_placing(model, native))
        self._bfloat16 = any(v.type == _BFLOAT16_TYPE for v in (*self.get_inputs(), *self.get_outputs()))

    @property
    def native_nodes(self) -> tuple[str, ...]:
        """The ``ai.lucid`` nodes that run on the native kernels, by name, or by first output without one.

        There are none with ``native=False``, and in a model that nobody fused. The model is looked through when this is
        first asked; a file is read again, without its external data.

        Raises:
            OSError, ValueError: the file of the model cannot be read any more.
        """
        return self._placement().native

    @property
    def function_nodes(self) -> tuple[str, ...]:
        """The nodes that a function of the model runs, in standard operators; named and found as `native_nodes`."""
        return self._placement().functions

    def get_inputs(self) -> list[Any]:
        """As onnxruntime's: name, type and shape of each input."""
        inputs = super().get_inputs()
        if not _NEEDS_FLOAT32_INPUTS:
            return list(inputs)
        return [
            _Input(i.name.removesuffix(_FLOAT32_SUFFIX), _BFLOAT16_TYPE, i.shape)
            if i.name.endswith(_FLOAT32_SUFFIX)
            else i
            for i in inputs
        ]

    def run(
        self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any], run_options: Any = None
    ) -> list[Any]:
        """As onnxruntime's, with bfloat16 arrays in and out."""
        if not self._bfloat16:
            with self._asking(run_options):
                return super().run(output_names, input_feed, run_options)  # type: ignore[no-any-return]
        # onnxruntime's own run does not support bfloat16; values with an explicit element type do.
        binding = self.io_binding()
        kept = []
        for name, array in input_feed.items():
            array = np.ascontiguousarray(array)
            if array.dtype != BFLOAT16:
                binding.bind_cpu_input(name, array)
            elif _NEEDS_FLOAT32_INPUTS:
                binding.bind_cpu_input(name + _FLOAT32_SUFFIX, array.astype(np.float32))
            else:
                value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), TensorProto.BFLOAT16)
                binding.bind_ortvalue_input(name, value)
                kept.append((array, value))
        for name in output_names or [o.name for o in self.get_outputs()]:
            binding.bind_output(name, "cpu")
        self.run_with_iobinding(binding, run_options)
        return [_to_numpy(value) for value in binding.get_outputs()]

    def run_with_iobinding(self, iobinding: Any, run_options: Any = None) -> None:
        """As onnxruntime's."""
        with self._asking(run_options):
            super().run_with_iobinding(iobinding, run_options)

    def run_with_ort_values(
        self, output_names: Sequence[str] | None, input_dict_ort_values: Mapping[str, Any], run_options: Any = None
    ) -> list[Any]:
        """As onnxruntime's."""
        with self._asking(run_options):
            return super().run_with_ort_values(  # type: ignore[no-any-return]
                output_names, input_dict_ort_values, run_options
            )

    def run_with_ortvaluevector(self, run_options: Any, *arguments: Any) -> None:
        """As onnxruntime's."""
        with self._asking(run_options):
            super().run_with_ortvaluevector(run_options, *arguments)

    def run_async(
        self,
        output_names: Sequence[str] | None,
        input_feed: Mapping[str, Any],
        callback: Callable[[Any, Any, str], None],
        user_data: Any,
        run_options: Any = None,
    ) -> None:
        """As onnxruntime's."""

        def then(results: Any, data: Any, error: str) -> None:
            found = "" if self._cuda_bounds is None else self._cuda_bounds.of_run(wait=bool(error))[1]
            callback(results, data, error or found)

        super().run_async(output_names, input_feed, then if self._asks else callback, user_data, run_options)

    def check_bounds(self) -> None:
        """Raise if the GPU has found a bad offset or index that no run has reported: of replays of a CUDA graph.

        A replay of a recorded graph runs no node, so nothing else reports what it found; memory is safe all the same.
        With the session config entry ``lucid.bounds_check`` = ``deferred`` it also covers the last run. It waits for
        the GPU, and must not be called while a CUDA graph is being recorded. On the CPU every run has reported already.

        Raises:
            InvalidArgument: onnxruntime's own exception, with the operator and the text that a run would have raised.
        """
        if self._cuda_bounds is not None:
            _raise(*self._cuda_bounds.of_all())

    @contextlib.contextmanager
    def _asking(self, run_options: Any) -> Iterator[None]:
        """Around a run, which ends when the device has: raises what its nodes have recorded."""
        if not self._asks or self._cuda_bounds is None:
            yield
            return
        try:
            yield
        except BaseException:
            self._cuda_bounds.of_run(wait=True)  # or a later run on this thread would report what this one recorded
            raise
        _raise(*self._cuda_bounds.of_run(wait=_runs_on(run_options)))

    def run_dlpack(
        self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any], run_options: Any = None
    ) -> list[ort.OrtValue]:
        """Run without copies on tensors of torch, cupy or NumPy, on the CPU or a GPU.

        Args:
            input_feed: contiguous tensors with ``__dlpack__``, by input name.

        Returns:
            An onnxruntime.OrtValue per output, on the GPU if the session has CUDAExecutionProvider. It has
            ``__dlpack__`` too: ``torch.from_dlpack(value)`` is its memory as a tensor.

        Raises:
            TypeError: an input without ``__dlpack__``, with its name.
            RuntimeError: this onnxruntime does not support DLPack.
        """
        if not hasattr(ort.OrtValue, "from_dlpack"):
            raise RuntimeError(f"onnxruntime {ort.__version__} does not support DLPack")
        binding = self.io_binding()
        kept = []
        for name, tensor in input_feed.items():
            if not hasattr(tensor, "__dlpack__"):
                raise TypeError(f"input {name!r} is a {type(tensor).__name__}, which has no __dlpack__")
            kept.append(ort.OrtValue.from_dlpack(tensor))
            binding.bind_ortvalue_input(name, kept[-1])
        gpu = CUDA in self.get_providers()
        device = int(self.get_provider_options()[CUDA].get("device_id", 0)) if gpu else 0
        for name in output_names or [o.name for o in self.get_outputs()]:
            binding.bind_output(name, "cuda" if gpu else "cpu", device)
        # onnxruntime computes on its own stream; the inputs are made and the outputs are read on others.
        binding.synchronize_inputs()
        self.run_with_iobinding(binding, run_options)
        binding.synchronize_outputs()
        return list(binding.get_outputs())


class _Input(NamedTuple):
    """An input, with the attributes of onnxruntime's NodeArg."""

    name: str
    type: str
    shape: list[Any]


#: onnxruntime before 1.20 takes no bfloat16 from Python. There such an input becomes a float32 one with a Cast behind
#: it, which is exact.
_NEEDS_FLOAT32_INPUTS = not hasattr(ort.OrtValue, "ortvalue_from_numpy_with_onnx_type")


def _raise(code: int, text: str) -> None:
    """Raise what the CUDA library found, as onnxruntime does; nothing for code 0."""
    if code:
        raise (_state.InvalidArgument if code == 1 else _state.RuntimeException)(text)


def _runs_on(run_options: Any) -> bool:
    """Whether a run ends before the device has finished."""
    if run_options is None:
        return False
    try:
        return str(run_options.get_run_config_entry(_NO_WAIT_ENTRY)) == "1"
    except Exception:  # it has no other way to ask whether there is one
        return False


def _quiet() -> ort.SessionOptions:
    """Options of a session that logs no errors, which are raised, and no warnings about functions of a model."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return options


def _one_of(**given: Any) -> Any:
    """The argument that was given, of two names for the same."""
    values = {name: value for name, value in given.items() if value is not None}
    if len(values) > 1:
        raise TypeError(f"InferenceSession got {' and '.join(values)}, which are the same argument")
    return next(iter(values.values()), None)


def _placing(model: str | os.PathLike[str] | bytes | onnx.ModelProto, native: bool) -> Callable[[], Placement]:
    """What finds the placement of a model's nodes, and does not hold its tables."""
    if isinstance(model, onnx.ModelProto):
        found = placement(model, native=native)
        return lambda: found
    if isinstance(model, bytes):  # which onnxruntime's session holds as well
        return lambda: placement(onnx.load_from_string(model), native=native)
    path = os.path.abspath(model)
    return lambda: placement(load(path), native=native)


def _with_our_names(model: str | os.PathLike[str] | bytes | onnx.ModelProto) -> Any:
    """The model; in a copy, if a tool gave our functions other names, by which onnxruntime finds no kernels of ours."""
    if isinstance(model, onnx.ModelProto):
        if not renamed(model.functions):
            return model
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        restore_names(copy)
        remember_data(copy, data_of(model))
        return copy
    if not isinstance(model, bytes) and not os.path.isfile(model):
        return model
    if not renamed(functions(model)):
        return model
    if isinstance(model, bytes):
        copy = onnx.ModelProto.FromString(model)
        restore_names(copy)
        return copy
    copy = load(model)
    remember_data(copy, ExternalData(model))
    return copy


def _source(
    model: str | os.PathLike[str] | bytes | onnx.ModelProto,
    options: ort.SessionOptions,
    shared: bool,
    stack: contextlib.ExitStack,
) -> str | bytes:
    """What onnxruntime's session takes for a model.

    Args:
        shared: the options are not this session's alone, and must be as before when ``stack`` is closed.
    """
    if isinstance(model, (str, os.PathLike)):
        model = os.fspath(model)
        if not os.path.isfile(model):
            raise FileNotFoundError(f"{model}: no such model file")
    if isinstance(model, onnx.ModelProto) and not _entry(options, _FOLDER_ENTRY, "") and _refers(model):
        model = _with_data(model, options, shared, stack)
    if _NEEDS_FLOAT32_INPUTS:
        model = _with_float32_inputs(model)
    if not isinstance(model, onnx.ModelProto):
        return model
    if sum(len(t.raw_data) for t in model.graph.initializer) < _LARGEST_IN_MEMORY or _refers(model):
        return model.SerializeToString()
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="lucid_onnx"))
    path = os.path.join(folder, "model.onnx")
    save_temporarily(model, path)
    return path


def _has_providers(options: ort.SessionOptions) -> bool:
    """Whether somebody chose providers on the options themselves, which older releases cannot do."""
    return hasattr(options, "has_providers") and bool(options.has_providers())


def _refers(model: onnx.ModelProto) -> bool:
    """Whether a model has external data."""
    return any(is_external(tensor) for tensor in tensors(model))


def _names_data(message: str, content: bytes) -> bool:
    """Whether a message names a file of external data of a model."""
    try:
        model = onnx.load_from_string(content)
    except Exception:  # the message is about that; the error's class depends on protobuf's release
        return False
    names = {
        e.value for tensor in tensors(model) if is_external(tensor) for e in tensor.external_data if e.key == "location"
    }
    return any(name in message for name in names)


def _with_data(
    model: onnx.ModelProto, options: ort.SessionOptions, shared: bool, stack: contextlib.ExitStack
) -> onnx.ModelProto:
    """A copy of a model that finds its external data: where the file was that the model was read from here.

    onnxruntime gets a folder and real paths below it. A release that takes no folder gets the data itself.
    """
    data = data_of(model)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    external = [tensor for tensor in tensors(copy) if is_external(tensor)]
    if data is None:
        raise ValueError(
            f"initializer {external[0].name!r} is external data that was not loaded: give the session the path of "
            "the model (fuse, lower and quantize write one: output), or use onnx.load first"
        )
    paths = [data.region(tensor)[0] for tensor in external]
    if not _HAS_FOLDER_ENTRY:
        for tensor in external:
            data.read(tensor)
        return copy
    folder = os.path.commonpath([path.parent for path in paths])
    for tensor, path in zip(external, paths, strict=True):
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = path.relative_to(folder).as_posix()
    if shared:
        stack.enter_context(_folder_lock)
        stack.callback(options.add_session_config_entry, _FOLDER_ENTRY, "")
    options.add_session_config_entry(_FOLDER_ENTRY, folder)
    return copy


def _with_float32_inputs(model: str | bytes | onnx.ModelProto) -> str | bytes | onnx.ModelProto:
    if isinstance(model, str):
        light = onnx.load(model, load_external_data=False)
        if any(t.data_location == TensorProto.EXTERNAL for t in light.graph.initializer):
            return model
        proto = light
    else:
        proto = onnx.load_from_string(model) if isinstance(model, bytes) else model
    bfloat16 = [i for i in proto.graph.input if i.type.tensor_type.elem_type == TensorProto.BFLOAT16]
    if not bfloat16:
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    casts = []
    for value in copy.graph.input:
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            casts.append(
                helper.make_node("Cast", [value.name + _FLOAT32_SUFFIX], [value.name], to=TensorProto.BFLOAT16)
            )
            value.name += _FLOAT32_SUFFIX
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    nodes = [*casts, *copy.graph.node]
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    return copy


def _to_numpy(value: Any) -> np.ndarray:
    if value.data_type() != _BFLOAT16_TYPE:
        return np.asarray(value.numpy())
    array = np.empty(value.shape(), BFLOAT16)
    if array.size:
        ctypes.memmove(array.ctypes.data, value.data_ptr(), array.nbytes)
    return array
