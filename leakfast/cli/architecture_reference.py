"""The drawing of the rooms and who imports whom, made from the imports: `python -m leakfast.cli.architecture_reference`
prints the table, `--check docs/architecture.md` compares, `--write docs/architecture.md` puts it between the marks of that
page and draws img/rooms.svg beside it. Reads the sources alone; a room is a package or module of leakfast/."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path

from leakfast.cli import pages

MARK, DRAWING = "rooms", Path("img", "rooms.svg")
PACKAGE = Path(__file__).resolve().parents[1]
DOORS = {"", "__main__"}  # the package's own opening: it imports its rooms when they are asked for
Graph = Mapping[str, Mapping[str, int]]  # room → room it imports → how many of its files do


def rooms(package: Path = PACKAGE) -> dict[str, dict[str, int]]:
    """Room → the rooms it imports, inside functions too, and in how many of its files. Imports for type checkers alone
    do not count."""
    files = {_module(path, package): path for path in sorted(package.rglob("*.py"))}
    graph: dict[str, dict[str, int]] = {_room(module): {} for module in files if _room(module) not in DOORS}
    for module, path in files.items():
        here = _room(module)
        if here in DOORS:
            continue
        for other in sorted({_room(m) for m in _imports(path, files)} - DOORS - {here}):
            graph[here][other] = graph[here].get(other, 0) + 1
    return graph


def floors(graph: Graph) -> list[list[str]]:
    """The rooms by height, from the bottom: a room stands one floor above the highest that it imports. Raises ValueError
    where rooms import each other in a circle."""
    height: dict[str, int] = {}

    def climb(room: str, path: tuple[str, ...]) -> int:
        if room in path:
            raise ValueError(f"rooms import each other: {' → '.join([*path[path.index(room) :], room])}")
        if room not in height:
            height[room] = max((climb(other, (*path, room)) + 1 for other in graph[room]), default=0)
        return height[room]

    for room in graph:
        climb(room, ())
    return [sorted(r for r in graph if height[r] == n) for n in range(max(height.values(), default=-1) + 1)]


def direct(graph: Graph) -> list[tuple[str, str]]:
    """(room, room it imports) without those that also follow from others: a → c where a → b → c."""
    below: dict[str, set[str]] = {}
    for room in (room for level in floors(graph) for room in level):
        below[room] = set(graph[room]).union(*(below[other] for other in graph[room]))
    return [
        (room, other)
        for room in graph
        for other in graph[room]
        if not any(other in below[between] for between in graph[room])
    ]


def table(graph: Graph, package: Path = PACKAGE) -> str:
    """The rooms from the top floor to the bottom, Markdown."""
    rows = []
    levels = floors(graph)
    for number in range(len(levels) - 1, -1, -1):
        for room in levels[number]:
            named = f"`{room}{'/' if (package / room).is_dir() else '.py'}`"
            rows.append(
                (str(number), named, said(room, package), ", ".join(f"`{r}`" for r in sorted(graph[room])))
            )
    return pages.table(["floor", "room", "what lives there", "imports"], rows)


def said(room: str, package: Path = PACKAGE) -> str:
    """The first sentence of a room's docstring."""
    path = package / room / "__init__.py"
    tree = ast.parse((path if path.is_file() else package / f"{room}.py").read_text(encoding="utf-8"))
    text = " ".join((ast.get_docstring(tree) or "").split())
    return text.partition(". ")[0].removesuffix(".")


WIDTH, HIGH, GAP, SIDE, TOP = 124, 30, 34, 20, 14  # of a box, between floors, beside and above the drawing


def drawing(graph: Graph) -> str:
    """The rooms as SVG, bottom floor below; arrows that follow from others are left out."""
    levels, lines = _arranged(graph), direct(graph)
    across = max(map(len, levels))
    wide, tall = 2 * SIDE + across * (WIDTH + 16) - 16, 2 * TOP + len(levels) * (HIGH + GAP) - GAP
    at = {}
    for number, level in enumerate(levels):
        left = (wide - len(level) * (WIDTH + 16) + 16) / 2
        for place, room in enumerate(level):
            at[room] = (left + place * (WIDTH + 16), TOP + (len(levels) - 1 - number) * (HIGH + GAP))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {tall}" width="{wide}" height="{tall}" role="img">',
        "<title>Rooms of leakfast; each imports from floors below its own</title>",
        "<style>rect{fill:#fff;stroke:#555}path{fill:none;stroke:#7a8fb5;stroke-width:1.2}"
        "text{font:13px sans-serif;fill:#222;text-anchor:middle}</style>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<polygon points="0,0 8,4 0,8" fill="#7a8fb5"/></marker></defs>',
    ]
    for room, other in lines:
        (x, y), (to, down) = at[room], at[other]
        x, y, to = x + WIDTH / 2, y + HIGH, to + WIDTH / 2
        bend = (down - y) / 2
        curve = f"M{x:g},{y:g} C{x:g},{y + bend:g} {to:g},{down - bend:g} {to:g},{down:g}"
        parts.append(f'<path d="{curve}" marker-end="url(#tip)"/>')
    for room, (x, y) in at.items():
        parts.append(f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HIGH}" rx="5"/>')
        parts.append(f'<text x="{x + WIDTH / 2:g}" y="{y + 20:g}">{escape(room)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _arranged(graph: Graph) -> list[list[str]]:
    """The floors, each in an order that keeps rooms near those they import and are imported by."""
    levels, lines = floors(graph), direct(graph)
    near: dict[str, set[str]] = {room: set() for room in graph}
    for room, other in lines:
        near[room].add(other)
        near[other].add(room)
    for turn in range(12):
        place = {room: (n + 0.5) / len(level) for level in levels for n, room in enumerate(level)}
        for level in levels if turn % 2 == 0 else levels[::-1]:
            mean = {r: sum(place[o] for o in near[r]) / len(near[r]) if near[r] else place[r] for r in level}
            level.sort(key=lambda room: (round(mean[room], 9), room))
            place |= {room: (n + 0.5) / len(level) for n, room in enumerate(level)}
    return levels


def _module(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _room(module: str) -> str:
    return [*module.split("."), ""][1]


def _imports(path: Path, files: Mapping[str, Path]) -> Iterator[str]:
    """The modules of ours that a file imports."""
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"), str(path))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            pending += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in files)
        elif isinstance(node, ast.ImportFrom) and node.module in files:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in files else str(node.module)
        pending += ast.iter_child_nodes(node)


def main(argv: list[str]) -> int:
    """Print the table, or check or write the page and the drawing; 1 when the check fails."""
    graph, name = rooms(), "leakfast.cli.architecture_reference"
    if not argv:
        return pages.main(argv, lambda: table(graph), name)
    page = Path(argv[1])
    text = pages.between(page.read_text(encoding="utf-8"), table(graph), MARK)
    return pages.settle(argv[0], {page: text, page.parent / DRAWING: drawing(graph)}, name, page)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
