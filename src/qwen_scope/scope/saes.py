"""The SAEs of a scope: one per layer, read on first use, kept as long as they fit."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator

import torch

from qwen_scope.errors import MismatchError, NotFoundError
from qwen_scope.model import HookPoint
from qwen_scope.sae import SAE, join_group, layers_of, load_sae, slice_sae

CACHE_BYTES = 8 * 10**9


class SAEs:
    """`saes[layer]`, read on first use; the least recently used leave when all together exceed `cache_bytes`.

    Safe to share between threads. The one asked for last always stays, even if it alone is larger.
    """

    def __init__(
        self,
        source: str,
        *,
        d_model: int,
        k: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        cache_bytes: int = CACHE_BYTES,
        sliced: bool = False,
    ) -> None:
        """Name the SAEs; nothing but the list of layers is read yet.

        Args:
            sliced: each process of `torchrun` holds its slice of the features.

        Raises:
            NotFoundError: the source does not exist or holds no SAE.   InputError: not started by `torchrun`.
        """
        self.group = join_group() if sliced else None
        self.source, self.d_model, self.k, self.device, self.dtype = source, d_model, k, device, dtype
        self.cache_bytes = cache_bytes
        self.layers = list(layers_of(source))
        self._held: OrderedDict[int, SAE] = OrderedDict()
        self._points: dict[int, HookPoint] = {}
        self._lock = threading.Lock()
        self._joins: list[Callable[[int, SAE], object]] = []

    def __getitem__(self, layer: int) -> SAE:
        """The SAE of a layer.

        Raises:
            NotFoundError: there is none for this layer.
            MismatchError: it belongs to a model of another width.
        """
        if layer not in self.layers:
            raise NotFoundError(f"{self.source} has no SAE for layer {layer}; it has layers {brief(self.layers)}")
        with self._lock:
            if layer not in self._held:
                self._held[layer] = self._read(layer)
            self._held.move_to_end(layer)
            while len(self._held) > 1 and self.nbytes > self.cache_bytes:
                self._held.popitem(last=False)
            return self._held[layer]

    def tell(self, join: Callable[[int, SAE], object]) -> None:
        """Call `join` with layer and SAE whenever one is opened: the place where it meets its model, or a store."""
        self._joins.append(join)

    def mapped(self) -> SAEs:
        """The same SAEs in their memory-mapped files, for passes over many layers: each comes to a device for its
        turn. They meet the same model and stores when they are opened."""
        out = SAEs(self.source, d_model=self.d_model, k=self.k, dtype=self.dtype, cache_bytes=self.cache_bytes)
        out.group = self.group
        out._joins = list(self._joins)
        return out

    def hook_point(self, layer: int) -> HookPoint:
        """Where the SAE of a layer reads, as its files say; where they don't, the output of the layer.

        Raises:
            NotFoundError, MismatchError: as in `saes[layer]`.
        """
        if layer not in self._points:
            # On the CPU its matrices stay in the mapped file; another device needs them only when it encodes.
            on_cpu = torch.device(self.device).type == "cpu" or layer not in self.layers
            sae = self[layer] if on_cpu else self._opened(layer, load_sae(self.source, layer, k=self.k))
            self._points[layer] = HookPoint.read_by(sae.hook_point, layer)
        return self._points[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def held(self) -> list[int]:
        """The layers in memory, least recently used first."""
        return list(self._held)

    @property
    def nbytes(self) -> int:
        """Bytes of the SAEs in memory."""
        return sum(sae.nbytes for sae in self._held.values())

    def _read(self, layer: int) -> SAE:
        if self.group is not None:
            part = slice_sae(load_sae(self.source, layer, k=self.k), *self.group)
            return self._opened(layer, part.to(self.device, self.dtype))
        return self._opened(layer, load_sae(self.source, layer, k=self.k, device=self.device, dtype=self.dtype))

    def _opened(self, layer: int, sae: SAE) -> SAE:
        if sae.d_model != self.d_model:
            raise MismatchError(
                f"the SAE {sae.identity.group} reads residuals of {sae.d_model} dimensions, the model's have "
                f"{self.d_model}: they do not belong together"
            )
        for join in self._joins:
            join(layer, sae)
        return sae


def brief(layers: list[int]) -> str:
    """A list of layers as ranges: `0-3, 7`."""
    ranges: list[list[int]] = []
    for layer in sorted(layers):
        if ranges and layer == ranges[-1][1] + 1:
            ranges[-1][1] = layer
        else:
            ranges.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)
