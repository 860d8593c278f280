"""Reading and changing the residual stream and what is written to it: the only place that touches a module's hooks.

Hooks sit on a shared model, so each is bound to the context (thread or task) that opened it: a forward pass in another
thread neither sees nor feels it. To run the model in a thread of its own inside a `with` block, hand the context over:
`Thread(target=contextvars.copy_context().run, args=(model.generate, ...))`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from qwen_scope.errors import FormatError, InputError
from qwen_scope.model.families import blocks, check_layers, decoder, input_device, part_of, text_config
from qwen_scope.model.hookpoint import HookPoint

Mask = Int[Tensor, "batch seq"] | Bool[Tensor, "batch seq"]

_ACTIVE: ContextVar[frozenset[object]] = ContextVar("qwen_scope_active_hooks", default=frozenset())
_POSITIONS: ContextVar[Tensor | None] = ContextVar("qwen_scope_position_ids", default=None)


class _Deepest(BaseException):
    """Raised by `capture` once it has all it needs; no `except Exception` on the way may swallow it."""


@contextmanager
def reading(
    model: nn.Module, hook_points: Iterable[HookPoint], receive: Callable[[HookPoint, Tensor], None]
) -> Iterator[None]:
    """Within the block, hand every residual to `receive(hook_point, h)` as the model runs.

    `h` is the live output of the block, `(batch, seq, d_model)` in the model's dtype and on that block's device; with a
    KV cache `seq` counts only the new tokens. A reader opened inside a `changing` block sees the changed stream.

    Raises:
        NotFoundError: a hook point names a layer the model does not have, or a part that its block does not have.
        InputError: the model is compiled, or at the end of the block a hook point has never been reached, or the block
            ends in another context than it began in.
        FormatError: a block's output is not a residual of shape `(batch, seq, d_model)`.
    """

    def reader(point: HookPoint) -> Callable[[Tensor], None]:
        return lambda h: receive(point, h)

    with _attached(model, {point: reader(point) for point in hook_points}):
        yield


@contextmanager
def changing(model: nn.Module, changes: Mapping[HookPoint, Callable[[Tensor, HookPoint], Tensor]]) -> Iterator[None]:
    """Within the block, every residual `h` at a hook point becomes `changes[hook_point](h, hook_point)`.

    `h` is `(batch, seq, d_model)`; with a KV cache `seq` counts only the new tokens, and `token_positions()` says which
    they are. The function returns a tensor of the same shape, dtype and device, and leaves `h` itself alone; returning
    `h` changes nothing, to the bit. Blocks opened one inside the other apply in the order they were opened.

    Raises:
        NotFoundError: a hook point names a layer the model does not have, or a part that its block does not have.
        InputError: the model is compiled, a function returns something of another shape, dtype or device, or at the end
            of the block a hook point has never been reached.
        FormatError: a block's output is not a residual of shape `(batch, seq, d_model)`.
    """

    def changer(point: HookPoint, change: Callable[[Tensor, HookPoint], Tensor]) -> Callable[[Tensor], Tensor]:
        def apply(h: Tensor) -> Tensor:
            new = change(h, point)
            if not isinstance(new, Tensor) or (new.shape, new.dtype, new.device) != (h.shape, h.dtype, h.device):
                raise InputError(
                    f"the change at {point} turned {_describe(h)} into {_describe(new)}; it has to keep shape, dtype"
                    " and device"
                )
            return new

        return apply

    with _attached(model, {point: changer(point, change) for point, change in changes.items()}):
        yield


def capture(
    model: nn.Module,
    input_ids: Int[Tensor, "batch seq"],
    hook_points: Iterable[HookPoint],
    attention_mask: Mask | None = None,
    *,
    grad: bool = False,
    **model_inputs: Any,
) -> dict[HookPoint, Float[Tensor, "batch seq d_model"]]:
    """The residuals of several layers from one forward pass that stops after the deepest block it needs.

    The LM head never runs and no KV cache is kept. Position ids come from the attention mask (1 for a token, 0 for
    padding, on either side), so a padded row gives what it gives alone; rows at padding hold no meaning. Each residual
    stays on the device of its block. The model runs in the mode it is in: call `model.eval()` first where dropout is
    not wanted.

    Args:
        grad: keep the graph, for losses on features.
        model_inputs: further inputs of the model's own forward, such as `pixel_values`; position ids are then the
            model's affair.

    Raises:
        NotFoundError: a hook point names a layer the model does not have, or a part that its block does not have.
        InputError: no hook point, ids outside the vocabulary, a mask that does not fit, or a compiled model.
        FormatError: a block's output is not a residual of shape `(batch, seq, d_model)`.
    """
    points = distinct(hook_points)
    check_inputs(model, input_ids, attention_mask)
    body = model if model_inputs else decoder(model)
    place = input_device(model)
    inputs: dict[str, Any] = {"input_ids": input_ids.to(place), "use_cache": False, **model_inputs}
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask.to(place, torch.int64)
        if not model_inputs and "position_ids" in inspect.signature(body.forward).parameters:
            inputs["position_ids"] = positions_from_mask(inputs["attention_mask"])
    return run_to_deepest(model, body, inputs, points, grad=grad)


def run_to_deepest(
    model: nn.Module, body: nn.Module, inputs: Mapping[str, Any], points: list[HookPoint], *, grad: bool = False
) -> dict[HookPoint, Float[Tensor, "batch seq d_model"]]:
    """The residuals of a forward pass of `body`, the model or its decoder, that stops once it has them all."""
    taken: dict[HookPoint, Tensor] = {}

    def take(point: HookPoint) -> Callable[[Tensor], None]:
        def keep(h: Tensor) -> None:
            taken[point] = h
            if len(taken) == len(points):
                raise _Deepest

        return keep

    hooks = _attached(model, {point: take(point) for point in points})
    with hooks, torch.set_grad_enabled(grad), suppress(_Deepest):
        body(**inputs)
    return {point: taken[point] for point in points}


def distinct(hook_points: Iterable[HookPoint]) -> list[HookPoint]:
    """Each hook point once; raise InputError where there is none."""
    points = list(dict.fromkeys(hook_points))
    if not points:
        raise InputError("capture needs at least one hook point, such as HookPoint(0)")
    return points


def positions_from_mask(attention_mask: Mask) -> Int[Tensor, "batch seq"]:
    """The position of every token within its own row, counted from 0 and not counting padding; 0 at padding."""
    return (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 0)


def token_positions() -> Int[Tensor, "batch seq"] | None:
    """Inside a function given to `reading` or `changing`: the position of each row of `h` within its own sequence.

    Counted from 0, padding not counted, right under a KV cache; the batch is 1 where all rows agree. None where the
    model does not tell its blocks, or outside such a function. At padding the value holds no meaning.
    """
    positions = _POSITIONS.get()
    return positions if positions is not None and positions.ndim == 2 else None


@contextmanager
def _attached(model: nn.Module, callbacks: Mapping[HookPoint, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
    """Hooks on the blocks of the hook points for the length of the block, felt by this context alone."""
    check_layers(model, *(point.layer for point in callbacks))
    layers = blocks(model)
    hooked = {point: part_of(layers[point.layer], point.layer, point.stream) for point in callbacks}
    _refuse_compiled(model, list(hooked.values()))
    session = object()
    positions: dict[int, Any] = {}
    fired: set[HookPoint] = set()
    handles = []
    try:
        for point, callback in callbacks.items():
            if hooked[point] is not (block := layers[point.layer]):
                listen = _listener(session, point.layer, positions)
                handles.append(block.register_forward_pre_hook(listen, with_kwargs=True))
            hook = _hook(session, point, callback, fired, positions)
            handles.append(hooked[point].register_forward_hook(hook, with_kwargs=True))
        _ACTIVE.set(_ACTIVE.get() | {session})
        yield
        here = session in _ACTIVE.get()
    finally:
        # not reset(token): a generator that holds this block open may be closed in another context
        _ACTIVE.set(_ACTIVE.get() - {session})
        for handle in handles:
            handle.remove()
    if not here:
        raise InputError(
            "the block was opened in another thread or task and ends in this one, where the model ran without its"
            " hooks; run a whole generator in one context, such as with qwen_scope.steer.stream"
        )
    missed = [str(point) for point in callbacks if point not in fired]
    if missed:
        raise InputError(
            f"the residual at {', '.join(missed)} was never reached: inside the block the model did not run, ran in"
            " another thread (hand it contextvars.copy_context()), stopped before that layer, or bypasses its blocks"
        )


@contextmanager
def packed_head(model: nn.Module) -> Iterator[None]:
    """Within the block, the LM head reads rows that lie next to each other in memory.

    The last residual of every row is a view with a stride as long as the text, for which PyTorch's matrix product in
    half precision on the CPU takes a hundred times as long: a second per prompt for a vocabulary of 150,000. Other
    types and devices, and models without an LM head, run as they are.
    """
    find: Any = getattr(model, "get_output_embeddings", None)
    head = find() if find else None
    if not isinstance(head, nn.Module):
        yield
        return

    def pack(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        x = args[0] if args else None
        if not isinstance(x, Tensor) or x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
            return None
        return (x.clone(memory_format=torch.contiguous_format), *args[1:])

    handle = head.register_forward_pre_hook(pack)
    try:
        yield
    finally:
        handle.remove()


def _listener(session: object, layer: int, positions: dict[int, Any]) -> Callable[..., None]:
    """Keeps the position ids that a block is given, which it does not pass on to all of its parts."""

    def listen(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if session in _ACTIVE.get():
            positions[layer] = kwargs.get("position_ids")

    return listen


def _hook(
    session: object,
    point: HookPoint,
    callback: Callable[[Tensor], Tensor | None],
    fired: set[HookPoint],
    positions: Mapping[int, Any],
) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, *rest: Any) -> Any:
        if session not in _ACTIVE.get():  # another thread's forward pass; it may even race with the removal
            return None
        kwargs, output = rest
        h = output[0] if isinstance(output, tuple) else output
        if not isinstance(h, Tensor) or h.ndim != 3:
            raise FormatError(
                f"{_place(point)} ({type(module).__name__}) gives {_describe(h)}, not a residual of shape"
                " (batch, seq, d_model)"
            )
        fired.add(point)
        # kept by the listener where the hooked module is a part of the block
        token = _POSITIONS.set(positions.get(point.layer, kwargs.get("position_ids")))
        try:
            new = callback(h)
        finally:
            _POSITIONS.reset(token)
        if new is None or new is h:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return hook


def _refuse_compiled(model: nn.Module, hooked: list[nn.Module]) -> None:
    """Compiled code may have been traced without our hooks and would then run past them."""
    for module in model.modules():
        compiled = "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None
        if compiled and any(block is inner for inner in module.modules() for block in hooked):
            raise InputError(
                f"{type(module).__name__} is compiled, and hooks on a compiled model may silently do nothing;"
                " pass the model as it was before torch.compile"
            )


def check_inputs(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """Raise InputError for ids or a mask that the model can't read."""
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise InputError(f"input_ids has shape {tuple(input_ids.shape)}; it has to be (batch, seq), neither empty")
    vocab = text_config(model).vocab_size
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= vocab:
        raise InputError(f"token id {low if low < 0 else high} is outside the model's vocabulary of {vocab}")
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape:
            raise InputError(
                f"the attention mask has shape {tuple(attention_mask.shape)}, the input ids {tuple(input_ids.shape)}"
            )
        empty = (attention_mask.sum(-1) == 0).nonzero()
        if len(empty):
            raise InputError(f"row {int(empty[0])} of the attention mask holds no token")
    peft = getattr(model, "active_peft_config", None)
    if getattr(peft, "is_prompt_learning", False):
        raise InputError("the adapter adds virtual tokens to the prompt, so positions would not match the text")


def _place(point: HookPoint) -> str:
    return f"block {point.layer}" + (f", {point.stream}" if point.stream != "resid_post" else "")


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor {tuple(value.shape)} on {value.device}"
    return f"a {type(value).__name__}"
