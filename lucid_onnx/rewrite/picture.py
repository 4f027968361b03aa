"""The nodes that a bag was written out in, and what became of them, side by side as one SVG."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from xml.sax.saxutils import escape, quoteattr

import onnx

from lucid_onnx.ops.embedding_bag import spec

from .fusion import Fused, FuseReport

_CHARACTER, _LINE, _PAD = 7.2, 18.0, 10.0  # of 12 px text: how wide, how high, and how much room around it
_GAP, _RISE, _MARGIN = 14.0, 34.0, 24.0  # between neighbours, between rows, around everything
_LONGEST = 34  # characters of a name
_STYLE = (
    "text{font:12px ui-monospace,Menlo,Consolas,monospace;fill:#1f2328}"
    ".h{font-weight:600}.t{font-size:15px;font-weight:600}.s{fill:#59636e}"
    ".n{fill:#f6f8fa;stroke:#8c959f}.g{fill:#fff8c5;stroke:#bf8700}.v{fill:#ddf4ff;stroke:#54aeff}"
    ".b{fill:#dafbe1;stroke:#1a7f37;stroke-width:2}.e{fill:none;stroke:#8c959f}"
)


def draw(before: onnx.ModelProto, report: FuseReport, title: str) -> str:
    """An SVG of the bags that `fuse` found in ``before``, bags that are written alike once, and why others stay.

    Args:
        before: the model that was fused; the data of its tensors is not looked at.
        report: what `fuse` made of it.
        title: the picture's, such as the name of the file.
    """
    drawing = _Drawing()
    y = drawing.text(_MARGIN, _MARGIN + _LINE, title, "t")
    y = drawing.text(_MARGIN, y, _summary(report), "s") + _GAP
    for fused, count, old, new in _groups(before, report):
        times = f"{count} times: " if count > 1 else ""
        y = drawing.text(_MARGIN, y, f"{times}{fused.pattern}, {fused.mode}, {fused.where}", "h")
        if old is None or new is None:
            y = drawing.text(_MARGIN, y, f"becomes {fused.op}; it is inside of a branch or a function", "s") + _GAP
            continue
        left, right = _scene(old), _scene(new)
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


def _summary(report: FuseReport) -> str:
    if not report.fused and not report.unfused:
        return "nothing to fuse"
    found = len(report.fused)
    return f"{found} bag{'s' * (found != 1)} to fuse; left as it is: {len(report.unfused)}"


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


def _groups(before: onnx.ModelProto, report: FuseReport) -> list[tuple[Fused, int, _Part | None, _Part | None]]:
    """Bags that were written alike: the first one, how many they are, and its nodes before and after."""
    found: dict[Any, list[Any]] = {}
    pairs = dict(_pairs(before, report.model))
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


# ---- Where they stand.


@dataclasses.dataclass
class _Box:
    """A node, or a value, and where it stands within its scene; ``inner``: what is drawn inside of it."""

    label: str
    kind: str
    reads: list[str]
    makes: list[str]
    inner: list[_Scene] = dataclasses.field(default_factory=list)
    x: float = 0.0
    y: float = 0.0

    @property
    def width(self) -> float:
        own = len(self.label) * _CHARACTER + 2 * _PAD
        return max(own, sum(s.width + _PAD for s in self.inner) + _PAD) if self.inner else own

    @property
    def height(self) -> float:
        return _LINE + _PAD + (max(s.height for s in self.inner) + _PAD if self.inner else 0)


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
                drawing.edge(*start, x + box.x + box.width / 2, y + box.y)
        for box in self.boxes:
            drawing.box(x + box.x, y + box.y, box)
            at = x + box.x + _PAD
            for scene in box.inner:
                scene.paint(drawing, at, y + box.y + _LINE + _PAD)
                at += scene.width + _PAD


def _scene(part: _Part) -> _Scene:
    boxes = [_Box(_short(name), "v" if held else "n v", [], [name]) for name, held in part.inputs.items()]
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
        for box in row:
            box.x, box.y = x, y
            x += box.width + _GAP
        y += max(b.height for b in row) + _RISE
    return _Scene(boxes, width, max(y - _RISE, 0.0))


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST // 2 - 1]}…{name[-_LONGEST // 2 :]}"


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
        radius = box.height / 2 if "v" in box.kind else 4
        shape = f'x="{x:.1f}" y="{y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}" rx="{radius:.1f}"'
        self._elements.append(f'<rect {shape} class="{box.kind}"/>')
        at = x + (_PAD if box.inner else box.width / 2)
        anchor = "" if box.inner else ' text-anchor="middle"'
        self._elements.append(f'<text x="{at:.1f}" y="{y + _LINE:.1f}"{anchor}>{escape(box.label)}</text>')

    def edge(self, x: float, y: float, to_x: float, to_y: float) -> None:
        half = (y + to_y) / 2
        path = f"M{x:.1f} {y:.1f}C{x:.1f} {half:.1f} {to_x:.1f} {half:.1f} {to_x:.1f} {to_y:.1f}"
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
