"""The kinds of SAE that can be trained: one file and one line each."""

from dataclasses import fields
from typing import Any

from qwen_scope.errors import InputError, NotFoundError, nearest

from .base import Architecture
from .batchtopk import BatchTopKTraining
from .jumprelu import JumpReLUTraining
from .matryoshka import MatryoshkaTraining
from .topk import TopKTraining

KINDS: tuple[type[Architecture], ...] = (
    TopKTraining,
    BatchTopKTraining,
    MatryoshkaTraining,
    JumpReLUTraining,
)

ARCHITECTURES: dict[str, type[Architecture]] = {kind.name: kind for kind in KINDS}


def options_of(kind: Any) -> set[str]:
    """The names of an architecture's own options."""
    return {field.name for field in fields(kind)}


def architecture(name: str, **options: Any) -> Architecture:
    """The architecture of a name, with its own options.

    Raises:
        NotFoundError: no such architecture.   InputError: an option of another one, or a value that can't be.
    """
    if name not in ARCHITECTURES:
        raise NotFoundError(f"no architecture {name!r}; {nearest(name, ARCHITECTURES)}")
    kind: Any = ARCHITECTURES[name]
    if foreign := sorted(set(options) - options_of(kind)):
        owners = [one.name for one in KINDS if foreign[0] in options_of(one)]
        of = f", only for {', '.join(owners)}" if owners else ""
        raise InputError(f"{foreign[0]} has no meaning for {name}{of}; leave it out")
    return kind(**options)


__all__ = ["ARCHITECTURES", "Architecture", "architecture"]
