"""The architecture, kept true: who may import whom, how large a file may grow, no hidden prints."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "qwen_scope"

# Rooms in rows; a room may import rooms of strictly higher (earlier) rows only, through their front door.
ROWS = [
    ["errors"],
    ["files", "stats", "report", "lab"],
    ["sae", "text"],
    ["model"],
    ["steer", "store"],
    ["scope"],
    ["features", "analysis", "train"],
    ["trust", "circuits", "score", "posttrain"],
    ["foundry"],
    ["serve", "cluster", "explorer"],
    ["cli"],
]
ROW = {room: i for i, row in enumerate(ROWS) for room in row}
ALLOWED = {room: {other for other in ROW if ROW[other] < ROW[room]} for room in ROW}
ALLOWED["analysis"] = {"errors", "files", "stats", "report", "text", "store"}
for _room in ALLOWED:
    # The lab is text, read by those who make or measure with it; its bundled weights are data, found by the catalog.
    if _room not in {"text", "train", "foundry", "posttrain", "explorer", "cli"}:
        ALLOWED[_room].discard("lab")

MAX_FILE, MAX_FUNCTION, MAX_ROOT_NAMES = 400, 80, 20

FILES = sorted([*SRC.rglob("*.py"), *SRC.rglob("*.pyi")])


def room_of(path: Path) -> str:
    first = path.relative_to(SRC).parts[0]
    return first.removesuffix(".py").removesuffix(".pyi") if first.endswith((".py", ".pyi")) else first


def imports(path: Path) -> list[tuple[str, int]]:
    """Absolute dotted names of everything of ours that a file imports, relative imports resolved, with the line."""
    package = ("qwen_scope", *path.relative_to(SRC).parent.parts)
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "qwen_scope" and path.name != "__init__.pyi":
                found += [(f"qwen_scope.{alias.name}", node.lineno) for alias in node.names]
            elif node.level and not node.module:
                found += [(f"{module}.{alias.name}", node.lineno) for alias in node.names]
            else:
                found.append((module, node.lineno))
    return [(name, line) for name, line in found if name.split(".")[0] == "qwen_scope"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_imports_go_one_way_through_front_doors(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return
    assert room in ALLOWED, f"a new room, {room!r}: is it needed? If so, write it into ROWS and docs/architecture.md"
    for name, line in imports(path):
        target = name.split(".")[1] if "." in name else None
        if target is None or target == room:
            continue
        assert target in ALLOWED[room], f"{path.name}:{line}: {room} may not import {target}"
        assert name.count(".") == 1, f"{path.name}:{line}: import {name!r} through its front door, qwen_scope.{target}"


def within(room: str) -> dict[str, set[str]]:
    """Which files of a room import which, imports inside functions and for types alone included."""
    files = {
        p.relative_to(SRC).with_suffix("").as_posix(): p for p in FILES if p.suffix == ".py" and room_of(p) == room
    }
    found = {}
    for name, path in files.items():
        targets = {target.removeprefix("qwen_scope.").replace(".", "/") for target, _ in imports(path)}
        found[name] = (targets | names_of(path)) & files.keys() - {name}
    return found


def names_of(path: Path) -> set[str]:
    """Files that a relative import names after `import`, such as `from .kernels import bound`."""
    package = path.relative_to(SRC).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (*package[: len(package) - node.level + 1], *((node.module or "").split(".") if node.module else ()))
            found |= {"/".join((*base, alias.name)) for alias in node.names}
    return found


@pytest.mark.parametrize("room", sorted({room_of(p) for p in FILES} - {"__init__", "__main__", "errors"}))
def test_no_file_of_a_room_imports_itself_through_others(room: str) -> None:
    graph = within(room)
    while free := {name for name, targets in graph.items() if not targets & graph.keys()}:
        graph = {name: targets - free for name, targets in graph.items() if name not in free}
    assert not graph, f"these files import each other in a circle: {', '.join(sorted(graph))}"


@pytest.mark.parametrize("path", [p for p in FILES if p.suffix == ".py"], ids=lambda p: str(p.relative_to(SRC)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < MAX_FUNCTION, f"{path.name}: {node.name} is too long"


@pytest.mark.parametrize("path", [p for p in FILES if p.suffix == ".py"], ids=lambda p: str(p.relative_to(SRC)))
def test_nothing_is_silent_or_loud(path: Path) -> None:
    """No print outside the commands, no broad except, no pickle, no room called utils."""
    assert path.stem not in {"utils", "helpers", "common", "misc"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or (
                isinstance(node.type, ast.Name) and node.type.id in {"Exception", "BaseException"}
            )
            assert not broad or any(isinstance(n, ast.Raise) for n in ast.walk(node)), (
                f"{path.name}:{node.lineno}: broad except"
            )
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print" or room_of(path) == "cli", f"{path.name}:{node.lineno}: print outside cli"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] + [getattr(node, "module", "") or ""]
            assert "pickle" not in names, f"{path.name}:{node.lineno}: pickle"


def test_every_room_is_in_the_picture() -> None:
    text = (SRC.parents[1] / "docs" / "architecture.md").read_text()
    for room in {room_of(p) for p in FILES} - {"__init__", "__main__"}:
        assert f"`{room}`" in text, f"docs/architecture.md does not mention the room {room!r}"


def test_the_root_stays_small() -> None:
    import qwen_scope

    assert len(qwen_scope.__all__) <= MAX_ROOT_NAMES
