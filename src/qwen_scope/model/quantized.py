"""What a config says of quantised weights, and how each kind of them becomes a model.

`KINDS` is the table. Kinds with a documented formula are unpacked here, on any device and without another package;
transformers runs the others with the packages that they need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import transformers
from transformers import PreTrainedConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from qwen_scope.errors import FormatError, InputError, brief, need
from qwen_scope.files import Fields

from .layouts import AWQ, EIGHT, GPTQ, MLX, WORDS, Layout, Settings

INSTEAD = "name the model in its original precision"
COMPRESSED = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense")
# AutoRound writes the layouts of others and says which.
AUTO_ROUND = {"auto_round:auto_gptq": "gptq", "auto_round:auto_awq": "awq", "auto_round:fp8": "fp8"}


@dataclass(frozen=True)
class Kind:
    """A kind of quantisation.

    Attributes:
        name: what people call it.
        layouts: how it stores weights, where they are unpacked here.
        read: what its config has to say for that, or in a few words what is not read here.
        packages: what transformers needs to run it, where they are not.
    """

    name: str
    layouts: tuple[Layout, ...] = ()
    read: Callable[[Fields], Settings | str] = lambda said: Settings()
    packages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Quantised:
    """The quantisation of one checkpoint: the row of `KINDS`, or one for what only transformers knows, and settings."""

    method: str
    kind: Kind
    settings: Settings

    @property
    def unpacked(self) -> bool:
        """Whether the weights are unpacked at load, so that the model is a dense one."""
        return bool(self.kind.layouts)

    def check_packages(self, name: str) -> None:
        """Refuse a kind whose packages are missing.

        Raises:
            NotFoundError: they are; `name` is what the sentence calls the model.
        """
        need(f"{name!r} in its original precision loads as it is; quantised ({self}) it", *self.kind.packages)

    def __str__(self) -> str:
        return self.kind.name


def quantised(name: str, config: PreTrainedConfig) -> Quantised | None:
    """What a config says of its weights; None for weights as they were trained.

    Raises:
        InputError: a kind that is not read here.   FormatError: a config that does not fit its kind.
    """
    said = next((one for one in _sayings(config) if one), None)
    if said is None:
        return None
    method = said.get("quant_method", "mlx" if {"bits", "group_size"} <= said.keys() else None)
    if said.get("load_in_4bit") or said.get("load_in_8bit"):
        method = "bitsandbytes"
    if method == "auto-round":
        method = AUTO_ROUND.get(str(said.get("packing_format")), method)
    if not isinstance(method, str) or not (method in KINDS or method in AUTO_QUANTIZATION_CONFIG_MAPPING):
        by = "in a way that their config.json does not name" if method is None else f"by {brief(method)}"
        raise InputError(
            f"the weights of {name!r} are quantised {by}, which transformers {transformers.__version__} can't read;"
            f" {INSTEAD}"
        )
    kind = KINDS.get(method, Kind(method))
    try:
        settings = kind.read(Fields(said, f"the quantization_config of {name!r}"))
    except FormatError as error:
        raise FormatError(f"{error}; {INSTEAD}") from error
    if isinstance(settings, str):
        raise InputError(
            f"the weights of {name!r} are quantised ({kind.name}) {settings}, which is not read; {INSTEAD}"
        )
    return Quantised(method, kind, settings)


def _sayings(config: PreTrainedConfig) -> list[Mapping[str, Any]]:
    text = config.get_text_config()
    found = [getattr(one, name, None) for one in (config, text) for name in ("quantization_config", "quantization")]
    return [one if isinstance(one, Mapping) else one.to_dict() for one in found if one]


def _fp8(said: Fields) -> Settings:
    return Settings(block=_block(said, "weight_block_size"))


def _modelopt(said: Fields) -> Settings | str:
    how = said.data.get("quant_algo")
    return Settings() if how in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN") else f"as {brief(how)}"


def _gptq(said: Fields) -> Settings | str:
    how = said.data.get("checkpoint_format", "gptq")
    return Settings(plus_one=how == "gptq") if how in ("gptq", "gptq_v2") else f"in the format {brief(how)}"


def _awq(said: Fields) -> Settings | str:
    bits, how = said.data.get("bits", 4), said.data.get("version", "gemm")
    if bits != 4:
        return f"in {brief(bits)} bits"
    return Settings() if str(how).lower() == "gemm" else f"in the version {brief(how)}"


def _compressed(said: Fields) -> Settings | str:
    groups = [Fields(one, f"a group of {said.what}") for one in said.object("config_groups").values()]
    for how in (said.data.get("format"), *(group.data.get("format") for group in groups)):
        if how is not None and how not in COMPRESSED:
            return f"in the format {brief(how)}"
    if said.data.get("transform_config"):
        return "with transforms of its activations"
    if (sparse := (said.maybe(said.object, "sparsity_config") or {}).get("format", "dense")) != "dense":
        return f"and sparse ({brief(sparse)})"
    weights = [Fields(group["weights"], f"the weights of {group.what}") for group in groups]
    blocks = {_block(one, "block_structure") for one in weights}
    if len(blocks) > 1:
        return "in blocks of several sizes"
    return Settings(block=blocks.pop() if blocks else None, bits=tuple(one.count("num_bits", 1, 8) for one in weights))


def _mlx(said: Fields) -> Settings | str:
    apart = {
        module: Fields(one, f"{module!r} of {said.what}")
        for module, one in said.data.items()
        if isinstance(one, Mapping)
    }
    for one in (said, *apart.values()):
        if (mode := one.data.get("mode", "affine")) != "affine":
            return f"in the mode {brief(mode)}"
    return Settings(
        group=said.count("group_size", 1), apart={key: one.count("group_size", 1) for key, one in apart.items()}
    )


def _block(said: Fields, key: str) -> tuple[int, int] | None:
    size = said.maybe(lambda key: said.counts(key, 1), key)
    if size is not None and len(size) != 2:
        raise FormatError(f"{key!r} of {said.what} has two numbers, rows and columns, not {brief(size)}")
    return None if size is None else (size[0], size[1])


KINDS = {
    "fp8": Kind("FP8", (EIGHT,), _fp8),
    "mxfp8": Kind("MXFP8", (EIGHT,), _fp8),
    "fbgemm_fp8": Kind("FP8 of FBGEMM", (EIGHT,)),
    "modelopt": Kind("ModelOpt", (EIGHT,), _modelopt),
    "compressed-tensors": Kind("compressed-tensors", (WORDS, EIGHT), _compressed),
    "gptq": Kind("GPTQ", (GPTQ,), _gptq),
    "awq": Kind("AWQ", (AWQ,), _awq),
    "mlx": Kind("MLX", (MLX,), _mlx),
    "bitsandbytes": Kind("bitsandbytes", packages=("bitsandbytes", "accelerate")),
    "torchao": Kind("torchao", packages=("torchao", "accelerate")),
}
