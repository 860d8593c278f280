"""`qwen-scope`: the commands."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Annotated, Any

import typer

from . import output
from .commands import App, Group, Lazy, described

# By heading, in the order of the help: the module of this package with a function, or an `app` of several commands,
# for each command. `eval` is a word of Python's.
HEADINGS = {
    "First steps": ("demo", "lab", "catalog", "plan"),
    "Features of a text": ("features", "compare", "find", "lens", "why", "show", "card", "match", "explore"),
    "Features of a corpus": ("extract", "store", "label", "export", "analyze", "classify", "synthesize"),
    "Steering": ("steer", "sweep", "validate", "serve"),
    "SAEs and training": ("train", "eval", "score", "convert", "posttrain"),
}
MODULES = {"eval": "evaluate"}


class Program(Group):
    """All commands; a module is imported when its command is read, or the list of them."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = Lazy([name for names in HEADINGS.values() for name in names], self._built)

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)

    def summaries(self, ctx: Any) -> Iterator[tuple[str, str, str]]:
        """Heading, name and first sentence of each command, without its options, which take a while to read."""
        for heading, names in HEADINGS.items():
            for name in names:
                yield heading, name, described(_found(name))

    def _built(self, name: str) -> Any:
        one = App()
        found = _found(name)
        if isinstance(found, App):
            one.add_typer(found, name=name)
            return typer.main.get_group(one).commands[name]
        one.command(name)(found)
        return typer.main.get_command(one)


def _found(name: str) -> Any:
    """The function of a command, or the `App` of several."""
    module = MODULES.get(name, name)
    inside = import_module(f"{__package__}.{module}")
    return getattr(inside, "app", None) or getattr(inside, module)


app = App(
    cls=Program,
    name="qwen-scope",
    help="Look into, steer and train Qwen models through sparse autoencoders. Start with: qwen-scope demo",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def say_version(asked: bool) -> bool:
    """Print the version and end the command if it was `asked` for."""
    if asked:
        import qwen_scope

        output.write(f"qwen-scope {qwen_scope.__version__}\n")
        raise typer.Exit
    return asked


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=say_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...
