"""The fp32 product, by the library that is fast on this CPU."""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

# Of weights in fp32; on an EPYC 2 to 8 MiB are equally fast, and 64 MiB ten times as slow for one row.
WIDENED_BYTES = 4 * 2**20


@torch.no_grad()
def linear_fp32(
    x: Float[Tensor, "n d_model"], W: Float[Tensor, "d_sae d_model"], b: Float[Tensor, " d_sae"]
) -> Float[Tensor, "n d_sae"]:
    """`x @ W.T + b` of fp32 tensors, without a gradient; `torch.nn.functional.linear` is its reference.

    PyTorch's own choice for fp32 on x86 is Intel's MKL, which computes at less than half of what other makers' CPUs
    can do, and reads the weights for one row at less than half of what their memory gives. There it goes to oneDNN, by
    the operator that `torch.compile` uses for linear layers.
    """
    single = x.dtype == W.dtype == b.dtype == torch.float32
    if single and x.device.type == "cpu" and len(x) and W.is_contiguous() and mkl_is_slow():
        return torch.ops.mkldnn._linear_pointwise(x, W.detach(), b.detach(), "none", [], "")
    return torch.nn.functional.linear(x, W, b)


@torch.no_grad()
def linear_widened(
    x: Float[Tensor, "n d_model"], W: Float[Tensor, "d_sae d_model"], b: Float[Tensor, " d_sae"]
) -> Float[Tensor, "n d_sae"]:
    """`linear_fp32` of weights of any type, widened to fp32 in pieces that stay in a CPU's cache.

    Widening more at once writes fresh memory, which costs a CPU about ten times the product of a single row.
    """
    if W.dtype == torch.float32 or W.device.type != "cpu":
        return linear_fp32(x, W.float(), b)
    out = torch.empty(len(x), len(W), device=W.device)
    step = max(1, WIDENED_BYTES // (4 * W.shape[1]))
    for start in range(0, len(W), step):
        part = slice(start, start + step)
        out[:, part] = linear_fp32(x, W[part].float(), b[part])
    return out


@lru_cache(maxsize=1)
def mkl_is_slow() -> bool:
    """Whether products go to MKL on a CPU that is not Intel's, and oneDNN is there to take them."""
    name = str(torch.cpu.get_capabilities().get("cpu_name", "")).lower()
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return torch.backends.mkl.is_available() and there and bool(name) and "intel" not in name and "xeon" not in name
