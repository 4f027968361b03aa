"""Write the conformance suite and the example models, the same bytes every time.

    python models/make.py [--check]

``models/conformance`` follows the layout of ONNX's own backend tests: a folder per case with ``model.onnx`` (the
node and its function) and ``test_data_set_0/{input_0.pb, ..., output_0.pb}``; and for each case a twin
``<case>_expanded`` whose model is the same thing in standard operators alone. ``--check`` writes nothing and fails
if what is there differs.
"""

from __future__ import annotations

import argparse
import filecmp
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from lucid_onnx.builder import CODES_TYPES, TABLE_TYPES
from lucid_onnx.builder.conformance import case_model
from lucid_onnx.ops import OPERATORS

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import examples  # noqa: E402  # a neighbour, found beside this file

_TYPES = {**TABLE_TYPES, **CODES_TYPES, np.dtype(np.int32): TensorProto.INT32, np.dtype(np.int64): TensorProto.INT64}


def tensor(name: str, array: np.ndarray) -> onnx.TensorProto:
    return TensorProto(name=name, data_type=_TYPES[array.dtype], dims=array.shape, raw_data=array.tobytes())


def write_conformance(folder: Path) -> int:
    """Every case of every operator under ``folder``; returns how many folders were written."""
    count = 0
    for operator in OPERATORS.values():
        for case in operator.cases.suite().values():
            for form, suffix in (("portable", ""), ("standard", "_expanded")):
                model = case_model(case, form)
                data = folder / (case.name + suffix) / "test_data_set_0"
                data.mkdir(parents=True)
                (data.parent / "model.onnx").write_bytes(model.SerializeToString(deterministic=True))
                for k, (name, array) in enumerate(case.inputs.items()):
                    (data / f"input_{k}.pb").write_bytes(tensor(name, array).SerializeToString(deterministic=True))
                expected = case.expected()
                outputs = expected if isinstance(expected, tuple) else (expected,)
                for k, (name, array) in enumerate(zip(case.op.outputs, outputs, strict=True)):
                    (data / f"output_{k}.pb").write_bytes(tensor(name, array).SerializeToString(deterministic=True))
                count += 1
    return count


def write_examples(folder: Path) -> int:
    folder.mkdir(parents=True)
    for name, build in examples.MODELS.items():
        (folder / f"{name}.onnx").write_bytes(build().SerializeToString(deterministic=True))
    return len(examples.MODELS)


def differences(a: Path, b: Path) -> list[str]:
    """The files that differ between two folders, or are in one of them only."""
    files = {p.relative_to(root) for root in (a, b) for p in root.rglob("*") if p.is_file()}
    return sorted(
        str(f) for f in files if not ((a / f).is_file() and (b / f).is_file() and filecmp.cmp(a / f, b / f, False))
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with what is there and write nothing")
    check = parser.parse_args().check
    changed = []
    with tempfile.TemporaryDirectory() as temporary:
        for name, write in (("conformance", write_conformance), ("examples", write_examples)):
            made = Path(temporary) / name
            count = write(made)
            size = sum(p.stat().st_size for p in made.rglob("*") if p.is_file())
            print(f"{name}: {count} models, {size / 2**20:.2f} MiB")
            if check:
                changed += [f"{name}/{f}" for f in differences(made, HERE / name)]
            else:
                shutil.rmtree(HERE / name, ignore_errors=True)
                shutil.copytree(made, HERE / name)
    for line in changed:
        print("differs:", line)
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
