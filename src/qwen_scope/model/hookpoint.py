"""`HookPoint`: a place in the residual stream, and the names other tools give it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qwen_scope.errors import InputError, MismatchError, brief

STREAMS = ("resid_post", "mlp_out", "attn_out")

_BARE = re.compile(r"(?:layer_?)?([0-9]{1,9})")
_DOTTED = re.compile(
    r"(?:(?:base_model|model|language_model|text_model|transformer|decoder|gpt_neox)\.)*"
    r"(?:layers|blocks|h)\.([0-9]{1,9})(?:\.(?:hook_)?([a-z_]+))?"
)
# What module paths call the two parts of a block.
_PARTS = {"mlp": "mlp_out", "feed_forward": "mlp_out"} | dict.fromkeys(
    ("self_attn", "linear_attn", "attn", "attention", "self_attention"), "attn_out"
)
_FITS = "write it as 'layer12', '12', 'layers.12.resid_post', 'blocks.12.hook_resid_post' or 'model.layers.12'"


@dataclass(frozen=True, order=True)
class HookPoint:
    """A place where `d_model` numbers per token can be read and changed: which decoder block, and what of it.

    Hashable, ordered by layer. Layers count from 0.

    | stream | what it is |
    |---|---|
    | `resid_post` | the output of the block as the next block receives it: after the last block it is not yet normed |
    | `mlp_out` | the output of the block's MLP, of all its experts together where it has several |
    | `attn_out` | the output of the block's attention, linear attention in the layers that have it instead |

    The last two are what the module of that name returns: where a family norms it once more before it is added to the
    residual (Gemma 2 and 3), before that norm.

    Raises:
        InputError: the layer is not a number from 0 up, or the stream is one this project does not read.
    """

    layer: int
    stream: str = "resid_post"

    def __post_init__(self) -> None:
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 0:
            raise InputError(f"a layer must be a whole number of at least 0; got {self.layer!r}")
        if self.stream == "resid_pre" and self.layer > 0:
            raise InputError(
                f"the stream 'resid_pre' is not read by that name: 'layers.{self.layer}.resid_pre' is the same"
                f" residual as 'layers.{self.layer - 1}.resid_post'"
            )
        if self.stream not in STREAMS:
            raise InputError(f"unknown stream {self.stream!r}; this project reads {', '.join(map(repr, STREAMS))}")

    @classmethod
    def parse(cls, text: str) -> HookPoint:
        """The hook point a name means, whichever tool wrote the name.

        Accepts `layer12`, `12`, `layers.12`, `layers.12.resid_post`, `blocks.12.hook_resid_post` and module paths such
        as `model.layers.12`, `model.language_model.layers.12`, `language_model.model.layers.12` or
        `model.layers.12.mlp`.

        Raises:
            InputError: the name is none of these, or names a stream this project does not read.
        """
        name = text.strip()
        if match := _BARE.fullmatch(name):
            return cls(int(match[1]))
        if match := _DOTTED.fullmatch(name):
            stream = match[2] or "resid_post"
            return cls(int(match[1]), _PARTS.get(stream, stream))
        raise InputError(f"{brief(text)} is not a hook point; {_FITS}")

    @classmethod
    def read_by(cls, hook_point: str | None, layer: int) -> HookPoint:
        """Where an SAE of `layer` reads whose files name this hook point: the block's output if they name none.

        Raises:
            MismatchError: the hook point is of another layer.
        """
        point = cls(layer) if hook_point is None else cls.parse(hook_point)
        if point.layer != layer:
            raise MismatchError(f"the SAE that is used at layer {layer} reads {point}")
        return point

    def __str__(self) -> str:
        return f"layers.{self.layer}.{self.stream}"

    @property
    def transformer_lens(self) -> str:
        """The name TransformerLens and sae_lens use, such as `blocks.12.hook_resid_post`."""
        return f"blocks.{self.layer}.hook_{self.stream}"
