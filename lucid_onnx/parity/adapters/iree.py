"""IREE: compiled for this CPU by its LLVM backend, run on its task system."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from lucid_onnx.parity.runtime import Program


class _Iree:
    def missing(self) -> str | None:
        for package, module in (("iree-base-compiler", "iree.compiler"), ("iree-base-runtime", "iree.runtime")):
            if importlib.util.find_spec("iree") is None or importlib.util.find_spec(module) is None:
                return f"{package} is not installed: pip install 'lucid-onnx[parity]'"
        return None

    def version(self) -> str:
        return importlib.metadata.version("iree-base-compiler")

    def load(self, program: Program) -> Any:
        import iree.compiler
        import iree.runtime
        from iree.compiler.tools import compile_file
        from iree.compiler.tools.import_onnx import __main__ as importer

        with tempfile.TemporaryDirectory(prefix="lucid-onnx-parity") as folder:
            source, mlir = os.path.join(folder, "model.onnx"), os.path.join(folder, "model.mlir")
            with open(source, "wb") as file:
                file.write(program.model)
            if importer.main(importer.parse_arguments([source, "-o", mlir])):
                raise RuntimeError("the importer of ONNX models failed")
            module = compile_file(
                mlir,
                input_type="onnx",
                target_backends=["llvm-cpu"],
                extra_args=["--iree-llvmcpu-target-cpu=host"],
            )
        context = iree.runtime.SystemContext(config=iree.runtime.Config("local-task"))
        context.add_vm_module(iree.runtime.VmModule.copy_buffer(context.instance, module))
        functions = context.modules.module
        (name,) = (n for n in functions.vm_module.function_names if not n.startswith("__") and "$" not in n)
        return functions[name]

    def run(self, loaded: Any, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        results = loaded(*inputs.values())
        results = results if isinstance(results, (list, tuple)) else [results]
        return [np.asarray(result) for result in results]


RUNTIME = _Iree()
