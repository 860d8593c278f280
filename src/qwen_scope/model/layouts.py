"""How a weight is stored in several tensors of a checkpoint: the names and types it is known by, and its arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from qwen_scope.errors import FormatError

from . import dequantize

Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class Settings:
    """What a config has to say for weights to be unpacked.

    Attributes:
        block: rows and columns that share a scale.
        bits: of packed values; several where layers differ.
        plus_one: whether zeros are stored less one.
        group: how many inputs share a scale.
        apart: other such numbers of single modules, by their names.
    """

    block: tuple[int, int] | None = None
    bits: tuple[int, ...] = ()
    plus_one: bool = True
    group: int = 0
    apart: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """One way of storing a weight in several tensors.

    Attributes:
        mark: ending of the name of the tensor that holds the packed values.
        kinds: the types it has, as safetensors writes them.
        weight: the ending in its place in the model.
        needs: endings of the other tensors, each with its alternatives; the first names it in `values`.
        may: endings of tensors that only some weights have.
        values: the weight from its tensors by their endings, the settings, and the module's name.
    """

    mark: str
    kinds: frozenset[str]
    weight: str
    needs: tuple[tuple[str, ...], ...]
    may: tuple[str, ...]
    values: Callable[[Parts, Settings, str], Tensor]


def _eight_bits(parts: Parts, said: Settings, module: str) -> Tensor:
    return dequantize.scaled(parts[""], parts["_scale_inv"], parts.get("_zero_point"), said.block)


def _gptq(parts: Parts, said: Settings, module: str) -> Tensor:
    return dequantize.gptq(parts[".qweight"], parts[".qzeros"], parts[".scales"], parts.get(".g_idx"), said.plus_one)


def _awq(parts: Parts, said: Settings, module: str) -> Tensor:
    return dequantize.awq(parts[".qweight"], parts[".qzeros"], parts[".scales"])


def _words(parts: Parts, said: Settings, module: str) -> Tensor:
    rows, columns = (int(one) for one in parts["_shape"])
    words = parts["_packed"].shape[-1]
    fits = [bits for bits in sorted(set(said.bits)) if words == math.ceil(columns * bits / 32)]
    if len(fits) != 1:
        raise FormatError(f"{words} words for {columns} columns fit none of the stated bits {sorted(set(said.bits))}")
    zero, order = parts.get("_zero_point"), parts.get("_g_idx")
    return dequantize.packed(parts["_packed"], parts["_scale"], (rows, columns), fits[0], zero, order)


def _affine(parts: Parts, said: Settings, module: str) -> Tensor:
    group = said.apart.get(module, said.group)
    return dequantize.affine(parts[".weight"], parts[".scales"], parts[".biases"], group)


WORD = frozenset({"I32"})
EIGHT_BITS = frozenset({"F8_E4M3", "F8_E5M2", "I8"})
QZEROS = ((".qzeros",), (".scales",))

EIGHT = Layout("", EIGHT_BITS, "", (("_scale_inv", "_scale"),), ("_zero_point",), _eight_bits)
WORDS = Layout("_packed", WORD, "", (("_scale",), ("_shape",)), ("_zero_point", "_g_idx"), _words)
GPTQ = Layout(".qweight", WORD, ".weight", QZEROS, (".g_idx",), _gptq)
AWQ = Layout(".qweight", WORD, ".weight", QZEROS, (), _awq)
MLX = Layout(".weight", frozenset({"U32"}), ".weight", ((".scales",), (".biases",)), (), _affine)
