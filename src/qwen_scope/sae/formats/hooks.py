"""Where other tools say that an SAE reads, in this package's spelling; what is not read here is refused by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from qwen_scope.errors import FormatError

STREAMS = ("resid_post", "mlp_out", "attn_out")

# What stands behind the layer's number in a module path or a TransformerLens name, or before it in a folder's name.
_NAMES: dict[str, tuple[str, ...]] = {
    "resid_post": ("", "resid_post", "resid", "resid_out", "output", "block"),
    "resid_pre": ("resid_pre", "resid_in", "input"),
    "mlp_out": ("mlp_out", "mlp", "feed_forward", "mlp.output"),
    "attn_out": (
        *("attn_out", "attn", "attention", "self_attn", "self_attention", "linear_attn"),
        "self_attn.output",
    ),
}
_TAILS = {name: stream for stream, names in _NAMES.items() for name in names}
_PATH = re.compile(
    r"(?P<before>(?:[a-z_]+\.)*)(?:layers|blocks|h)[.\[](?P<layer>[0-9]{1,9})\]?(?:\.(?P<tail>[a-z0-9_.]+))?"
)
_FLAT = re.compile(r"(?:(?P<tail>[a-z_]+?)_)?layer_?(?P<layer>[0-9]{1,9})(?:[._](?P<behind>[a-z_]+))?")
_BARE = re.compile(r"(?:layers?|blocks?)?[_.]?[0-9]+")
_INSIDE = re.compile(r"(?:[A-Za-z_]+\.)*(?:layers|blocks|h)\.[0-9]+(?:\.[A-Za-z0-9_]+)*")
_LAYER = re.compile(r"(?:^|[/_.\-])(?:(?:layers?|blocks)[_.\-]?|h\.)([0-9]{1,9})(?![0-9])", re.IGNORECASE)
_TOWERS = ("vision", "visual", "encoder", "audio")
_MODULES = {"resid_post": "", "mlp_out": ".mlp", "attn_out": ".self_attn"}


@dataclass(frozen=True)
class Hook:
    """A hook point as files name it.

    Attributes:
        layer: counted from 0, None where the name holds none.
        stream: one of `STREAMS`.
        before: whether the name was the input of the layer behind: `resid_pre` of n is `resid_post` of n - 1.
    """

    layer: int | None
    stream: str
    before: bool = False

    def __str__(self) -> str:
        return f"layers.{self.layer}.{self.stream}"


def parse(name: str, layer: int | None = None) -> Hook | None:
    """The hook point of a name in any tool's spelling; None for a place that is not read here.

    Args:
        layer: of the SAE, for names that hold none, such as `mlp_out`.

    Raises:
        FormatError: the input of layer 0, which is no layer's output.
    """
    lowered = name.strip().lower()
    match = _PATH.fullmatch(lowered) or _FLAT.fullmatch(lowered)
    if match:
        groups = match.groupdict()
        if any(tower in (groups.get("before") or "") for tower in _TOWERS):
            return None
        tail, layer = groups["tail"] or groups.get("behind") or "", int(match["layer"])
    else:
        tail = lowered
    stream = _TAILS.get(tail.removeprefix("hook_")) if tail or match else None
    if stream == "resid_pre":
        if layer == 0:
            raise FormatError(f"an SAE on {name} can't be read: the input of layer 0 is no layer's output")
        return Hook(None if layer is None else layer - 1, "resid_post", before=True)
    return None if stream is None else Hook(layer, stream)


def read(name: str, what: str, layer: int | None = None) -> Hook:
    """`parse`, for a name that must be one that is read here.

    Raises:
        FormatError: another place, such as `blocks.3.attn.hook_z`; it says what fits.
    """
    hook = parse(name, layer)
    if hook is None:
        raise FormatError(
            f"{what} on {name!r} can't be read: this project reads {', '.join(STREAMS)} of a decoder block, and"
            " resid_pre of a layer as resid_post of the one before"
        )
    return hook


def about(name: str | None, layer: int | None = None) -> Hook | None:
    """`parse` for listings, where a place that is not read here is still of some layer."""
    if not name:
        return None
    try:
        found = parse(name, layer)
    except FormatError:
        found = None
    return found or Hook(layer_in(name) if layer is None else layer, "other")


def in_folder(folder: str) -> Hook | None:
    """The stream and layer that the name of a folder states, such as `layers.4.mlp` or `mlp_out_layer_3/trainer_0`."""
    for part in reversed(folder.strip("/").split("/")):
        if not _BARE.fullmatch(part.lower()) and (hook := about(part)) and hook.stream in STREAMS:
            return hook if hook.layer is not None else None
    return None


def module_in(folder: str) -> str | None:
    """The module path in the name of a folder, such as `model.layers.4.mlp`, which is how sparsify names its SAEs."""
    match = _INSIDE.search(folder.rpartition("/")[2])
    return match[0].rstrip(".") if match else None


def layer_in(text: str | None) -> int | None:
    """The layer that a folder, module or hook name mentions, such as 12 in `blocks.12.hook_resid_post`."""
    match = _LAYER.search(text or "")
    return int(match[1]) if match else None


def of_sae(hook_point: str | None, layer: int) -> Hook:
    """The hook point of an SAE in this package's spelling; the output of its layer where its files name none."""
    return read(hook_point, "an SAE", layer) if hook_point else Hook(layer, "resid_post")


def module_name(hook: Hook) -> str:
    """The module whose output it is, in the spelling of most families, such as `layers.4.mlp`."""
    return f"layers.{hook.layer}{_MODULES[hook.stream]}"


def together(names: Mapping[str, str | None], what: str, layer: int | None = None) -> Hook | None:
    """The one hook point that the names of an SAE's files mean, by where each stands; None where there is none.

    Raises:
        FormatError: a place that is not read here, or names that contradict each other.
    """
    found = {where: read(name, what, layer) for where, name in names.items() if name}
    for where, hook in found.items():
        for other, another in found.items():
            if hook.stream != another.stream or (
                hook.layer != another.layer and None not in (hook.layer, another.layer)
            ):
                raise FormatError(f"{what} contradicts itself: {where} means {hook}, {other} means {another}")
    known = [hook for hook in found.values() if hook.layer is not None]
    return next(iter([*known, *found.values()]), None)
