"""SAEBench's own kind of SAE, made from one of ours: what its evaluations take as a custom SAE."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from qwen_scope.errors import InputError, NotFoundError
from qwen_scope.model import HookPoint
from qwen_scope.sae import SAE

HOOKS = {"resid_post": "hook_resid_post", "mlp_out": "hook_mlp_out", "attn_out": "hook_attn_out"}
"""What TransformerLens calls the streams."""


def scope_sae(sae: SAE, model_name: str, layer: int | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """An SAE as SAEBench takes it: a `sae_bench.custom_saes.base_sae.BaseSAE` that encodes as ours does.

    SAEBench takes decoder directions of length 1, so activations are stated in those units and the reconstruction is
    the same; `W_enc` and `b_enc` are scaled alike. Its models are to be read without processing
    (`HookedTransformer.from_pretrained_no_processing`), which is how SAEBench reads them: only then are residuals the
    model's own.

    Args:
        model_name: what TransformerLens calls the language model.
        layer: where it is read, if its files don't say.
        dtype: of the weights that SAEBench sees; the encoder computes in fp32 in any case.

    Raises:
        NotFoundError: sae-bench is not installed.
        InputError: neither the files of the SAE nor `layer` tell the layer.
    """
    layer = sae.identity.layer if layer is None else layer
    if layer is not None:
        point = HookPoint.read_by(sae.hook_point, layer)
    elif sae.hook_point is not None:
        point = HookPoint.parse(sae.hook_point)
    else:
        raise InputError("the files of this SAE don't say which layer it reads; name it with layer=")
    if find_spec("sae_bench") is None:
        raise NotFoundError("sae-bench is not installed: pip install sae-bench, in an environment of its own")
    return _kind()(sae, model_name, point, dtype)


@cache
def _kind() -> type[Any]:
    """The class; defined when it is asked for, since its parent is in another package."""
    from sae_bench.custom_saes.base_sae import BaseSAE  # pyright: ignore[reportMissingImports]

    class ScopeSAE(BaseSAE):
        def __init__(self, sae: SAE, model_name: str, point: HookPoint, dtype: torch.dtype) -> None:
            self.scope_sae = sae  # first: SAEBench's constructor moves what is there
            name = f"blocks.{point.layer}.{HOOKS[point.stream]}"
            super().__init__(sae.d_model, sae.d_sae, model_name, point.layer, sae.device, dtype, name)
            lengths = torch.linalg.vector_norm(sae.W_dec.detach().float(), dim=0)
            lengths = torch.where(lengths > 0, lengths, torch.ones_like(lengths))
            self.register_buffer("lengths", lengths)
            with torch.no_grad():
                self.W_enc.copy_((sae.W_enc.float() * lengths[:, None]).T)
                self.W_dec.copy_((sae.W_dec.float() / lengths).T)
                self.b_enc.copy_(sae.b_enc.float() * lengths)
                self.b_dec.copy_(sae.b_dec.float())
            self.cfg.architecture = sae.architecture
            self.cfg.apply_b_dec_to_input = False

        def encode(self, x: Tensor) -> Tensor:
            """Activations of all features, `(..., d_sae)`, as its evaluations want them."""
            return (self.scope_sae.encode(x.detach()).to_dense() * self.lengths).to(x.dtype)

        def decode(self, feature_acts: Tensor) -> Tensor:
            """The reconstruction of activations that may have been changed, `(..., d_model)`."""
            return feature_acts @ self.W_dec + self.b_dec

        def forward(self, x: Tensor) -> Tensor:
            return self.decode(self.encode(x))

        def to(self, *args: Any, **kwargs: Any) -> ScopeSAE:
            super().to(*args, **kwargs)
            self.scope_sae = self.scope_sae.to(self.W_dec.device)
            return self

    return ScopeSAE
