"""A hook of mkdocs: the page of the command line, made of the commands themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

PAGE = "commands.md"


def on_files(files: Any, config: Any) -> Any:
    """Add the generated page to the site."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, PAGE, content=page()))
    return files


def page() -> str:
    """Every command with its help, as it is typed in a terminal."""
    import click
    import typer

    from qwen_scope.cli.app import app

    parts = ["# Command line", "Every command with what `--help` says of it."]
    for path, command in commands(typer.main.get_command(app), ()):
        context = click.Context(command, info_name=" ".join(("qwen-scope", *path)), max_content_width=100)
        parts += [f"## {' '.join(path)}", f"```text\n{command.get_help(context).rstrip()}\n```"]
    return "\n\n".join(parts) + "\n"


def commands(group: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The commands of a group and of the groups in it, with their names."""
    for name in group.list_commands(None):
        command = group.get_command(None, name)
        if hasattr(command, "list_commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command
