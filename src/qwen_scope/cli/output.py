"""How commands print: tables for people, JSON for machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def console() -> Console:
    """Standard output, as wide as the terminal and at least readable when piped."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=False)


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A heading and a table."""
    from rich.text import Text

    from qwen_scope.report import table

    out = console()
    out.print(Text(title, style="bold"))
    out.print(table(columns, rows))
    out.print()


def print_json(data: Any) -> None:
    """One JSON document on standard output."""
    json.dump(data, sys.stdout, ensure_ascii=False, indent=2, default=plain)
    sys.stdout.write("\n")


def plain(value: Any) -> Any:
    """What JSON does not know: dataclasses as objects, anything else by its text."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return str(value)


@contextmanager
def status(message: str) -> Iterator[None]:
    """A line on standard error while something slow runs; nothing where it is not a terminal."""
    from rich.console import Console

    with Console(stderr=True).status(message):
        yield


@contextmanager
def progress() -> Iterator[Callable[[str, float, str], None]]:
    """A progress bar per stage on standard error, fed by `(stage, share done, text)`."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:>16}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with Progress(
        *columns,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
        console=Console(stderr=True),
    ) as bar:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, share: float, text: str) -> None:
            if stage not in tasks:
                for task in tasks.values():
                    bar.update(task, completed=1.0)
                tasks[stage] = bar.add_task(stage, total=1.0, text="")
            bar.update(tasks[stage], completed=share, text=text)

        yield report
        for task in tasks.values():
            bar.update(task, completed=1.0)
