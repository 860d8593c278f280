"""The tensors of a quantised checkpoint as those of a dense model, and what no loader may pass over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from qwen_scope.errors import FormatError

from . import mlx
from .checkpoint import Lazy
from .layouts import EIGHT_BITS, Layout, Settings
from .quantized import INSTEAD, KINDS, Quantised

# What lies beside quantised weights; a loader that does not use it would take the weights for what they are not.
SCALES = ("weight_scale_inv", "weight_scale", "input_scale", ".scales", ".qzeros", ".absmax", ".SCB")
# What only the quantisation of activations and of the cache uses, which is left out here.
BESIDE = ("input_scale", "activation_scale", "input_global_scale", "input_zero_point", ".k_scale", ".v_scale")
WORDS = frozenset({"U8", "I32", "U32"})
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def dense(name: str, found: Quantised, tensors: Mapping[str, Lazy], architecture: str) -> dict[str, Lazy]:
    """The tensors of a dense model, each unpacked when it is asked for.

    Args:
        name: what messages call the model.   architecture: its `model_type`.

    Raises:
        FormatError: scales or zeros are missing, weights are left packed, or nothing is quantised.
        InputError: a model of MLX of an architecture that is not read.
    """
    out: dict[str, Lazy] = {}
    used: set[str] = set()
    for key, one in tensors.items():
        for layout in found.kind.layouts:
            if key.endswith(layout.mark) and one.kind in layout.kinds and not key.endswith(layout.may):
                stem = key.removesuffix(layout.mark)
                parts = _parts(name, key, stem, layout, tensors)
                used |= set(parts.values())
                out[stem + layout.weight] = _weight(name, stem, layout, parts, tensors, found.settings)
                break
    out |= {key: one for key, one in tensors.items() if key not in used and not key.endswith(BESIDE)}
    refuse_scales(name, out)
    refuse_packed(name, out)
    return mlx.named(name, architecture, out) if found.method == "mlx" else out


def refuse_plain(name: str, found: Quantised, tensors: Mapping[str, Lazy]) -> None:
    """Refuse weights that are not quantised where the config says so.

    Raises:
        FormatError: they are not.
    """
    if found.method in KINDS and not any(one.kind in EIGHT_BITS or one.kind in WORDS for one in tensors.values()):
        raise FormatError(
            f"the config.json of {name!r} says that its weights are quantised ({found}), and they are not: take"
            f" quantization_config out of it, or {INSTEAD}"
        )


def refuse_scales(name: str, keys: Iterable[str]) -> None:
    """Refuse scales that nothing would use.

    Raises:
        FormatError: there are such.
    """
    if (key := min((key for key in keys if key.endswith(SCALES)), default=None)) is not None:
        raise FormatError(
            f"the weights of {name!r} come with scales, such as {key!r}, which its config.json does not speak of and"
            f" which would be ignored; {INSTEAD}"
        )


def refuse_packed(name: str, tensors: Mapping[str, Lazy]) -> None:
    """Refuse numbers of 8 bits and packed words that would be taken for the weights themselves.

    Raises:
        FormatError: there are such.
    """
    packed = (key for key, one in tensors.items() if one.kind in EIGHT_BITS or _is_packed(key, one))
    if (key := min(packed, default=None)) is not None:
        raise FormatError(
            f"the weights of {name!r} are stored in few bits ({tensors[key].kind}, such as {key!r}), and its"
            f" config.json does not say how; {INSTEAD}"
        )


def plain_type(tensors: Mapping[str, Lazy]) -> torch.dtype:
    """The type of the tensors that are not quantised: of norms and embeddings."""
    return next((FLOATS[one.kind] for one in tensors.values() if one.kind in FLOATS), torch.float32)


def _is_packed(key: str, one: Lazy) -> bool:
    return key.endswith(("weight", "_packed")) and one.kind in WORDS


def _parts(name: str, key: str, stem: str, layout: Layout, tensors: Mapping[str, Lazy]) -> dict[str, str]:
    """The tensors of one weight, by their endings; the packed values have the ending of the layout's mark."""
    found = {layout.mark: key} | {end: stem + end for end in layout.may if stem + end in tensors}
    for ends in layout.needs:
        there = next((end for end in ends if stem + end in tensors), None)
        if there is None:
            wanted = " or ".join(repr((stem + end).rpartition(".")[2]) for end in ends)
            raise FormatError(
                f"the weights of {name!r} are quantised, and {key!r} comes without its {wanted}, so its values are not"
                f" known; {INSTEAD}"
            )
        found[ends[0]] = stem + there
    return found


def _weight(
    name: str, stem: str, layout: Layout, parts: Mapping[str, str], tensors: Mapping[str, Lazy], said: Settings
) -> Lazy:
    def make() -> Tensor:
        try:
            return layout.values({end: tensors[key][...] for end, key in parts.items()}, said, stem)
        except (FormatError, RuntimeError, IndexError, ValueError, ZeroDivisionError) as error:
            why = str(error).splitlines()[0]
            raise FormatError(f"{stem + layout.weight!r} of {name!r} can't be unpacked: {why}") from error

    return Lazy(make, "F32", ())
