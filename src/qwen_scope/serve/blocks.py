"""The changed decoder block: what happens to the residual at its end, in the graph, on buffers that never move.

vLLM's blocks return `(hidden, residual)` and the stream is their sum. Everything is added to `residual`, so `hidden`
remains what the block's last collective gave and the fusion of all-reduce and norm still matches.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from qwen_scope.errors import NotFoundError

SET_FEATURES = "qwen_scope::set_features"
"""The operation that a compiled graph has to be split at."""


@runtime_checkable
class Setter(Protocol):
    """What changes rows of a layer's residual beyond adding; a worker's state."""

    def set_features(self, hidden: Tensor, residual: Tensor, layer: int) -> Tensor:
        """The new residual, a tensor of its own."""
        ...


_SETTERS: weakref.WeakValueDictionary[int, Setter] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


def register_setter(setter: Setter) -> int:
    """The number under which the operation finds it: a graph can hold a number, and no object."""
    number = next(_NUMBERS)
    _SETTERS[number] = setter
    return number


@torch.library.custom_op(
    SET_FEATURES, mutates_args=(), schema="(Tensor hidden, Tensor residual, int setter, int layer) -> Tensor"
)
def set_features(hidden: Tensor, residual: Tensor, setter: int, layer: int) -> Tensor:
    """`scale`, `clamp`, `floor`, `cap`, `ablate` at the rows that ask for it in this step."""
    return _SETTERS[setter].set_features(hidden, residual, layer)


@set_features.register_fake
def _(hidden: Tensor, residual: Tensor, setter: int, layer: int) -> Tensor:
    return torch.empty_like(residual)


@torch.library.custom_op(
    "qwen_scope::tap", mutates_args=("into",), schema="(Tensor hidden, Tensor residual, Tensor(a!) into) -> ()"
)
def tap(hidden: Tensor, residual: Tensor, into: Tensor) -> None:
    """Copy the stream into the first rows of a buffer, where the SAE reads it after the forward pass."""
    torch.add(hidden, residual, out=into[: hidden.shape[0]])


@tap.register_fake
def _(hidden: Tensor, residual: Tensor, into: Tensor) -> None:
    return None


def change_block(
    block: nn.Module,
    classes: dict[type, type],
    *,
    layer: int,
    setter: int | None,
    table: Tensor | None,
    rows: Tensor,
    into: Tensor | None,
) -> None:
    """Make a block change and read its residual. Its class changes, so the names of its parameters stay.

    Args:
        classes: the changed classes so far, by class; compiled code is shared by blocks of one class.
        setter: the number of what sets features at this layer, or None.
        table: what can be added at this layer, or None.
        rows: the row of the table for each token of the step; the same buffer for all layers.
        into: the buffer that the stream is copied to, or None.
    """
    kind: Any = type(block)
    if kind not in classes:
        classes[kind] = _changed(kind)
    block.__class__ = classes[kind]
    made: Any = block
    made.qwen_scope_layer, made.qwen_scope_setter = layer, -1 if setter is None else setter
    made.qwen_scope_sets, made.qwen_scope_adds, made.qwen_scope_taps = (
        setter is not None,
        table is not None,
        into is not None,
    )
    for name, buffer in (("table", table), ("rows", rows if table is not None else None), ("into", into)):
        if buffer is not None:
            block.register_buffer(f"qwen_scope_{name}", buffer, persistent=False)


def _changed(kind: Any) -> type:
    class Changed(kind):
        def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            hidden, residual = super().forward(*args, **kwargs)
            if self.qwen_scope_sets:
                residual = torch.ops.qwen_scope.set_features(
                    hidden, residual, self.qwen_scope_setter, self.qwen_scope_layer
                )
            if self.qwen_scope_adds:
                rows = self.qwen_scope_rows[: residual.shape[0]]
                residual = residual + self.qwen_scope_table.index_select(0, rows)
            if self.qwen_scope_taps:
                torch.ops.qwen_scope.tap(hidden, residual, self.qwen_scope_into)
            return hidden, residual

    Changed.__name__ = Changed.__qualname__ = f"Changed{kind.__name__}"
    return Changed


def find_blocks(model: nn.Module, count: int) -> nn.ModuleList:
    """The language model's list of decoder blocks: the one called `layers`, outside any vision or audio part.

    Raises:
        NotFoundError: there is not exactly one.
    """
    found = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and name.rpartition(".")[2] == "layers"
        and not any(part in name for part in ("visual", "vision", "audio"))
    ]
    if len(found) != 1:
        raise NotFoundError(f"{type(model).__name__} has {len(found)} lists of {count} blocks called layers, not one")
    return found[0]
