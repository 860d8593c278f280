"""Command lines as the program's parser reads them, without running anything."""

from __future__ import annotations

import shlex
from typing import Any

import typer

from qwen_scope.cli.app import app

PROGRAM: Any = typer.main.get_command(app)


def walk(command: Any, path: tuple[str, ...] = ()) -> dict[str, Any]:
    """Every command by its path, groups and the program among them."""
    found = {" ".join(path): command}
    if hasattr(command, "list_commands"):
        for name in command.list_commands(None):
            found |= walk(command.get_command(None, name), (*path, name))
    return found


COMMANDS = walk(PROGRAM)
LEAVES = [path for path, command in COMMANDS.items() if not hasattr(command, "list_commands")]


def context(line: str) -> Any:
    """What the parser makes of a line that begins with `qwen-scope`; it fails where the parser refuses."""
    words = shlex.split(line, comments=True)
    assert words[0] == "qwen-scope", line
    path, rest = "", words[1:]
    while rest and f"{path} {rest[0]}".strip() in COMMANDS:
        path, rest = f"{path} {rest[0]}".strip(), rest[1:]
    if path not in LEAVES and f"{path} show" in LEAVES:  # what a group does where no command of it is named
        path = f"{path} show"
    assert path in LEAVES, line
    return COMMANDS[path].make_context(path, list(rest))


def typed(block: str) -> list[str]:
    """The command lines of a block of Markdown, each as one line without its comment."""
    lines = block.replace("\\\n", " ").splitlines()
    return [" ".join(line.split(" #")[0].split()) for line in lines if line.strip() and not line.startswith("#")]
