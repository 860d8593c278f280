"""Groups of options: a command takes one object of the library, and the command line shows its fields as options."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, get_type_hints

import typer

from qwen_scope.text import CorpusOptions

from . import options

# By dataclass: its fields as options, in the order of the help.
OPTIONS: dict[type, dict[str, Any]] = {
    CorpusOptions: {
        "column": Annotated[str, typer.Option("--column", help="The column with the text or the messages.")],
        "unit": Annotated[str, typer.Option("--unit", help="A document of a .txt: paragraph, line or file.")],
        "sample": Annotated[
            int | None, typer.Option("--sample", help="Only so many documents, drawn evenly. Default: all.", min=1)
        ],
        "seed": Annotated[int, typer.Option("--seed", help="Of the sample.", min=0, max=2**32 - 1)],
        "split": Annotated[str, typer.Option("--split", help="Of a dataset or the lab.")],
        "subset": Annotated[str | None, typer.Option("--subset", help="Of a dataset.")],
        "chat": Annotated[
            str | None,
            typer.Option("--chat", help="Wrap texts in the chat template: default, thinking or non_thinking."),
        ],
    }
}
# What a type of Python says and one of the command line doesn't; each lets None pass.
CHECKS: dict[str, Callable[[Any], Any]] = {"chat": options.check_chat}

# What documents are where nothing is said: of a corpus, and of sets of short texts.
PARAGRAPHS, LINES = CorpusOptions(), CorpusOptions(unit="line")


def grouped(command: Callable[..., Any], *, without: Collection[str] = ()) -> Callable[..., Any]:
    """A command whose parameters of a type in `OPTIONS` are shown as that type's fields, and are given as one object.

    The defaults are those of the parameter's own default. A field that the command also takes by name, such as a
    `seed` that is more than the sample's, is one option with the command's help, and goes into both.

    Args:
        without: fields that keep their default, because the command has no use for them.
    """
    hints = get_type_hints(command, include_extras=True)
    taken = signature(command).parameters
    groups = {name: (hints[name], one.default) for name, one in taken.items() if hints[name] in OPTIONS}
    shown: list[Parameter] = []
    for name, one in taken.items():
        if name in groups:
            kind, default = groups[name]
            shown += fields_of(kind, default, [field for field in OPTIONS[kind] if field not in {*taken, *without}])
        else:
            shown.append(one.replace(annotation=hints[name]))

    @wraps(command)
    def run(**given: Any) -> Any:
        passed = {name: given[name] for name in taken if name not in groups}
        for name, (kind, default) in groups.items():
            chosen = {field: given[field] for field in OPTIONS[kind] if field not in without}
            for field, check in CHECKS.items():
                check(chosen.get(field))
            passed[name] = replace(default, **chosen)
        return command(**passed)

    # What Typer reads a command's options from; both are those of the command as it is typed.
    run.__annotations__ = {one.name: one.annotation for one in shown}
    setattr(run, "__signature__", Signature(shown))  # noqa: B010  # a function's type has no such attribute
    return run


def fields_of(kind: type, default: Any, names: list[str]) -> list[Parameter]:
    """Fields of a group as parameters of a command."""
    typed: Mapping[str, Any] = OPTIONS[kind]
    return [
        Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=getattr(default, name), annotation=typed[name])
        for name in names
    ]
