"""A device with the limits of Apple's MPS on a machine without one: after `install()`, tensors on "likemps" refuse

- float64 and complex128, which MPS does not have, also on the way from or to the CPU in one step with a move;
- operations that this PyTorch has no kernel for on MPS, by the table that it is built from (`native_functions.yaml`)
  and by what its own tests expect to fail there; also sparse tensors, for which MPS has few;
- tensors of the CPU beside their own, but for numbers and indices.

What a tensor holds lies on the CPU, where every operation is done, so that figures can be compared with those of the
CPU. Operations on tensors that were moved to the CPU are free to be in float64.

PyTorch lets a process have one such device, for good: what installs it runs in a process of its own.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path
from typing import Any

import torch
import torchgen
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from torchgen.gen import parse_native_yaml
from torchgen.model import DispatchKey

NAME = "likemps"
WIDE = (torch.float64, torch.complex128)
# A composite that looks for the fastest kernel of the device; MPS has its own, and plain arithmetic is the same here.
ATTENTION = torch.ops.aten._fused_sdp_choice.default
MIXED = ("aten::copy_", "aten::_copy_from", "aten::index.Tensor", "aten::index_put_", "aten::_index_put_impl_")


class RefusedOnMPSError(RuntimeError):
    """What MPS would not do."""


@functools.cache
def kernels() -> dict[str, bool]:
    """By the name of every operation whether MPS can do it: by a kernel of its own or of other operations."""
    root = Path(torchgen.__file__).parent / "packaged/ATen/native"
    parsed = parse_native_yaml(str(root / "native_functions.yaml"), str(root / "tags.yaml"))
    own = parsed.backend_indices[DispatchKey.MPS].index
    return {
        f"aten::{one.func.name}": one.func.name in own
        or one.structured_delegate in own
        or one.has_composite_kernel
        or one.func.name.name.base.startswith("_fused_sdp")
        for one in parsed.native_functions
        if str(one.func.name.name) not in unimplemented()
    }


@functools.cache
def unimplemented() -> set[str]:
    """What PyTorch's own tests expect to fail on MPS for lack of a kernel, whatever the type."""
    source = Path(torch.testing.__file__).parent / "_internal/common_mps.py"
    (found,) = (
        node.value
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "UNIMPLEMENTED_XFAILLIST"
    )
    assert isinstance(found, ast.Dict)
    rows = zip(found.keys, found.values, strict=True)
    names = {key.value for key, types in rows if isinstance(key, ast.Constant) and ast.unparse(types) == "None"}
    return {str(name).replace(".", "_") for name in names}


class OnMPS(torch.Tensor):
    """A tensor of the device; `held` is what it holds, on the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnMPS:
        if held.dtype in WIDE:
            raise RefusedOnMPSError(f"a {held.dtype} tensor on MPS")
        if held.layout != torch.strided:
            raise RefusedOnMPSError("a sparse tensor on MPS")
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=f"{NAME}:0",
            dispatch_sizes_strides_policy="sizes",
        )
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:
        return f"OnMPS({self.held!r})"

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, **_: Any) -> Any:
        raise RefusedOnMPSError("a tensor of MPS as an array; move it to the CPU first")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


aten = torch.ops.aten
SHAPE = {
    aten.sym_size.default: torch.Tensor.size,
    aten.size.default: torch.Tensor.size,
    aten.sym_stride.default: torch.Tensor.stride,
    aten.stride.default: torch.Tensor.stride,
    aten.sym_numel.default: torch.Tensor.numel,
    aten.numel.default: torch.Tensor.numel,
    aten.dim.default: torch.Tensor.dim,
    aten.sym_storage_offset.default: torch.Tensor.storage_offset,
    aten.storage_offset.default: torch.Tensor.storage_offset,
    aten.is_contiguous.default: torch.Tensor.is_contiguous,
    aten.is_contiguous.memory_format: lambda held, form: held.is_contiguous(memory_format=form),
    aten.is_strides_like_format.default: aten.is_strides_like_format.default,
    aten.is_non_overlapping_and_dense.default: aten.is_non_overlapping_and_dense.default,
}
"""What is asked of a tensor's shape, which operations in place may change."""

SEEN: set[str] = set()
"""The operations that were done on the device."""


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation with a tensor of the device among its arguments."""
    name = func.name()
    if func is ATTENTION:
        return 0
    if func in SHAPE:
        return SHAPE[func](args[0].held, *args[1:])
    if name == "aten::_to_copy":
        return moved(*args, **kwargs)
    if name in ("aten::copy_", "aten::_copy_from"):
        wide = {one.dtype for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)} & set(WIDE)
        if wide:
            raise RefusedOnMPSError(f"a copy between MPS and {wide.pop()}")
    SEEN.add(name)
    if not kernels().get(name, False):
        raise RefusedOnMPSError(f"{name} has no kernel for MPS")
    given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
    if name not in MIXED and any(not isinstance(one, OnMPS) and one.ndim for one in given):
        raise RefusedOnMPSError(f"{name} between tensors of MPS and of the CPU")
    if wide := [one.dtype for one in given if one.dtype in WIDE and one.ndim]:
        raise RefusedOnMPSError(f"{name} with {wide[0]} on MPS")
    if isinstance(kwargs.get("device"), torch.device):
        kwargs = kwargs | {"device": torch.device("cpu")}
    of = {id(one.held): one for one in given if isinstance(one, OnMPS)}
    held_args, held_kwargs = tree_map(lambda one: one.held if isinstance(one, OnMPS) else one, (args, kwargs))
    out = func(*held_args, **held_kwargs)
    if name == "aten::copy_" and not isinstance(args[0], OnMPS):
        return args[0]

    def put_back(one: Any) -> Any:
        return (of[id(one)] if id(one) in of else OnMPS(one)) if isinstance(one, torch.Tensor) else one

    return tree_map(put_back, out)


def moved(source: torch.Tensor, *, dtype: torch.dtype | None = None, device: Any = None, **layout: Any) -> torch.Tensor:
    """`Tensor.to`, away from the device or on it."""
    SEEN.add("aten::_to_copy")
    if dtype in WIDE:
        raise RefusedOnMPSError(f"a tensor of MPS to {dtype}; move it to the CPU first")
    held = source.held if isinstance(source, OnMPS) else source
    kept = {name: layout[name] for name in ("memory_format",) if name in layout}
    out = torch.ops.aten._to_copy(held, dtype=dtype, **kept)
    return out if device is not None and torch.device(device).type == "cpu" else OnMPS(out)


KEPT: list[torch.library.Library] = []
"""Registrations, which end with their library."""


def empty(size: Any, *, dtype: Any = None, **_: Any) -> torch.Tensor:
    """`torch.empty` on the device, which what makes tensors goes through."""
    return OnMPS(torch.empty(size, dtype=dtype or torch.get_default_dtype()))


def empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> torch.Tensor:
    return OnMPS(torch.empty_strided(size, stride, dtype=dtype or torch.get_default_dtype()))


def copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """What `torch.tensor` ends with, which hands nothing to classes of tensors."""
    return run(torch.ops.aten.copy_.default, (target, source), {})


def maker(name: str) -> Any:
    """An operation that makes a tensor of a size that it finds out, on the device."""

    def make(*args: Any, device: Any = None, pin_memory: Any = None, layout: Any = None, **kwargs: Any) -> torch.Tensor:
        SEEN.add(f"aten::{name}")
        base, _, overload = name.partition(".")
        return OnMPS(getattr(getattr(torch.ops.aten, base), overload or "default")(*args, **kwargs))

    return make


MAKERS = ("arange", "arange.start", "arange.start_step", "eye", "eye.m", "linspace", "randperm", "randperm.generator")


def install() -> set[str]:
    """Make the device; gives the names of the operations that are done on it, as they come."""
    _setup_privateuseone_for_python_backend(NAME)
    library = torch.library.Library("aten", "IMPL", "PrivateUse1")
    library.impl("empty.memory_format", empty)
    library.impl("empty_strided", empty_strided)
    library.impl("_copy_from", copy_from)
    for name in MAKERS:
        library.impl(name, maker(name))
    KEPT.append(library)
    return SEEN
