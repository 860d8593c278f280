"""How commands print: tables for people, JSON for machines. Whatever is printed passes through here.

What comes from outside (names in files, answers of a server, texts, cells) may hold control codes. They are escaped
here, where a line, a table or a JSON document is printed, and nowhere before; markup is never read.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from qwen_scope.errors import InputError, printable

from . import names, tables
from .lines import lines
from .once import said_elsewhere

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as Drawn
    from rich.text import Text

    from qwen_scope.report import Table
    from qwen_scope.steer import Intervention
    from qwen_scope.store import Context

Report = Callable[[str, float, str], None]

# What JSON lets stand although a terminal may obey it; it occurs inside texts alone, where an escape means the same.
STEERING = re.compile("[\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@final
class Terminal:
    """Standard output, as wide as the terminal and at least readable when piped.

    Attributes:
        is_terminal: whether somebody watches, so that colours are seen.
        width: of a line, in columns.
    """

    def __init__(self) -> None:
        self._console = self._of(None)
        self.is_terminal, self.width = self._console.is_terminal, self._console.width

    def _of(self, width: int | None) -> Console:
        from rich.console import Console

        return Console(highlight=False, soft_wrap=False, width=width)

    def print(self, text: str | Text | Drawn = "", style: str = "", soft_wrap: bool = False) -> None:
        """One or more lines, or a table; control codes are escaped but for the ends of lines.

        Args:
            style: of the whole, such as `bold`.
            soft_wrap: leave it to the terminal where a line breaks, so that a path or a command can be copied whole.
        """
        from rich.table import Table

        from qwen_scope.report import inert

        if isinstance(text, Table):
            # One that can't be narrower is printed as wide as it is: a terminal wraps it, a file holds it whole.
            self._of(max(self.width, text.min_width or 0)).print(text)
        else:
            self._console.print(inert(text, keep="\n"), style=style or None, soft_wrap=soft_wrap)


def console() -> Terminal:
    """Standard output."""
    return Terminal()


def write(text: str) -> None:
    """A piece of text on standard output as it comes, without an end of line."""
    sys.stdout.write(printable(text, keep="\n\t"))
    sys.stdout.flush()


@functools.cache
def errors() -> Console:
    """Standard error; one object, so that a line stands above a spinner that is turning."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def say(message: str) -> None:
    """One line on standard error, above whatever is turning there."""
    if said_elsewhere(message):
        return
    errors().print(printable(message), markup=False, soft_wrap=True)


_held: ContextVar[ExitStack] = ContextVar("_held")


@contextmanager
def command() -> Iterator[None]:
    """Around a whole command: what it holds is let go at its end."""
    with ExitStack() as stack:
        before = _held.set(stack)
        try:
            yield
        finally:
            _held.reset(before)


def hold(out: Path | None, *inputs: str | Path) -> None:
    """Keep the folder that a command writes for it alone until the command ends; nothing where there is none, or where
    tables are written to a file.

    Raises:
        InputError: it is a file, what is read or inside of that, or another process writes to it.
    """
    from qwen_scope.files import lock_folder, not_onto_itself

    if out is None:
        return
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; name a folder, or a new file for the table")
    if tables.is_file(out):
        tables.check(out, *inputs)
        return
    not_onto_itself(out, *inputs)
    _held.get().enter_context(lock_folder(out))


def save(some: Sequence[Table], out: Path) -> None:
    """Write tables to a file, and say so on standard error."""
    for sentence in tables.save(some, out):
        say(f"qwen-scope: {sentence}")


def show_names(layer: int, features: Iterable[int]) -> None:
    """What features of a table above are called, if any has a name; no table of its own in a file (`--out`)."""
    from qwen_scope.report import table

    called = {feature: said for feature in dict.fromkeys(features) if (said := names.name(layer, feature))}
    if called:
        out = console()
        out.print("Names of these features, each with its score", style="bold")
        out.print(table(("feature", "name"), [(str(feature), said) for feature, said in called.items()], out.width))


def keep(table: Table, *, layer: int | None = None, named: bool = True) -> None:
    """Keep a table for the file of a command that writes one (`--out`); see `show`."""
    from qwen_scope.report import Table

    if named:
        table = Table(table.title, *names.beside(table.columns, table.rows, layer, always=True))
    tables.keep(table)


def show_changes(interventions: Iterable[Intervention]) -> None:
    """A line for each feature with a name that is changed."""
    for feature, said in names.of_changes(interventions).items():
        console().print(f"{feature}: {said}", style="dim")


@contextmanager
def table_file(out: Path) -> Iterator[None]:
    """Around a command: what it shows is in a file when it ends well.

    Raises:
        InputError: nothing was shown, an ending that is none of a table, or a file that can't be written.
    """
    tables.check(out)
    with tables.kept() as found:
        yield
    if not found:
        raise InputError(f"nothing to tabulate was found, so {out} is not written")
    save(found, out)


def show(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    data: Table | None = None,
    *,
    layer: int | None = None,
    named: bool = True,
) -> None:
    """A heading and a table; beside the number of a feature stands what it is called.

    Args:
        data: all of it for a file (`--out`), where what is printed is a part, or joins several figures in a cell; then
            nothing is printed where there is no row.
        layer: of the features in the column `feature`, where there is no column `layer`.
        named: without it nothing is added, as to rows that somebody asked for in so many words.
    """
    from qwen_scope.report import Table, table

    rows = [tuple(row) for row in rows]
    keep(data or Table(title, columns, rows), layer=layer, named=named)
    if data is not None and not rows:
        return
    if named:
        columns, rows = names.beside(columns, rows, layer)
    out = console()
    out.print(printable(title), style="bold")
    out.print(table(columns, rows, out.width))
    out.print()


def print_contexts(some: Sequence[Context], maximum: float) -> None:
    """Lines of tokens shaded by a feature, and a note where some of them do not count."""
    from rich.text import Text

    from qwen_scope.report import marks_note, shaded

    out = console()
    for context in some:
        line = shaded(context.tokens, context.values, maximum, left_out=context.left_out)
        out.print(Text(f"{context.value:.4g} at {context.place}: ", style="dim") + line)
    if note := marks_note(reason for context in some for reason in context.left_out):
        out.print(note, style="dim")


def print_json(data: Any, *, layer: int | None = None, named: bool = True) -> None:
    """One JSON document on standard output; beside the number of a feature stands what it is called.

    Args:
        layer: of features that say none.   named: without it nothing is added, as to a format that others read.
    """
    sys.stdout.write(json_text(names.within(data, layer) if named else data, indent=2) + "\n")


def print_json_list(head: dict[str, Any], name: str, items: Iterable[Any]) -> None:
    """One JSON document on standard output: the fields of `head`, then a list that is written while it is made."""
    opening = json_text(head, indent=2).removesuffix("\n}")
    sys.stdout.write(f"{opening},\n  {json_text(name)}: [")
    for number, item in enumerate(items):
        text = json_text(names.within(item), indent=2).replace("\n", "\n    ")
        sys.stdout.write(("," if number else "") + "\n    " + text)
    sys.stdout.write("\n  ]\n}\n")


def print_json_line(data: Any) -> None:
    """One JSON document in one line, which a reader of a pipe gets at once."""
    sys.stdout.write(json_text(names.within(data)) + "\n")
    sys.stdout.flush()


def json_text(data: Any, indent: int | None = None) -> str:
    """JSON that reads back as the same data, with escapes for what would steer a terminal or its encoding lacks."""
    utf = (sys.stdout.encoding or "utf-8").lower().startswith("utf")
    text = json.dumps(data, ensure_ascii=not utf, indent=indent, default=plain)
    return STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def plain(value: Any) -> Any:
    """What JSON does not know: dataclasses as objects, anything else by its text."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return str(value)


@contextmanager
def status(message: str) -> Iterator[None]:
    """A spinner on standard error while something slow runs; where that is no terminal, a line now and then."""
    from rich.text import Text

    with errors().status(Text(printable(message))) if errors().is_terminal else lines(message):
        yield


def progress() -> AbstractContextManager[Report]:
    """Progress on standard error, fed by `(stage, share done, text)`: bars in a terminal, else a line now and then."""
    return bars() if errors().is_terminal else lines()


@contextmanager
def bars() -> Iterator[Report]:
    """A progress bar per stage."""
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:>16}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}", markup=False),
    )
    with Progress(*columns, console=errors()) as bar:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, share: float, text: str) -> None:
            if stage not in tasks:
                for task in tasks.values():
                    bar.update(task, completed=1.0)
                tasks[stage] = bar.add_task(printable(stage), total=1.0, text="")
            bar.update(tasks[stage], completed=share, text=printable(text))

        yield report
        for task in tasks.values():
            bar.update(task, completed=1.0)
