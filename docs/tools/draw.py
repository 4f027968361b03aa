"""Draw the pictures of the documentation again: python docs/tools/draw.py

before-after.svg is what ``lucid-onnx inspect --svg`` draws of a bag that torch exported; it needs torch. parity.svg is
the first table of docs/parity.md, which is what ``lucid-onnx parity --markdown`` wrote. (grid.png is drawn by
benchmarks/grid.py.)
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from xml.sax.saxutils import escape

DOCS = Path(__file__).resolve().parent.parent
_ROW, _BAR, _LABEL, _WIDTH, _TOP = 22, 14, 330, 760, 54
#: The columns of the report that are drawn together, what they are called, and their colour.
_KINDS = (
    (("equal",), "equal", "#2da44e"),
    (("differs", "unsteady"), "different", "#bf8700"),
    (("refused", "rejected", "unsupported"), "rejected", "#cf222e"),
    (("crashed", "hung"), "crashed or hung", "#24292f"),
    (("left out", "not run"), "not run", "#d0d7de"),
)


def parity(report: str) -> str:
    """An SVG of a report in Markdown: for each runtime and form, how many cases ended how."""
    lines = [line for line in report.splitlines() if line.startswith("|")]
    head = _cells(lines[0])
    bars = []
    for line in lines[2:]:
        cells = dict(zip(head, _cells(line), strict=False))
        if cells["runtime"] == head[0]:  # the next table
            break
        if cells.get("form", "") in ("portable", "standard", "native", "call"):
            counts = [sum(int(cells.get(c) or 0) for c in columns) for columns, *_ in _KINDS]
            bars.append((f"{cells['runtime']}, {cells['form']}", counts))
    height = _TOP + _ROW * len(bars) + 8
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        'role="img" font-family="system-ui, sans-serif" font-size="13" fill="#1f2328">',
        "<title>Cases of the conformance suite by runtime, form and result</title>",
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    x = _LABEL - 90
    for _, name, colour in _KINDS:
        out.append(
            f'<rect x="{x}" y="16" width="12" height="12" fill="{colour}"/><text x="{x + 17}" y="27">{name}</text>'
        )
        x += 34 + 7 * len(name)
    scale = (_WIDTH - _LABEL - 12) / max(sum(counts) for _, counts in bars)
    for k, (label, counts) in enumerate(bars):
        y = _TOP + _ROW * k
        out.append(f'<text x="{_LABEL - 10}" y="{y + 12}" text-anchor="end">{escape(label)}</text>')
        x = float(_LABEL)
        for count, (_, name, colour) in zip(counts, _KINDS, strict=True):
            if count:
                width = count * scale
                out.append(
                    f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_BAR}" fill="{colour}">'
                    f"<title>{count} {name}</title></rect>"
                )
                x += width
    return "\n".join([*out, "</svg>", ""])


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def before_after() -> str:
    """An SVG of a bag as torch's dynamo export writes it, and as `lucid_onnx.fuse` does."""
    import torch

    from lucid_onnx.cli import main

    module = torch.nn.EmbeddingBag(100, 8, mode="sum").eval()
    example = (torch.tensor([3, 1, 4, 1, 5]), torch.tensor([0, 2]))
    with tempfile.TemporaryDirectory() as folder:
        path, picture = Path(folder) / "exported.onnx", Path(folder) / "exported.svg"
        torch.onnx.export(
            module, example, str(path), dynamo=True, dynamic_shapes=({0: "words"}, {0: "bags"}), verbose=False
        )
        if main(["inspect", str(path), "--svg", str(picture)]) != 0:
            raise RuntimeError("lucid-onnx inspect failed")
        return picture.read_text(encoding="utf-8")


def boxes(svg: str) -> list[str]:
    """What the nodes of a picture of `before_after` are called, without its captions."""
    return sorted(re.findall(r"<text [^>]*?(?<!class=\"[hts]\")>([^<]*)</text>", svg))


def pictures() -> Mapping[str, str]:
    """The pictures that need nothing but the files here, by name."""
    return {"parity.svg": parity((DOCS / "parity.md").read_text(encoding="utf-8"))}


def main() -> int:
    for name, picture in {**pictures(), "before-after.svg": before_after()}.items():
        (DOCS / name).write_text(picture, encoding="utf-8")
        print(f"wrote docs/{name}, {len(picture.encode()) / 1000:.1f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
