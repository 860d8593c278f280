"""How commands print: tables for people, JSON for machines."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_scope.errors import InputError, printable

from .lines import lines

if TYPE_CHECKING:
    from rich.console import Console

Report = Callable[[str, float, str], None]


def console() -> Console:
    """Standard output, as wide as the terminal and at least readable when piped."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=False)


@functools.cache
def errors() -> Console:
    """Standard error; one object, so that a line stands above a spinner that is turning."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def say(message: str) -> None:
    """One line on standard error, above whatever is turning there."""
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
    """Keep the folder that a command writes for it alone until the command ends; nothing where there is none.

    Raises:
        InputError: it is a file, what is read or inside of that, or another process writes to it.
    """
    from qwen_scope.files import lock_folder, not_onto_itself

    if out is None:
        return
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; name a folder")
    not_onto_itself(out, *inputs)
    _held.get().enter_context(lock_folder(out))


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A heading and a table."""
    from rich.text import Text

    from qwen_scope.report import table

    out = console()
    out.print(Text(title, style="bold"))
    out.print(table(columns, rows))
    out.print()


def print_json(data: Any) -> None:
    """One JSON document on standard output; letters that its encoding lacks are escaped as JSON has it."""
    utf = (sys.stdout.encoding or "utf-8").lower().startswith("utf")
    json.dump(data, sys.stdout, ensure_ascii=not utf, indent=2, default=plain)
    sys.stdout.write("\n")


def plain(value: Any) -> Any:
    """What JSON does not know: dataclasses as objects, anything else by its text."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return str(value)


@contextmanager
def status(message: str) -> Iterator[None]:
    """A spinner on standard error while something slow runs; where that is no terminal, a line now and then."""
    with errors().status(message) if errors().is_terminal else lines(message):
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
