"""How others write a bag, in a module for each exporter or origin.

A pattern guesses a bag from a graph, and says how its exporter would write it if it were one. A guess may be careless,
the comparison of the two is not: a pattern yields pairs of a `Bag` and of the expression that its exporter makes of
that bag, and only a graph that is that expression, node for node in normal form, is replaced. A pattern's docstring
says where the meaning of the bag and of the graph differ all the same.

`torch_legacy`, `torch_dynamo`: nn.EmbeddingBag as torch.onnx.export writes it. `aten`: as an ATen node. `unrolled`: a
fixed number of bags, one after another. `tensorflow`: segment operators, as tf2onnx writes them. `gather_reduce`: a
pooled embedding, as anybody may write it; here nothing is compared node for node, but each step keeps its meaning:
`rows` follows what was done to rows, `columns` finds numbers that are the same in all columns, `masks` those that
depend on one index, `truth` the conditions that other masks stand for, and `finite` what a table's numbers are;
`pooled` writes the bag, and `divisors` knows means. `lowered`: our own standard form.
"""

from __future__ import annotations

from .aten import aten
from .bag import Bag, Guess, Pattern, QuantizedBag
from .dequantized import over_codes
from .gather_reduce import GatherReduce
from .lowered import Lowered, QuantizedLowered
from .shared import MODES as REDUCTION_MODES
from .tensorflow import segments
from .torch_dynamo import torch_dynamo
from .torch_legacy import torch_legacy
from .unrolled import unrolled

__all__ = [
    "REDUCTION_MODES",
    "Bag",
    "GatherReduce",
    "Guess",
    "Lowered",
    "Pattern",
    "QuantizedBag",
    "QuantizedLowered",
    "aten",
    "over_codes",
    "segments",
    "torch_dynamo",
    "torch_legacy",
    "unrolled",
]
