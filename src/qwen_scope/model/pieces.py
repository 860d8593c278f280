"""A long text through the model a piece at a time, so that memory grows with its KV cache alone."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from qwen_scope.errors import check_count

from .families import decoder, input_device, text_config
from .hookpoint import HookPoint
from .hooks import capture, check_inputs, distinct, run_to_deepest


def capture_pieces(
    model: nn.Module, input_ids: Int[Tensor, "1 seq"], hook_points: Iterable[HookPoint], tokens: int
) -> Iterator[dict[HookPoint, Float[Tensor, "1 piece d_model"]]]:
    """The residuals of one text, piece after piece of at most `tokens` tokens.

    Beside the piece at work, what is held is the keys and values of the layers that are read, as in generation; neither
    logits nor a mask of all tokens against all are made. A text of one piece is `capture` itself, to the bit. Of a
    longer one the residuals differ in rounding from those of one pass, since the kernels sum in another order.

    A model that keeps its state in another way than as `past_key_values` reads the text in one pass.

    Raises:
        InputError, NotFoundError, FormatError: as `capture`.
    """
    check_count("tokens", tokens)
    points, body = distinct(hook_points), decoder(model)
    takes = inspect.signature(body.forward).parameters
    n = input_ids.shape[1]
    if n <= tokens or "past_key_values" not in takes:
        yield capture(model, input_ids, points)
        return
    check_inputs(model, input_ids, None)
    place = input_device(model)
    cache = DynamicCache(config=text_config(model))
    for start in range(0, n, tokens):
        ids = input_ids[:, start : start + tokens].to(place)
        inputs = {"input_ids": ids, "past_key_values": cache, "use_cache": True}
        if "position_ids" in takes:
            inputs["position_ids"] = torch.arange(start, start + ids.shape[1], device=place)[None]
        yield run_to_deepest(model, body, inputs, points)
