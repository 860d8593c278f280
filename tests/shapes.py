"""The checker of signatures: beartype, with a whole number accepted where a float is asked for, as Python does.

A mode of the chat template may be any string: tests give wrong ones, to see the sentence that a user gets.

jaxtyping binds the arguments of every call and checks them twice, whether or not a signature has shapes, and builds the
checks of every function when its module is imported. Here a signature without shapes is checked by beartype alone, and
its check is built at the first call.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, Literal, get_args, get_type_hints

import jaxtyping
from beartype import BeartypeConf, FrozenDict, beartype

MODES = FrozenDict({Literal["default", "thinking", "non_thinking"]: str})

check = beartype(conf=BeartypeConf(is_pep484_tower=True, hint_overrides=MODES, violation_type=jaxtyping.TypeCheckError))
with_shapes = jaxtyping.jaxtyped


def install(modules: list[str]) -> None:
    """Check what is called in these modules, which are still to be imported."""
    jaxtyping.install_import_hook(modules, "shapes.check")
    # The hook writes `@jaxtyping.jaxtyped(...)` before every function.
    jaxtyping.jaxtyped = checked  # pyright: ignore


def checked(fn: Any = None, *, typechecker: Any = check) -> Any:
    """`jaxtyping.jaxtyped`, for functions and the `__init__` of dataclasses."""
    if fn is None:
        return checked
    if inspect.isclass(fn):
        # One that is inherited or written out is checked already.
        if dataclasses.is_dataclass(fn) and not hasattr(fn.__init__, "__wrapped__"):
            fn.__init__ = checked(fn.__init__)
        return fn
    if isinstance(fn, classmethod | staticmethod):
        return type(fn)(checked(fn.__func__))
    if isinstance(fn, property):
        return property(*(one and checked(one) for one in (fn.fget, fn.fset, fn.fdel)))
    # Names that are not known yet, and those for type checkers alone, are Any here, as jaxtyping has it.
    hints = {name: resolved(hint, fn.__globals__) for name, hint in fn.__annotations__.items()}
    # What a generator function is said to return is checked by jaxtyping as what a call gives, not as what it yields.
    if any(map(shaped, hints.values())) or inspect.isgeneratorfunction(fn):
        return with_shapes(fn, typechecker=check)
    made: Callable[..., Any] | None = None

    @functools.wraps(fn)
    def called(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        nonlocal made
        if made is None:
            made = with_checks(fn, hints)
        return made(*args, **kwargs)

    return called


def with_checks(fn: types.FunctionType, hints: dict[str, Any]) -> Callable[..., Any]:
    """A copy of the function with beartype's checks of these annotations."""
    copy = types.FunctionType(fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    copy.__kwdefaults__, copy.__qualname__, copy.__module__ = fn.__kwdefaults__, fn.__qualname__, fn.__module__
    copy.__annotations__ = hints
    return check(copy)


def resolved(hint: Any, namespace: dict[str, Any]) -> Any:
    """An annotation that is kept as text; Any where its names are known to type checkers alone."""
    try:
        return get_type_hints(types.SimpleNamespace(__annotations__={"it": hint}), namespace, include_extras=True)["it"]
    except Exception:
        return Any


def shaped(hint: Any) -> bool:
    """Whether a shape is anywhere in an annotation."""
    if isinstance(hint, list):  # the arguments of a Callable
        return any(map(shaped, hint))
    if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(map(shaped, get_args(hint)))
