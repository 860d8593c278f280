"""Groups of options: a command takes one object of the library, and the command line shows its fields as options."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from qwen_scope.cluster import WorkerOptions
from qwen_scope.scope import ScopeOptions
from qwen_scope.text import CorpusOptions

from . import options
from .commands import late_values


@dataclass(frozen=True)
class Read:
    """In the annotation of an option: what makes the field's value of what was typed.

    Attributes:
        value: takes what Typer read; raises InputError for what can't be.
        shown: the default as it is typed, where it isn't the field's own.
    """

    value: Callable[[Any], Any]
    shown: Any = None


@dataclass(frozen=True)
class Group:
    """A field that is a group of its own, with some of its options left out: these keep their default."""

    kind: type
    without: tuple[str, ...] = ()


# By dataclass: its fields as options, in the order of the help; a field that is a group of its own by its class.
OPTIONS: dict[type, dict[str, Any]] = {
    CorpusOptions: {
        "column": Annotated[str, typer.Option("--column", help="The column with the text or the messages.")],
        "unit": Annotated[str, typer.Option("--unit", help="A document of a .txt: paragraph, line or file.")],
        "sample": Annotated[
            int | None, typer.Option("--sample", help="Number of documents, drawn evenly. Default: all.", min=1)
        ],
        "seed": Annotated[int, typer.Option("--seed", help="Of the sample.", **options.SEED)],
        "split": Annotated[str, typer.Option("--split", help="Of a dataset or the lab.")],
        "subset": Annotated[str | None, typer.Option("--subset", help="Of a dataset.")],
        "chat": Annotated[
            str | None,
            typer.Option("--chat", help="Wrap texts in the chat template: default, thinking or non_thinking."),
            Read(options.check_chat),
        ],
        "template": Annotated[
            str | None,
            typer.Option("--template", help="Join columns into the text instead, such as '{question}\\n{answer}'."),
            Read(options.parse_template),
        ],
    },
    WorkerOptions: {
        "on": Annotated[
            str | None, typer.Option("--on", help="Read with workers on a cluster: ray. Default: in this process.")
        ],
        "workers": Annotated[int, typer.Option("--workers", help="With --on: how many.", min=1)],
        "worker_cpus": Annotated[
            float, typer.Option("--worker-cpus", help="CPUs of each; 0.5 shares one between two.")
        ],
        "worker_gpus": Annotated[float, typer.Option("--worker-gpus", help="GPUs of each, or a part of one.")],
        "address": Annotated[
            str | None,
            typer.Option("--address", help="Of a Ray cluster. Default: RAY_ADDRESS, else one on this machine."),
        ],
    },
    ScopeOptions: {
        "model": options.Model,
        "sae": options.Sae,
        "device": options.Device,
        "dtype": options.Dtype,
        "k": options.K,
        "adapter": Annotated[
            str | None, typer.Option("--adapter", help="A folder with a PEFT adapter to be merged into the model.")
        ],
        "counted": Annotated[options.Count, Read(options.parse_count)],
    },
}

# What documents are where nothing is said: of a corpus, and of sets of short texts.
PARAGRAPHS, LINES = CorpusOptions(), CorpusOptions(unit="line")


def grouped(
    command: Callable[..., Any],
    *,
    without: Collection[str] = (),
    late: Callable[[], Mapping[str, Any]] | None = None,
    first: Callable[[], None] | None = None,
) -> Callable[..., Any]:
    """A command whose parameters of a type in `OPTIONS` are shown as that type's fields, and are given as one object.

    The defaults are those of the parameter's own default, or those of the fields where it has none. A name that occurs
    more than once, such as the `seed` of a command and that of its sample, is one option with the help of the
    command or else of the first group, and goes into all.

    Args:
        without: fields that keep their default, because the command has no use for them; `reading.sample` is that of
            the parameter `reading` alone.
        late: gives further options by name, each with its annotation, once the command line of this command is read:
            options that only a library that takes seconds to import can tell. Those that were typed are given as the
            command's parameter `more`, a dictionary.
        first: is called before anything is made of what was typed, such as a check of what is installed.
    """
    hints = get_type_hints(command, include_extras=True)
    taken = signature(command).parameters
    groups = {
        name: (hints[name], None if one.default is Parameter.empty else one.default)
        for name, one in taken.items()
        if hints[name] in OPTIONS
    }
    own = [name for name in taken if name not in groups and (late is None or name != "more")]
    shown: dict[str, Parameter] = {}
    for name, one in taken.items():
        if name in groups:
            for field in fields_of(*groups[name]):
                if field.name not in {*own, *without} and f"{name}.{field.name}" not in without:
                    shown.setdefault(field.name, field)
        elif name in own:
            shown[name] = one.replace(annotation=hints[name])
    # Typer asks for arguments before options by their kind alone; Python wants those without a default first.
    ordered = sorted(shown.values(), key=lambda one: one.default is not Parameter.empty)

    @wraps(command)
    def run(**given: Any) -> Any:
        if first is not None:
            first()
        passed = {name: given[name] for name in own}
        if late is not None:
            passed["more"] = read_all(late(), late_values())
        typed = {name: value for name, value in given.items() if name not in without}
        for name, (kind, default) in groups.items():
            mine = {field: value for field, value in typed.items() if f"{name}.{field}" not in without}
            passed[name] = made(kind, default, mine)
        return command(**passed)

    # What Typer reads a command's options from; both are those of the command as it is typed.
    run.__annotations__ = {one.name: one.annotation for one in ordered}
    setattr(run, "__signature__", Signature(ordered))  # noqa: B010  # a function's type has no such attribute
    if late is not None:
        setattr(run, "late", lambda: [late_option(*one) for one in late().items()])  # noqa: B010
    return run


def late_option(name: str, annotation: Any) -> Parameter:
    """An option that may be left out."""
    return Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=annotation)


def read_all(typed: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were typed, read as their annotations say."""
    found = {}
    for name, value in given.items():
        if value is not None:
            read = reader(typed[name])
            found[name] = value if read is None else read.value(value)
    return found


def generated(kind: type, heading: str) -> dict[str, Any]:
    """The fields of a dataclass as options that may be left out, with the help of its docstring.

    Args:
        heading: what the help of each begins with.
    """
    hints, help_of = get_type_hints(kind), attributes(kind.__doc__ or "")
    found: dict[str, Any] = {}
    for field in fields(kind):
        text = f"{heading}: {help_of.get(field.name, '')} Default: {spoken(field.default)}."
        option = typer.Option("--" + field.name.replace("_", "-"), help=text)
        if get_origin(hints[field.name]) is tuple:
            found[field.name] = Annotated[str | None, option, Read(options.numbers_tuple)]
        else:
            found[field.name] = Annotated[hints[field.name] | None, option]
    return found


def attributes(docstring: str) -> dict[str, str]:
    """What the section `Attributes` of a docstring says of each, as one line."""
    section = docstring.partition("Attributes:\n")[2]
    return {name: " ".join(text.split()) for name, text in re.findall(r"(?ms)^ {8}(\w+): (.*?)(?=^ {8}\w|\Z)", section)}


def spoken(value: Any) -> str:
    """A default as it is typed."""
    return ",".join(f"{one:g}" for one in value) if isinstance(value, tuple) else f"{value:g}"


def fields_of(kind: type, default: Any = None) -> list[Parameter]:
    """The fields of a group as parameters of a command, those of its groups among them."""
    typed: Mapping[str, Any] = OPTIONS[kind]
    found: list[Parameter] = []
    for name, annotation in typed.items():
        if (group := group_of(annotation)) is not None:
            inner = fields_of(group.kind, inner_default(kind, default, name))
            found += [one for one in inner if one.name not in group.without]
            continue
        value = default_of(kind, default, name)
        read = reader(annotation)
        if read is not None and (value is not Parameter.empty or read.shown is not None):
            value = read.shown
        found.append(Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=value, annotation=annotation))
    return found


def group_of(annotation: Any) -> Group | None:
    """The group that a field is, if it is one."""
    if isinstance(annotation, Group):
        return annotation
    return Group(annotation) if isinstance(annotation, type) and annotation in OPTIONS else None


def made(kind: type, default: Any, typed: Mapping[str, Any]) -> Any:
    """The object of a group, with the fields that were typed."""
    chosen: dict[str, Any] = {}
    for name, annotation in OPTIONS[kind].items():
        if (group := group_of(annotation)) is not None:
            inner = inner_default(kind, default, name)
            chosen[name] = made(group.kind, inner, {key: typed[key] for key in typed if key not in group.without})
        elif name in typed:
            read, value, usual = reader(annotation), typed[name], default_of(kind, default, name)
            if read is not None:
                value = usual if value == read.shown and usual is not Parameter.empty else read.value(value)
            chosen[name] = value
    return kind(**chosen) if default is None else replace(default, **chosen)


def default_of(kind: type, default: Any, name: str) -> Any:
    """What a field of a group is where nothing is typed; `Parameter.empty` where it must be."""
    if default is not None:
        return getattr(default, name)
    (field,) = (one for one in fields(kind) if one.name == name)
    if field.default_factory is not MISSING:
        return field.default_factory()
    return Parameter.empty if field.default is MISSING else field.default


def inner_default(kind: type, default: Any, name: str) -> Any:
    """The default of a field that is a group of its own; None where it is made of the defaults of its class.

    Such an object is not made for `--help`: checking its numbers may take a library that is slow to import.
    """
    if default is None:
        (field,) = (one for one in fields(kind) if one.name == name)
        if isinstance(field.default_factory, type):
            return None
    value = default_of(kind, default, name)
    return None if value is Parameter.empty else value


def reader(annotation: Any) -> Read | None:
    """What reads an option, if anything beside Typer does."""
    return next((one for one in get_args(annotation) if isinstance(one, Read)), None)
