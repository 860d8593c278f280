"""Backward passes by other rules than the derivative, and routing that is held: forward values stay to the bit.

RelP (arXiv 2508.21258) propagates relevance instead of slopes, with the rules of layer-wise relevance propagation:

| part | rule |
|---|---|
| norm | its scale is a constant |
| activation function | passes the ratio of its output to its input |
| gated product | half to each factor |
| attention, softmax | patterns are constants: values carry, queries and keys do not |
| Gated DeltaNet | queries, keys, gates and decays are constants; values carry, through the plain PyTorch path |
| router of experts | its choice and its weights are constants |
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from qwen_scope.errors import InputError

from .families import PARTS, blocks

_ON: ContextVar[bool] = ContextVar("qwen_scope_relp", default=False)
_IN_ROUTER: ContextVar[bool] = ContextVar("qwen_scope_in_router", default=False)

# Gates, patterns and the scale of norms, wherever a family computes them.
HELD = {torch.rsqrt, Tensor.rsqrt, torch.sigmoid, Tensor.sigmoid, F.sigmoid, F.softplus, F.softmax, torch.softmax}
HELD |= {Tensor.softmax}
# Activation functions with their slope at 0, which stands in where the ratio is 0 / 0.
RATIO = {F.silu: 0.5, F.gelu: 0.5, F.relu: 0.0, torch.relu: 0.0, Tensor.relu: 0.0, torch.tanh: 1.0, Tensor.tanh: 1.0}
PLAIN = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule", "causal_conv1d_fn")
TOP_K = {torch.topk, Tensor.topk}


@contextmanager
def relevance(model: nn.Module) -> Iterator[None]:
    """Within the block, a forward pass is built so that its backward pass follows RelP's rules.

    Only this context's passes are; the backward pass itself may come after the block.

    Raises:
        InputError: a block mixes tokens in a way that the rules do not know.
    """
    with ExitStack() as stack:
        for place, hook, before in _hooks(model):
            add = place.register_forward_pre_hook if before else place.register_forward_hook
            stack.callback(add(hook).remove)
        stack.enter_context(plain_kernels(model))
        stack.enter_context(_Relevance())
        token = _ON.set(True)
        try:
            yield
        finally:
            _ON.reset(token)


@contextmanager
def recomputed(model: nn.Module) -> Iterator[None]:
    """Within the block, blocks keep their inputs alone and are computed again in the backward pass.

    The backward pass has to come within the block, and within that of `relevance` where that is around it. Before each
    block memory that was freed goes back to the system: C's allocator keeps pieces of up to 32 MiB in its heap, where
    tensors that live longer keep them from joining, and a pass over many blocks came to three times what it holds.
    """

    def again() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
        return ExitStack(), _Again() if _ON.get() else ExitStack()

    def wrapped(forward: Callable[..., Any]) -> Callable[..., Any]:
        def begun(*args: Any, **kwargs: Any) -> Any:
            _trim()
            return forward(*args, **kwargs)

        def run(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            return checkpoint(begun, *args, use_reentrant=False, preserve_rng_state=False, context_fn=again, **kwargs)

        return run

    with ExitStack() as stack:
        for block in blocks(model):
            own = block.__dict__.get("forward")
            stack.callback(partial(setattr, block, "forward", own) if own else partial(delattr, block, "forward"))
            block.forward = wrapped(block.forward)
        yield


@cache
def _trimmer() -> Callable[[int], int] | None:
    """The GNU C library's function that returns freed pages; None on other systems, whose allocators do so unasked."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # no such function; no handle of the program itself (Windows)
        return None


def _trim() -> None:
    if (trim := _trimmer()) is not None:
        trim(0)


@contextmanager
def plain_kernels(model: nn.Module) -> Iterator[None]:
    """Within the block, Gated DeltaNet runs its plain PyTorch path, whatever fused kernels are installed."""
    homes = {sys.modules[type(module).__module__] for module in model.modules() if _is_delta(module)}
    changed: list[tuple[Any, str, Any]] = []
    for home in homes:
        for name in PLAIN:
            fused = getattr(home, name, None)
            if (plain := getattr(fused, "__wrapped__", None)) is not None:
                changed.append((home, name, fused))
                setattr(home, name, plain)
    try:
        yield
    finally:
        for home, name, fused in changed:
            setattr(home, name, fused)


class Routing:
    """The experts that a forward pass chose, in the order in which its routers ran."""

    def __init__(self) -> None:
        self.chosen: list[Tensor] = []

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[None]:
        """Within the block, one forward pass of one row is recorded."""
        self.chosen = []
        with _router_flags(model), _Chosen(self.chosen, replay=False):
            yield

    @contextmanager
    def held(self, model: nn.Module) -> Iterator[None]:
        """Within the block, one forward pass routes as the recorded one did; a batch holds copies of its row."""
        with _router_flags(model), _Chosen(self.chosen, replay=True):
            yield


def has_routers(model: nn.Module) -> bool:
    """Whether the model routes tokens to experts."""
    return any(True for _ in _routers(model))


class _Relevance(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in HELD:
            return out.detach()
        if func in RATIO and out.requires_grad:
            x = args[0] if args else (kwargs or {})["input"]
            still = x.detach()
            ratio = torch.where(still == 0, RATIO[func], out.detach() / torch.where(still == 0, 1, still))
            return out.detach() + ratio * (x - still)
        return out


class _Again:
    """RelP's rules where a block is computed again; to be entered many times.

    A backward pass that begins under a mode runs without it, and on an accelerator in a thread of autograd's.
    """

    def __init__(self) -> None:
        self.entered: list[ExitStack] = []

    def __enter__(self) -> None:
        stack = ExitStack()
        stack.callback(_ON.reset, _ON.set(True))
        stack.enter_context(_Relevance())
        self.entered.append(stack)

    def __exit__(self, *error: object) -> None:
        self.entered.pop().close()


class _Chosen(TorchFunctionMode):
    """Records what `topk` chooses inside a router, or gives back what was recorded."""

    def __init__(self, chosen: list[Tensor], replay: bool) -> None:
        super().__init__()
        self.chosen, self.replay, self.next = chosen, replay, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func not in TOP_K or not _IN_ROUTER.get():
            return out
        if not self.replay:
            self.chosen.append(out.indices)
            return out
        known = self.chosen[self.next]
        self.next += 1
        known = known.repeat(out.indices.shape[0] // known.shape[0], *([1] * (known.ndim - 1)))
        return torch.return_types.topk((args[0].gather(-1, known), known))


@contextmanager
def _router_flags(model: nn.Module) -> Iterator[None]:
    def enter(*_: Any) -> None:
        _IN_ROUTER.set(True)

    def leave(*_: Any) -> None:
        _IN_ROUTER.set(False)

    with ExitStack() as stack:
        for router in _routers(model):
            stack.callback(router.register_forward_pre_hook(enter).remove)
            stack.callback(router.register_forward_hook(leave).remove)
        yield


def _routers(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        children = dict(module.named_children())
        if "experts" in children:
            yield from (children[name] for name in ("gate", "router") if name in children)


def _is_delta(module: nn.Module) -> bool:
    return hasattr(module, "in_proj_qkv") or hasattr(module, "in_proj_qkvz")


def _hooks(model: nn.Module) -> Iterator[tuple[nn.Module, Callable[..., Any], bool]]:
    """Where a hook goes, the hook, and whether it runs before the module."""
    for layer, block in enumerate(blocks(model)):
        children = dict(block.named_children())
        mixers = [children[name] for name in PARTS["attn_out"] if name in children]
        if not mixers or not all(_is_delta(one) or hasattr(one, "q_proj") for one in mixers):
            held = ", ".join(type(child).__name__ for child in block.children())
            raise InputError(
                f"RelP has no rule for block {layer}, which holds {held}: it knows attention with q_proj, k_proj and"
                " v_proj, and Gated DeltaNet; use the method 'gradient' or 'ig'"
            )
        for mixer in mixers:
            if not _is_delta(mixer):
                yield from ((getattr(mixer, name), _hold(), False) for name in ("q_proj", "k_proj"))
                continue
            for name in ("in_proj_z", "in_proj_b", "in_proj_a", "in_proj_ba"):
                if hasattr(mixer, name):
                    yield getattr(mixer, name), _hold(), False
            name = "in_proj_qkv" if hasattr(mixer, "in_proj_qkv") else "in_proj_qkvz"
            yield getattr(mixer, name), _hold(_free(mixer)), False
        for module in block.modules():
            if hasattr(module, "gate_up_proj") or (hasattr(module, "gate_proj") and hasattr(module, "up_proj")):
                yield module, _halve, True


def _free(mixer: Any) -> Sequence[bool]:
    """Which outputs of a Gated DeltaNet's joint projection are values, through which relevance flows."""
    if hasattr(mixer, "in_proj_qkv"):
        return [False] * (2 * mixer.key_dim) + [True] * mixer.value_dim
    values = mixer.num_v_heads // mixer.num_k_heads * mixer.head_v_dim
    one = [False] * (2 * mixer.head_k_dim) + [True] * values + [False] * values
    return one * mixer.num_k_heads


def _hold(free: Sequence[bool] | None = None) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor | None:
        if not _ON.get():  # another thread's forward pass
            return None
        return out.detach() if free is None else torch.where(torch.tensor(free, device=out.device), out, out.detach())

    return hook


def _halve(module: nn.Module, args: Any) -> Any:
    """A gated MLP with ratios for slopes is a product of two linear maps: half its input's gradient is the rule's."""
    if not _ON.get() or not args:
        return None
    x = args[0]
    return (x.detach() + 0.5 * (x - x.detach()), *args[1:])
