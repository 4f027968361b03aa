"""The passes over an exported graph. None of them changes a value: not a bit of a result, nor the sign of a zero.

onnxscript's own `optimize` also takes a constant within 1e-8 of 0 for 0, and one within 1e-5 of 1 for 1, so that
``x + 1e-8`` becomes ``x``. It makes one Cast of two, splits five columns into three and two where the module has two
and three, and folds batch normalization into weights. None of that is done here.
"""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript import optimizer, rewriter
from onnxscript.rewriter.rules import common as rules

#: Rules that move elements or drop a node that does nothing, whatever the elements are.
_EXACT_RULES = (
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.no_op_transpose_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.squeeze_reshape_1d_rule,
    rules.flatten_to_reshape_rule,  # before the next one, which reads what it writes
    rules.reshape_reshape_rule,
    rules.materialize_reshape_shape_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.no_op_dynamic_scatter_nd_rule,
    rules.no_op_static_scatter_nd_rule,
)
#: Operators that move elements.
_MOVES = {"Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Reshape", "Shape", "Size"}
_MOVES |= {"Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"}
#: Operators that are exact over whole numbers and booleans.
_WHOLE = {"Abs", "Add", "And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min", "Mul", "Neg"}
_WHOLE |= {"Not", "Or", "Range", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum", "Sub", "Where"}
#: Conversions that round once, to nearest, on every runtime. float64 to 16 bits is not among them: some round twice.
_ROUNDED_ONCE = frozenset(
    {
        (ir.DataType.DOUBLE, ir.DataType.FLOAT),
        (ir.DataType.FLOAT, ir.DataType.FLOAT16),
        (ir.DataType.FLOAT, ir.DataType.BFLOAT16),
    }
)


def simplify(model: ir.Model) -> None:
    """Inline functions, fold what is constant, and drop what does nothing or is there twice; in place."""
    common.InlinePass()(model)
    for _ in range(2):  # a rule makes constants, and a constant makes a rule match
        fold_constants(model, shape_inference=True)
        rewriter.RewritePass(_EXACT_RULES)(model)
        for unused in (
            common.RemoveUnusedNodesPass(),
            common.RemoveUnusedFunctionsPass(),
            common.RemoveUnusedOpsetsPass(),
        ):
            unused(model)
    _join_splits(model)
    tidy(model)


def _join_splits(model: ir.Model) -> None:
    """Give a Concat what a Split splits, in place, where it has all pieces of it in their order over the same axis."""
    for concat in [n for n in model.graph.all_nodes() if n.domain == "" and n.op_type == "Concat"]:
        inputs = list(concat.inputs)
        for value in list(dict.fromkeys(inputs)):
            split = None if value is None else value.producer()
            if split is None or split.domain != "" or split.op_type != "Split" or value is not split.outputs[0]:
                continue
            whole, pieces, k = split.inputs[0], list(split.outputs), inputs.index(value)
            if inputs[k : k + len(pieces)] == pieces and _axis(split, whole) == _axis(concat, whole):
                inputs[k : k + len(pieces)] = [whole]
        if len(inputs) == len(concat.inputs) or concat.graph is None:
            continue
        new = ir.node("Concat", inputs, {"axis": concat.attributes["axis"].as_int()}, name=concat.name)
        if len(inputs) == 1:
            new = ir.node("Identity", inputs, name=concat.name)
        ir.convenience.replace_nodes_and_values(concat.graph, concat, [concat], [new], concat.outputs, new.outputs)
    common.IdentityEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)


def _axis(node: ir.Node, value: ir.Value | None) -> int | None:
    """The axis of a Split or Concat of a value, counted from the first; None if the value's rank is not known."""
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    if axis >= 0:
        return axis
    return None if value is None or value.shape is None else axis + len(value.shape)


def tidy(model: ir.Model) -> None:
    """Make constants initializers, one of what is there twice, and names where there are none; in place."""
    for exact in (
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    ):
        exact(model)


def restore_doubles(model: ir.Model) -> None:
    """Give the float64 constants of a module their own value, in place: torch's exporter rounds them to float32."""
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for node in list(itertools.chain.from_iterable(ir.traversal.RecursiveGraphIterator(g) for g in graphs)):
        made = node.meta.get("node")
        if node.domain != "" or node.op_type != "Cast" or node.attributes["to"].as_int() != ir.DataType.DOUBLE:
            continue
        if not isinstance(made, torch.fx.Node) or made.target is not torch.ops.aten.scalar_tensor.default:
            continue
        if isinstance(made.args[0], float) and node.graph is not None:
            exact = ir.node("Constant", [], {"value": ir.tensor(made.args[0], dtype=ir.DataType.DOUBLE)})
            ir.convenience.replace_nodes_and_values(node.graph, node, [node], [exact], node.outputs, exact.outputs)


def fold_constants(model: ir.Model, *, shape_inference: bool = False) -> None:
    """Compute what is constant, in place, where every runtime computes the same bits. ONNX Runtime folds the rest."""
    optimizer.fold_constants_ir(model, onnx_shape_inference=shape_inference, should_fold=_folds)


def _folds(node: ir.Node) -> bool | None:
    """None, which leaves it to onnxscript's limits of size, for what is exact; False for all else."""
    if node.domain != "":
        return False
    if node.op_type in _MOVES:
        return None
    if node.op_type in _WHOLE:
        types = {value.dtype for value in node.inputs if value is not None}
        return None if all(t is not None and (t.is_integer() or t == ir.DataType.BOOL) for t in types) else False
    if node.op_type == "Cast":
        return None if _casts_exactly(node) else False
    return False


def _casts_exactly(node: ir.Node) -> bool:
    tensor = node.inputs[0].const_value if node.inputs[0] is not None else None
    target = ir.DataType(node.attributes["to"].as_int())
    if tensor is None or tensor.size > 8192 or tensor.dtype.is_string() or target.is_string():
        return False
    if (tensor.dtype, target) in _ROUNDED_ONCE:
        return True
    array = tensor.numpy()
    with np.errstate(all="ignore"):
        return bool(np.array_equal(array.astype(target.numpy()).astype(array.dtype), array))
