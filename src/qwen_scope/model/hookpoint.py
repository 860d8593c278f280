"""`HookPoint`: a place in the residual stream, and the names other tools give it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qwen_scope.errors import InputError

STREAMS = ("resid_post",)

_BARE = re.compile(r"(?:layer_?)?([0-9]+)")
_DOTTED = re.compile(
    r"(?:(?:base_model|model|language_model|text_model|transformer|decoder|gpt_neox)\.)*"
    r"(?:layers|blocks|h)\.([0-9]+)(?:\.(?:hook_)?([a-z_]+))?"
)
_FITS = "write it as 'layer12', '12', 'layers.12.resid_post', 'blocks.12.hook_resid_post' or 'model.layers.12'"


@dataclass(frozen=True, order=True)
class HookPoint:
    """A place in the residual stream: after which decoder block.

    Hashable, ordered by layer. Layers count from 0. `resid_post` is the output of the block as the next block
    receives it: after the last block it is not yet normed.

    Raises:
        InputError: the layer is not a number from 0 up, or the stream is one this project does not read.
    """

    layer: int
    stream: str = "resid_post"

    def __post_init__(self) -> None:
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 0:
            raise InputError(f"a layer is a whole number from 0 up, not {self.layer!r}")
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
        as `model.layers.12`, `model.language_model.layers.12` or `language_model.model.layers.12`.

        Raises:
            InputError: the name is none of these, or names a stream this project does not read.
        """
        name = text.strip()
        if match := _BARE.fullmatch(name):
            return cls(int(match[1]))
        if match := _DOTTED.fullmatch(name):
            return cls(int(match[1]), match[2] or "resid_post")
        raise InputError(f"{text!r} is not a hook point; {_FITS}")

    def __str__(self) -> str:
        return f"layers.{self.layer}.{self.stream}"

    @property
    def transformer_lens(self) -> str:
        """The name TransformerLens and sae_lens use, such as `blocks.12.hook_resid_post`."""
        return f"blocks.{self.layer}.hook_{self.stream}"
