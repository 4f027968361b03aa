"""A model around its bags, and the nodes that `fuse` found a bag in, as one SVG."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import heapq
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from xml.sax.saxutils import escape, quoteattr

import onnx
from onnx import helper

from lucid_onnx.ops import OPERATOR_OF
from lucid_onnx.ops.embedding_bag import spec

from .fusion import Fused, FuseReport

_CHARACTER, _LINE, _PAD = 7.2, 18.0, 10.0  # of 12 px text: how wide, how high, and how much room around it
_GAP, _RISE, _MARGIN = 14.0, 34.0, 24.0  # between neighbours, between rows, around everything
_LONGEST = 34  # characters of a name
# What is drawn node by node: a bag's nodes before it was fused, with those in subgraphs; a model's nodes; bags.
_MOST_WRITTEN, _MOST_SINGLE, _MOST_BAGS = 40, 16, 6
_MOST_VALUES = 3  # that the same nodes read
_STYLE = (
    "text{font:12px ui-monospace,Menlo,Consolas,monospace;fill:#1f2328}"
    ".h{font-weight:600}.t{font-size:15px;font-weight:600}.s{fill:#59636e}"
    ".n{fill:#f6f8fa;stroke:#8c959f}.g{fill:#fff8c5;stroke:#bf8700}.v{fill:#ddf4ff;stroke:#54aeff}"
    ".w{fill:#fbefff;stroke:#c297ff}.b{fill:#dafbe1;stroke:#1a7f37;stroke-width:2}.e{fill:none;stroke:#8c959f}"
)


def draw(before: onnx.ModelProto, report: FuseReport, title: str) -> str:
    """An SVG of where the bags of a model are and what feeds them, and of the nodes that `fuse` found them in.

    The model comes first, with its bags as nodes of ``ai.lucid``; a large model is folded around them. Each bag that
    was found follows, before and after: bags that are written alike once, and many nodes as their number. Last comes
    what only looks like a bag, and why. The same model gives the same bytes.

    Args:
        before: the model that was fused; the data of its tensors is not read.
        report: the result of `fuse`.
        title: the title of the picture, such as the name of the file.
    """
    drawing = _Drawing()
    pairs = dict(_pairs(before, report.model))
    y = drawing.text(_MARGIN, _MARGIN + _LINE, title, "t")
    y = drawing.text(_MARGIN, y, _summary(report, before), "s") + _GAP
    whole = _whole(report.model, {new.nodes[0].output[0]: _counted(old.nodes) for old, new in pairs.values()})
    if whole is not None:
        folded, scene = whole
        heading = "the model, with its bags fused" if report.fused else "the model"
        y = drawing.text(_MARGIN, y, f"{heading}{', folded around its bags' if folded else ''}", "h") - _LINE / 2
        scene.paint(drawing, _MARGIN, y)
        drawing.width = max(drawing.width, _MARGIN + scene.width)
        y += scene.height + 2 * _LINE
    for fused, count, old, new in _groups(report, pairs):
        times = f"{count} times: " if count > 1 else ""
        y = drawing.text(_MARGIN, y, f"{times}{fused.pattern}, {fused.mode}, {fused.where}", "h")
        if old is None or new is None:
            y = drawing.text(_MARGIN, y, f"becomes {fused.op}; it is inside of a branch or a function", "s") + _GAP
            continue
        left, right = _scene(old, fused), _scene(new)
        middle = _MARGIN + left.width + 90
        drawing.text(_MARGIN, y, f"before: {_counted(old.nodes)}", "s")
        y = drawing.text(middle, y, f"after: {_counted(new.nodes)}", "s") - _LINE / 2
        height = max(left.height, right.height)
        left.paint(drawing, _MARGIN, y)
        right.paint(drawing, middle, y)
        drawing.arrow(_MARGIN + left.width + 20, middle - 20, y + right.height / 2)
        drawing.width = max(drawing.width, middle + right.width)
        y += height + 2 * _LINE
    for unfused in report.unfused:
        y = drawing.text(_MARGIN, y, f"left as it is: {unfused.where}, which looks like {unfused.pattern}", "h")
        for line in _wrapped(unfused.reason, 110):
            y = drawing.text(_MARGIN, y, line, "s")
        y += _GAP
    return drawing.svg(y, title)


def _summary(report: FuseReport, before: onnx.ModelProto) -> str:
    own = sum(n.domain == spec.DOMAIN for n in _deep(before.graph.node))
    own += sum(n.domain == spec.DOMAIN for f in before.functions if f.domain != spec.DOMAIN for n in _deep(f.node))
    said = [f"{own} {spec.DOMAIN} node{'s' * (own != 1)}"] if own else []
    found = len(report.fused)
    if report.fused or report.unfused:
        said.append(f"{found} bag{'s' * (found != 1)} to fuse; left as it is: {len(report.unfused)}")
    else:
        said.append("nothing to fuse")
    return "; ".join(said)


def _counted(nodes: Sequence[onnx.NodeProto]) -> str:
    """How many nodes there are, with those in subgraphs; constants do not count."""
    count = sum(1 for n in _deep(nodes) if n.op_type != "Constant")
    return f"{count} node{'s' * (count != 1)}"


def _deep(nodes: Sequence[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for graph in _subgraphs(node):
            yield from _deep(graph.node)


def _subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [a.g for a in node.attribute if a.HasField("g")]


# ---- Which nodes.


class _Part(NamedTuple):
    """Nodes of a graph in order, and what they read from around them: names, and whether each is a tensor held."""

    nodes: list[onnx.NodeProto]
    inputs: dict[str, bool]


def _groups(
    report: FuseReport, pairs: Mapping[str, tuple[_Part, _Part]]
) -> list[tuple[Fused, int, _Part | None, _Part | None]]:
    """Bags that were written alike: the first one, how many they are, and its nodes before and after."""
    found: dict[Any, list[Any]] = {}
    for fused in report.fused:
        old, new = pairs.get(fused.where, (None, None))
        written = () if old is None else tuple(n.op_type for n in _deep(old.nodes))
        group = found.setdefault((fused.pattern, fused.op, fused.mode, written), [fused, 0, old, new])
        group[1] += 1
    return [(fused, count, old, new) for fused, count, old, new in found.values()]


def _pairs(before: onnx.ModelProto, after: onnx.ModelProto) -> Iterator[tuple[str, tuple[_Part, _Part]]]:
    """By where a bag was: its nodes of the main graph, and those in their place."""
    held = {t.name for t in (*before.graph.initializer, *after.graph.initializer)}
    held |= {n.output[0] for n in (*before.graph.node, *after.graph.node) if n.op_type == "Constant"}
    makers = {name: node for node in before.graph.node for name in node.output}
    readers = {name: node for node in after.graph.node for name in node.input}
    for node in after.graph.node:
        if node.domain != spec.DOMAIN:
            continue
        new = [node]
        if node.output[0] not in makers and node.output[0] in readers:  # an axis that is put back
            new.append(readers[node.output[0]])
        last = makers.get(new[-1].output[0])
        if last is None or last.domain == spec.DOMAIN:
            continue
        bounds = set(node.input)
        old = _behind(last, makers, bounds)
        where = f"node {last.name or next(n for n in last.output if n)!r} ({last.op_type})"
        yield where, (_Part(old, _read(old, held, bounds)), _Part(new, _read(new, held, bounds)))


def _behind(last: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto], bounds: set[str]) -> list[onnx.NodeProto]:
    """What a node is computed by, back to ``bounds``, in an order in which each stands behind what it reads."""
    ordered: list[onnx.NodeProto] = []
    seen: set[int] = set()

    def visit(node: onnx.NodeProto) -> None:
        if id(node) in seen:
            return
        seen.add(id(node))
        for name in _reads(node):
            if name in makers and name not in bounds:
                visit(makers[name])
        ordered.append(node)

    visit(last)
    return ordered


def _reads(node: onnx.NodeProto) -> list[str]:
    """Names that a node reads, those that its subgraphs read from outside too."""
    names = [name for name in node.input if name]
    for graph in _subgraphs(node):
        own = {v.name for v in graph.input} | {t.name for t in graph.initializer}
        for inner in graph.node:
            names += [name for name in _reads(inner) if name not in own]
            own.update(inner.output)
        names += [v.name for v in graph.output if v.name not in own]
    return list(dict.fromkeys(names))


def _read(nodes: Sequence[onnx.NodeProto], held: set[str], bounds: set[str]) -> dict[str, bool]:
    """What nodes read that none of them makes; of tensors that the model holds only those that the bag reads, too."""
    made = {name for node in nodes for name in node.output}
    names = dict.fromkeys(name for node in nodes for name in _reads(node) if name not in made)
    return {name: name in held for name in names if name not in held or name in bounds}


# ---- The model around its bags.


@dataclasses.dataclass(eq=False)
class _Vertex:
    """Nodes of the main graph that are drawn as one box; ``bag``: each is a bag, or holds bags inside."""

    nodes: list[onnx.NodeProto]
    bag: bool


def _whole(model: onnx.ModelProto, replaced: Mapping[str, str]) -> tuple[bool, _Scene] | None:
    """The main graph with its bags, and whether it is folded; None if there is no bag in it.

    Args:
        model: the model.
        replaced: what a bag took the place of, by the name of its output: how many nodes.
    """
    graph = model.graph
    nodes = [n for n in graph.node if n.op_type != "Constant"]
    held = {t.name: list(t.dims) for t in graph.initializer}
    count_of = _bag_counter(model.functions)
    bags = {id(n): count for n in nodes if (count := count_of(n))}
    if not bags:
        return None
    folded = len(nodes) > _MOST_SINGLE or len(bags) > _MOST_BAGS
    vertices = _fold(nodes, bags) if folded else [_Vertex([n], id(n) in bags) for n in nodes]
    constants = {name for n in graph.node if n.op_type == "Constant" for name in n.output}
    boxes = []
    readers: dict[str, list[int]] = {}
    for k, vertex in enumerate(vertices):
        made = {name for n in vertex.nodes for name in n.output if name}
        reads = list(dict.fromkeys(name for n in vertex.nodes for name in _reads(n) if name not in made))
        label, notes = _bag_text(vertex.nodes, bags, replaced) if vertex.bag else _nodes_text(vertex.nodes)
        kind = "b" if vertex.bag else "g" if len(vertex.nodes) > 1 else "n"
        boxes.append(_Box(label, kind, reads, sorted(made), notes=notes))
        for name in reads:
            if name not in held or vertex.bag:
                readers.setdefault(name, []).append(k)
    tables = {name for name, ks in readers.items() if name in held and any(vertices[k].bag for k in ks)}
    inputs = [v.name for v in graph.input if v.name not in held and v.name in readers]
    values = _values(inputs, readers, "inputs", "v", {})
    values += _values([t for t in held if t in tables], readers, "tables", "v w", held)
    values.sort(key=lambda box: readers[box.makes[0]])  # near what reads them
    makers = {name: k for k, box in enumerate(boxes) for name in box.makes}
    outputs: dict[int, list[str]] = {}
    for value in graph.output:
        if value.name in makers and value.name not in constants:
            outputs.setdefault(makers[value.name], []).append(value.name)
    ends = []
    for names in outputs.values():
        label, notes = _listed(names, "outputs", {})
        ends.append(_Box(label, "v", names[:1], [], notes=notes))
    return folded, _arranged(_in_order([*values, *boxes, *ends]))


def _bag_counter(functions: Sequence[onnx.FunctionProto]) -> Callable[[onnx.NodeProto], int]:
    """How many bags a node is, has in its subgraphs, or has in the function that it calls."""
    bodies = {(f.domain, f.name): f.node for f in functions}
    known: dict[tuple[str, str], int] = {}

    def count(node: onnx.NodeProto) -> int:
        if node.domain == spec.DOMAIN:
            return 1
        called = node.domain, node.op_type
        if called in bodies and called not in known:
            known[called] = sum(count(n) for n in bodies[called])
        return known.get(called, 0) + sum(count(n) for graph in _subgraphs(node) for n in graph.node)

    return count


def _fold(nodes: Sequence[onnx.NodeProto], bags: Mapping[int, int]) -> list[_Vertex]:
    """Vertices of a large graph: bags alike, and the nodes that are between the same kinds of bags.

    Bags are alike if their attributes are equal and they follow the same kinds of bags. Where that leaves too many
    kinds, only the mode counts, and then only the operator. Two vertices never read each other, directly or not.
    """
    makers = {name: k for k, n in enumerate(nodes) for name in n.output if name}
    above = [sorted({makers[name] for name in _reads(n) if name in makers}) for n in nodes]
    sorted_nodes = _topological(above)
    for key in (_attributes_text, _mode_text, lambda node: ""):
        kinds: dict[Any, int] = {}
        kind: dict[int, int] = {}
        behind: dict[int, frozenset[int]] = {}  # the kinds of bags that a node follows
        for k in sorted_nodes:
            follows = frozenset[int]().union(*(behind[i] | ({kind[i]} if i in kind else frozenset()) for i in above[k]))
            behind[k] = follows
            if id(nodes[k]) in bags:
                node = nodes[k]
                alike = node.domain, node.op_type, key(node), bags[id(node)], follows
                kind[k] = kinds.setdefault(alike, len(kinds))
        if len(kinds) <= _MOST_BAGS:
            break
    ahead: dict[int, set[int]] = {k: set() for k in sorted_nodes}  # and those that follow it
    for k in reversed(sorted_nodes):
        for i in above[k]:
            ahead[i] |= ahead[k] | ({kind[k]} if k in kind else set())
    found: dict[Any, _Vertex] = {}
    for k in sorted_nodes:
        name = (kind[k],) if k in kind else (behind[k], frozenset(ahead[k]))
        found.setdefault(name, _Vertex([], k in kind)).nodes.append(nodes[k])
    return list(found.values())


def _topological(above: Sequence[Sequence[int]]) -> list[int]:
    """Numbers in an order in which each stands behind those that it names, the lowest first."""
    below: list[list[int]] = [[] for _ in above]
    for k, ones in enumerate(above):
        for i in ones:
            below[i].append(k)
    waiting = [len(ones) for ones in above]
    ready = [k for k, count in enumerate(waiting) if not count]
    ordered = []
    while ready:
        k = heapq.heappop(ready)
        ordered.append(k)
        for i in below[k]:
            waiting[i] -= 1
            if not waiting[i]:
                heapq.heappush(ready, i)
    return ordered


def _in_order(boxes: list[_Box]) -> list[_Box]:
    makers = {name: k for k, box in enumerate(boxes) for name in box.makes}
    above = [sorted({makers[n] for n in box.reads if n in makers} - {k}) for k, box in enumerate(boxes)]
    return [boxes[k] for k in _topological(above)]


def _mode_text(node: onnx.NodeProto) -> str:
    (mode,) = [a.i for a in node.attribute if a.name == "mode" and a.type == onnx.AttributeProto.INT] or (-1,)
    return spec.MODES[mode] if 0 <= mode < len(spec.MODES) else ""


def _attributes_text(node: onnx.NodeProto) -> str:
    """The mode, and what is not as usual; the mode alone of a node whose attributes are not valid."""
    changed = ""
    if node.op_type in OPERATOR_OF:
        attributes = OPERATOR_OF[node.op_type].spec.Attributes
        with contextlib.suppress(TypeError, ValueError):
            changed = attributes.from_onnx({a.name: helper.get_attribute_value(a) for a in node.attribute}).changed
    return ", ".join(part for part in (_mode_text(node), changed) if part)


def _bag_text(
    nodes: Sequence[onnx.NodeProto], bags: Mapping[int, int], replaced: Mapping[str, str]
) -> tuple[str, list[str]]:
    """Label and notes of bags alike."""
    first = nodes[0]
    times = f"{len(nodes)} x " if len(nodes) > 1 else ""
    if first.domain != spec.DOMAIN:
        count = bags[id(first)]
        return f"{times}{first.op_type}", [f"{count} {spec.DOMAIN} node{'s' * (count != 1)} inside"]
    notes = list(dict.fromkeys(_attributes_text(n) for n in nodes))
    notes = [note for note in notes if note] if len(notes) <= 2 else [f"attributes of {len(notes)} kinds"]
    was = list(dict.fromkeys(replaced[n.output[0]] for n in nodes if n.output[0] in replaced))
    if was:
        notes.append(f"was {was[0]}{' each' * (len(nodes) > 1)}" if len(was) == 1 else "was nodes of several counts")
    return times + first.op_type, notes


def _nodes_text(nodes: Sequence[onnx.NodeProto]) -> tuple[str, list[str]]:
    """Label and notes of nodes that are not bags."""
    ops = collections.Counter(n.op_type for n in nodes)
    if len(nodes) == 1:
        inner = sum(1 for n in _deep(nodes) if n.op_type != "Constant") - 1
        return nodes[0].op_type, [f"{inner} node{'s' * (inner != 1)} inside"] if inner else []
    if len(ops) == 1:
        return f"{len(nodes)} x {nodes[0].op_type}", []
    return _counted(nodes), _ops_text(nodes)


def _ops_text(nodes: Sequence[onnx.NodeProto]) -> list[str]:
    """How often each operator is there, the most frequent first, in two lines at most."""
    ops = collections.Counter(n.op_type for n in _deep(nodes) if n.op_type != "Constant")
    common = sorted(ops.items(), key=lambda item: (-item[1], item[0]))
    words = [f"{count} {op}" for op, count in common[:6]]
    rest = sum(count for _, count in common[6:])
    words += [f"{rest} others"] if rest else []
    return [", ".join(words[:4]) + ",", ", ".join(words[4:])] if len(words) > 4 else [", ".join(words)]


def _values(
    names: Sequence[str], readers: Mapping[str, Sequence[int]], what: str, kind: str, dims: Mapping[str, Sequence[int]]
) -> list[_Box]:
    """Boxes of values; more than `_MOST_VALUES` that the same nodes read are one box."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for name in names:
        groups.setdefault(tuple(readers[name]), []).append(name)
    boxes = []
    for group in groups.values():
        parts = [group] if len(group) > _MOST_VALUES else [[name] for name in group]
        for part in parts:
            label, notes = _listed(part, what, dims)
            boxes.append(_Box(label, kind, [], part, notes=notes))
    return boxes


def _listed(names: Sequence[str], what: str, dims: Mapping[str, Sequence[int]]) -> tuple[str, list[str]]:
    """One name, or how many there are, and the first and the last."""
    if len(names) == 1:
        shape = f" {list(dims[names[0]])}" if names[0] in dims else ""
        return _short(names[0]) + shape, []
    return f"{len(names)} {what}", [f"{_short(names[0], 16)} … {_short(names[-1], 16)}"]


# ---- Where they stand.


@dataclasses.dataclass
class _Box:
    """A node, nodes or a value, and its place in the scene: ``notes`` are below its label, ``inner`` is inside."""

    label: str
    kind: str
    reads: list[str]
    makes: list[str]
    inner: list[_Scene] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    x: float = 0.0
    y: float = 0.0
    below: float = 0.0  # where the row of the box ends

    @property
    def width(self) -> float:
        own = max(map(len, (self.label, *self.notes))) * _CHARACTER + 2 * _PAD
        return max(own, sum(s.width + _PAD for s in self.inner) + _PAD) if self.inner else own

    @property
    def height(self) -> float:
        return _LINE * (1 + len(self.notes)) + _PAD + (max(s.height for s in self.inner) + _PAD if self.inner else 0)


@dataclasses.dataclass
class _Scene:
    """Boxes in rows, each below what it reads."""

    boxes: list[_Box]
    width: float
    height: float

    def paint(self, drawing: _Drawing, x: float, y: float) -> None:
        """Draw it with its corner there."""
        makers = {name: box for box in self.boxes for name in box.makes}
        for box in self.boxes:
            for maker in {id(makers[n]): makers[n] for n in box.reads if n in makers and makers[n] is not box}.values():
                start = x + maker.x + maker.width / 2, y + maker.y + maker.height
                drawing.edge(*start, y + maker.below, x + box.x + box.width / 2, y + box.y)
        for box in self.boxes:
            drawing.box(x + box.x, y + box.y, box)
            at = x + box.x + _PAD
            for scene in box.inner:
                scene.paint(drawing, at, y + box.y + _LINE + _PAD)
                at += scene.width + _PAD


def _scene(part: _Part, found: Fused | None = None) -> _Scene:
    """What a part reads, and its nodes; many that a bag was ``found`` in are one box."""
    count = sum(1 for n in _deep(part.nodes) if n.op_type != "Constant")
    if found is not None and count > _MOST_WRITTEN:
        what = f"{found.op} in standard operators" if found.pattern == "standard form" else found.pattern
        made = [name for n in part.nodes for name in n.output if name]
        folded = _Box(f"{count} nodes: {what}", "g", list(part.inputs), made, notes=_ops_text(part.nodes))
        values = [_Box(_short(name), "v w" if held else "v", [], [name]) for name, held in part.inputs.items()]
        return _arranged([*values, folded])
    boxes = [_Box(_short(name), "v w" if held else "v", [], [name]) for name, held in part.inputs.items()]
    return _arranged([*boxes, *_boxes(part.nodes)])


def _boxes(nodes: Sequence[onnx.NodeProto]) -> list[_Box]:
    found = []
    for node in nodes:
        if node.op_type == "Constant":
            continue
        inner = [_arranged(_boxes(graph.node)) for graph in _subgraphs(node)]
        kind = "b" if node.domain == spec.DOMAIN else "g" if inner else "n"
        inner = [scene for scene in inner if scene.boxes]
        found.append(_Box(node.op_type, kind, _reads(node), list(node.output), inner))
    return found


def _arranged(boxes: list[_Box]) -> _Scene:
    """Give the boxes, which stand behind what they read, their places."""
    level: dict[str, int] = {}
    rows: list[list[_Box]] = []
    for box in boxes:
        own = 1 + max((level[name] for name in box.reads if name in level), default=-1)
        level.update(dict.fromkeys(box.makes, own))
        rows += [[] for _ in range(own + 1 - len(rows))]
        rows[own].append(box)
    width = max((sum(b.width for b in row) + _GAP * (len(row) - 1) for row in rows), default=0.0)
    makers = {name: box for box in boxes for name in box.makes}
    y = 0.0
    for k, row in enumerate(rows):
        if k:  # below what they read, as far as that goes

            def middle(box: _Box) -> float:
                above = [makers[n].x + makers[n].width / 2 for n in box.reads if n in makers and makers[n] is not box]
                return sum(above) / len(above) if above else width / 2

            row.sort(key=middle)
        x = (width - sum(b.width for b in row) - _GAP * (len(row) - 1)) / 2
        height = max(b.height for b in row)
        for box in row:
            box.x, box.y, box.below = x, y, y + height
            x += box.width + _GAP
        y += height + _RISE
    return _Scene(boxes, width, max(y - _RISE, 0.0))


def _short(name: str, longest: int = _LONGEST) -> str:
    return name if len(name) <= longest else f"{name[: longest // 2 - 1]}…{name[-longest // 2 :]}"


def _wrapped(text: str, length: int) -> Iterator[str]:
    line = ""
    for word in text.split():
        if line and len(line) + len(word) >= length:
            yield line
            line = ""
        line = f"{line} {word}" if line else word
    yield line


# ---- Ink.


class _Drawing:
    """The elements of a picture, from the bottom up."""

    def __init__(self) -> None:
        self.width = 0.0
        self._elements: list[str] = []

    def text(self, x: float, y: float, text: str, kind: str) -> float:
        """A line of text; gives the next one's place."""
        self._elements.append(f'<text x="{x:.1f}" y="{y:.1f}" class={quoteattr(kind)}>{escape(text)}</text>')
        self.width = max(self.width, x + len(text) * (_CHARACTER if kind != "t" else 9.2))
        return y + _LINE + 4

    def box(self, x: float, y: float, box: _Box) -> None:
        radius = min(box.height, _LINE + _PAD) / 2 if "v" in box.kind else 4
        shape = f'x="{x:.1f}" y="{y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}" rx="{radius:.1f}"'
        self._elements.append(f'<rect {shape} class="{box.kind}"/>')
        at = x + (_PAD if box.inner else box.width / 2)
        anchor = "" if box.inner else ' text-anchor="middle"'
        self._elements.append(f'<text x="{at:.1f}" y="{y + _LINE:.1f}"{anchor}>{escape(box.label)}</text>')
        for k, note in enumerate(box.notes, 2):
            self._elements.append(f'<text x="{at:.1f}" y="{y + k * _LINE:.1f}"{anchor} class="s">{escape(note)}</text>')

    def edge(self, x: float, y: float, below: float, to_x: float, to_y: float) -> None:
        half = (below + to_y) / 2
        down = f"V{below:.1f}" if below > y else ""
        path = f"M{x:.1f} {y:.1f}{down}C{x:.1f} {half:.1f} {to_x:.1f} {half:.1f} {to_x:.1f} {to_y:.1f}"
        self._elements.append(f'<path d="{path}" class="e" marker-end="url(#a)"/>')

    def arrow(self, x: float, to_x: float, y: float) -> None:
        path = f"M{x:.1f} {y:.1f}H{to_x:.1f}"
        self._elements.append(f'<path d="{path}" class="e" stroke-width="3" marker-end="url(#a)"/>')

    def svg(self, height: float, title: str) -> str:
        """The picture whole."""
        size = f"{self.width + _MARGIN:.0f}", f"{height + _MARGIN:.0f}"
        head = '<path d="M0 0L8 4L0 8z" fill="#8c959f"/>'
        return "\n".join(
            itertools.chain(
                [
                    f'<svg xmlns="http://www.w3.org/2000/svg" width="{size[0]}" height="{size[1]}" '
                    f'viewBox="0 0 {size[0]} {size[1]}" role="img">',
                    f"<title>{escape(title)}</title>",
                    f"<style>{_STYLE}</style>",
                    '<defs><marker id="a" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" '
                    f'markerUnits="userSpaceOnUse" orient="auto">{head}</marker></defs>',
                    f'<rect width="{size[0]}" height="{size[1]}" fill="#ffffff"/>',
                ],
                self._elements,
                ["</svg>", ""],
            )
        )
