"""What all commands share: help in groups with examples, errors in the command line's words."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextvars import ContextVar
from inspect import Parameter, Signature, getdoc
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from qwen_scope.errors import InputError, QwenScopeError

from . import names, output, tables
from .examples import EXAMPLES, broken

LATE = "qwen_scope.late"
TABLE = "out"
TABLE_OUT = Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE", help=tables.HELP)]
# The command that is running.
_RUNNING: ContextVar[Any] = ContextVar("running", default=None)


class Command(TyperCommand):
    """A command whose help ends with examples."""

    _late: tuple[str, ...] | None = None
    writes_table = False
    """Whether `--out` is ours: the function behind the command knows nothing of it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        named = [one.name for one in self.params]
        if "as_json" in named and "out" not in named:
            self.writes_table = True
            self.params += parameters([Parameter(TABLE, Parameter.KEYWORD_ONLY, default=None, annotation=TABLE_OUT)])

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """The examples, below the options; they are never wrapped by words."""
        if lines := EXAMPLES.get(path_of(ctx)):
            formatter.write_paragraph()
            formatter.write("Examples:\n" if len(lines) > 1 else "Example:\n")
            for line in lines:
                formatter.write("".join(f"  {part}\n" for part in broken(line)))

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters, with those that are known only now that this command is the one that is read."""
        late = getattr(self.callback, "late", None)
        if late is not None and self._late is None:
            found = parameters(late())
            self._late = tuple(one.name for one in found)
            self.params += found
        return super().get_params(ctx)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; what its errors say of parameters becomes its options."""
        # The function behind the command knows nothing of these; `late_values` tells them.
        ctx.meta[LATE] = {name: ctx.params.pop(name) for name in self._late or () if name in ctx.params}
        table: Path | None = ctx.params.pop(TABLE) if self.writes_table else None
        token = _RUNNING.set(ctx)
        try:
            with names.fresh():
                if table is None:
                    return super().invoke(ctx)
                if ctx.params.get("as_json"):
                    raise InputError(
                        f"--json prints instead of tables; for a file as well, leave it out of --out {table}"
                    )
                with output.table_file(table):
                    return super().invoke(ctx)
        except QwenScopeError as error:
            flags = {str(one.name): one.opts[0] for one in self.params if one.param_type_name == "option"}
            error.args = (in_options(str(error), flags),)
            raise
        finally:
            _RUNNING.reset(token)


class Group(TyperGroup):
    """Commands listed under the headings that they are registered with, each with its whole first sentence."""

    def summaries(self, ctx: Any) -> Iterator[tuple[str, str, str]]:
        """Heading, name and first sentence of each command, in the order of registration."""
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            heading = getattr(command, "rich_help_panel", None)
            yield heading if isinstance(heading, str) else "Commands", name, command.get_short_help_str(limit=1000)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The commands by heading."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for heading, name, text in self.summaries(ctx):
            panels.setdefault(heading, []).append((name, text))
        for heading, rows in panels.items():
            with formatter.section(heading):
                formatter.write_dl(rows)


class Shown(Group):
    """A group whose command `show` is what is meant where no command is named: its argument stands in the place."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The words behind the group's name, `show` before them unless they begin with a command or ask for help."""
        named = args[:1] and (args[0] in self.commands or args[0] in self.get_help_option_names(ctx))
        return super().parse_args(ctx, args if named or not args else ["show", *args])


class Lazy(MutableMapping[str, Any]):
    """Commands by name, each built when it is first asked for."""

    def __init__(self, names: Sequence[str], build: Callable[[str], Any]) -> None:
        self._names, self._build = dict.fromkeys(names), build
        self._built: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._built:
            self._built[name] = self._build(name)
        return self._built[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._names[name], self._built[name] = None, command

    def __delitem__(self, name: str) -> None:
        del self._names[name]
        self._built.pop(name, None)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class App(typer.Typer):
    """A Typer whose commands are of our class."""

    def __init__(self, *, cls: type[TyperGroup] = Group, **options: Any) -> None:
        super().__init__(
            cls=cls, rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False, **options
        )

    def command(self, name: str | None = None, **options: Any) -> Callable[[Any], Any]:
        """Register a function as a command."""
        return super().command(name, **{"cls": Command, **options})


def described(found: Any) -> str:
    """The first sentence of the help of a command's function, or of an `App`."""
    text = found.info.help if isinstance(found, App) else getdoc(found)
    return Command(name="", help=text).get_short_help_str(limit=1000)


def parameters(given: Sequence[Parameter]) -> list[Any]:
    """Parameters of a function as those of a command."""

    def command(**_: Any) -> None: ...

    command.__annotations__ = {one.name: one.annotation for one in given}
    setattr(command, "__signature__", Signature(given))  # noqa: B010  # a function's type has no such attribute
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(command)
    return typer.main.get_command(app).params


def late_values() -> dict[str, Any]:
    """What was typed for the options that the running command learnt of last; None for those left out."""
    ctx = running()
    return {} if ctx is None else ctx.meta.get(LATE, {})


def path_of(ctx: Any) -> str:
    """The names of a command below the program's, such as `posttrain sft`."""
    names = []
    at: Any = ctx
    while at.parent is not None:
        names.append(at.info_name)
        at = at.parent
    return " ".join(reversed(names))


def in_options(message: str, flags: dict[str, str]) -> str:
    """A message in which Python's parameters are written as the options of a command.

    `sae=` becomes `--sae`, `chat='default'` `--chat default` and `truncate=True` `--truncate`; a number after the sign
    is a statement, such as `k=50`, and stays.
    """

    def option(match: re.Match[str]) -> str:
        flag = flags.get(match["name"])
        if flag is None:
            return match[0]
        return f"{flag} {match['value']}" if match["value"] else flag

    return re.sub(r"(?<![^\s('\"])(?P<name>[a-z_]+)=(?:'(?P<value>[^']+)'|True\b|(?![\w'\"\[({.\-]))", option, message)


def running() -> Any:
    """The context of the command that is running, or None; Typer's own class differs between its versions."""
    return _RUNNING.get()
