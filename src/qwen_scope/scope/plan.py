"""What a model and its SAEs take on disk, on the device and on the host, before anything is downloaded."""

from __future__ import annotations

import functools
import importlib.resources
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_scope.errors import InputError, MismatchError, NotFoundError, foreign
from qwen_scope.model import Gguf, ModelSizes, base_of, gguf_file, is_adapter, model_sizes
from qwen_scope.sae import catalog, layers_of, load_sae

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# The tokens of one forward pass (padding included) and the working tiles of encode.
TOKENS, TILES = 4096, 2 * 64 * 2**20


@dataclass(frozen=True)
class Plan:
    """Bytes, for one model and `n_saes` of its SAEs.

    Attributes:
        model: the language model's weights.
        sae: one SAE's weights as held in memory.
        n_saes: how many layers are looked at.
        disk: the SAEs' files as released.
        working: residuals of one batch, the widest block at work, and the tiles of encode; an estimate.
        one_at_a_time: on the device with one SAE in memory at a time.
        in_turn: on the device in one pass over many layers: an SAE at work and the next one on its way.
        all_at_once: on the device with every SAE in memory.
        host: on the host beside a GPU: one SAE's file while it is copied; 0 where the device is the host.
    """

    model: int
    sae: int
    n_saes: int
    disk: int
    working: int
    one_at_a_time: int
    in_turn: int
    all_at_once: int
    host: int

    def fits(self, device_bytes: int) -> str:
        """What a device of this size holds, in a few words."""
        if device_bytes >= self.all_at_once:
            return "fits with every SAE in memory"
        if device_bytes >= self.one_at_a_time:
            room = (device_bytes - self.model - self.working) // self.sae
            return f"fits with {room} SAE{'s' if room > 1 else ''} in memory at a time"
        short = self.one_at_a_time - device_bytes
        return f"does not fit: {short / 1e9:.1f} GB short"


def plan(
    sizes: ModelSizes,
    d_sae: int,
    n_saes: int,
    *,
    dtype: str = "bfloat16",
    sae_dtype: str = "float32",
    stored: str = "float32",
    on_gpu: bool = True,
) -> Plan:
    """The plan for a model and `n_saes` SAEs of `d_sae` features, whose files hold matrices of type `stored`.

    Raises:
        InputError: a type that weights can't have, or no SAE.
    """
    if n_saes < 1:
        raise InputError("a plan needs at least one layer")
    d_model = sizes.d_model
    model = sizes.weight_bytes(dtype)
    each = sae_bytes(d_sae, d_model, sae_dtype)
    working = sizes.capture_bytes(1, TOKENS, n_saes, dtype) + TILES
    return Plan(
        model=model,
        sae=each,
        n_saes=n_saes,
        disk=n_saes * sae_bytes(d_sae, d_model, stored),
        working=working,
        one_at_a_time=model + each + working,
        in_turn=model + min(2, n_saes) * each + working,
        all_at_once=model + n_saes * each + working,
        host=sae_bytes(d_sae, d_model, stored) if on_gpu else 0,
    )


def plan_group(
    group: catalog.Group, layers: Sequence[int] | None = None, *, dtype: str = "bfloat16", sae_dtype: str = "float32"
) -> Plan:
    """The plan for a group of the catalog; the shapes of its language model come with the package.

    Raises:
        NotFoundError: a layer that the group does not have.   InputError: a group whose width or layers are not known.
    """
    if not group.d_sae or not group.layers:
        raise InputError(f"{'the width' if group.layers else 'which layers'} of {group.name} is not known here")
    if missing := sorted(set(layers or ()) - set(group.layer_numbers)):
        group.filename(missing[0])
    return plan(
        model_sizes(config_of(group.model)),
        group.d_sae,
        group.layers if layers is None else len(set(layers)),
        dtype=dtype,
        sae_dtype=sae_dtype,
        stored=group.stored or "float32",
    )


def plan_folder(
    folder: Path,
    layers: Sequence[int] | None = None,
    *,
    model: str | None = None,
    dtype: str = "bfloat16",
    sae_dtype: str = "float32",
) -> tuple[catalog.Group, Plan]:
    """What a folder of SAEs holds, as a group, and its plan; the weights stay on disk.

    Args:
        model: the language model, a folder or one of the catalog; by default what the files or the folder's name say.

    Raises:
        InputError: they do not say which model, so `model` is needed.
        NotFoundError: no SAE there, or none of a layer.   MismatchError: the model has another width.
    """
    there = list(layers_of(folder))
    if missing := sorted(set(layers or ()) - set(there)):
        raise NotFoundError(f"{folder} has no SAE for layer {missing[0]}; it has {', '.join(map(str, there))}")
    sae, listed = load_sae(folder, there[0]), catalog.lookup(folder.resolve().name)
    named = model or sae.meta.get("model") or (None if listed is None else listed.model)
    if not isinstance(named, str):
        raise InputError(f"the SAEs in {folder} do not say which language model they are for; name it with model=")
    sizes = model_sizes(config_of(named))
    if sizes.d_model != sae.d_model:
        raise MismatchError(f"the SAEs in {folder} are for {sae.d_model} dimensions, {named} has {sizes.d_model}")
    held = catalog.Group(
        folder.resolve().name,
        None,
        folder,
        named,
        "base",
        len(there),
        sae.d_model,
        sae.d_sae,
        sae.k or 0,
        which=tuple(there),
    )
    return held, plan(sizes, sae.d_sae, len(set(layers or there)), dtype=dtype, sae_dtype=sae_dtype)


def config_of(model: str) -> PreTrainedConfig:
    """The config of a language model of the catalog or in a folder, without a download; `lab` is the bundled one.

    Raises:
        NotFoundError: the package does not know its shape.   FormatError: a config that transformers can't read.
    """
    from transformers import AutoConfig

    model = catalog.find("lab").model if model == "lab" else model
    if (file := gguf_file(model)) is not None:
        return Gguf.open(file).config()
    if is_adapter(model):
        return config_of(base_of(Path(model)))
    if (Path(model) / "config.json").is_file():
        with foreign(f"the config of the model in {model} can't be read"):
            return AutoConfig.from_pretrained(model)
    if model not in shapes():
        raise NotFoundError(f"the shape of {model!r} is not known here; known are {', '.join(shapes())}")
    row = dict(shapes()[model])
    if "like" in row:
        row = dict(shapes()[row["like"]])
    return AutoConfig.for_model(row.pop("model_type"), **row)


@functools.cache
def shapes() -> dict[str, dict]:
    """The rows of `shapes.toml`."""
    return tomllib.loads(
        importlib.resources.files("qwen_scope.scope").joinpath("shapes.toml").read_text(encoding="utf-8")
    )


def sae_bytes(d_sae: int, d_model: int, dtype: str) -> int:
    """Bytes of one SAE whose matrices are stored in `dtype`; its vectors stay fp32."""
    if dtype not in catalog.DTYPE_BYTES:
        raise InputError(f"weights are stored as {', '.join(catalog.DTYPE_BYTES)}, not {dtype!r}")
    return 2 * d_sae * d_model * catalog.DTYPE_BYTES[dtype] + 4 * (d_sae + d_model)
