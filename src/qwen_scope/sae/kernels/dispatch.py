"""Which path an encode takes, chosen for each call, and what is kept with an SAE so that screening can pay."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from ..acts import FeatureActs
from .bound import Screen, prepare
from .screened import EncodeStats, can_screen, encode_topk_screened, low_is_fast
from .tiled import encode_threshold, encode_topk
from .unchanged import Checksums, Twins, checksums, twins

# Fewer rows than this read the weights for less than the rest of screening costs.
FEWEST_ROWS = 64
# Preparing costs about as much as the fp32 product of this many rows, so it waits until they have come.
PREPARE_AFTER = 256
# Dictionaries with fewer weights are encoded in the time that screening takes to begin.
FEWEST_WEIGHTS = 2**22


@dataclass(eq=False)
class EncoderCache:
    """What is kept beside the weights of one SAE object; never copied or pickled with it.

    Attributes:
        stats: how the last encode went, None before the first.
        screen: the bf16 encoder, made when it first pays.
        rows_seen: rows of earlier calls that could have been screened.
        sums: of the weights as they were when the screen and the twins were made.
        twins: features that are copies of each other.
    """

    stats: EncodeStats | None = None
    screen: Screen | None = None
    rows_seen: int = 0
    sums: Checksums | None = None
    twins: Twins | None = None
    _weights: tuple[tuple[int, int], ...] = ()
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def nbytes(self) -> int:
        """Bytes that are kept now."""
        screen, sums, twins = self.screen, self.sums, self.twins
        held = [] if sums is None else [sums.rows, sums.columns, sums.bias]
        held += [] if twins is None else [twins.features, twins.first]
        return (0 if screen is None else screen.nbytes) + sum(t.numel() * t.element_size() for t in held)

    def __reduce__(self) -> tuple[type[EncoderCache], tuple[()]]:
        return EncoderCache, ()

    def screen_for(self, W_enc: Tensor, b_enc: Tensor, rows: int) -> Screen | None:
        """The screen of these weights if it is there or `rows` make it worth preparing; weights that changed since
        in place are prepared anew.

        PyTorch counts its own writes. Those that it does not count (through `.data`, `.numpy()` or a mapped file) are
        found by the checksums, which are taken anew at every call that would use a screen.
        """
        with self._lock:
            self._begin(W_enc, b_enc)
            if self.screen is not None:
                now = checksums(W_enc, b_enc)
                if self.sums is None or not self.sums.same_as(now):
                    self._forget()
                    self._look(W_enc, b_enc, now)
            self.rows_seen += rows
            if self.screen is None and self.rows_seen >= PREPARE_AFTER:
                self.screen = prepare(W_enc, b_enc)
                self._look(W_enc, b_enc, checksums(W_enc, b_enc))
            return self.screen

    def twins_for(self, W_enc: Tensor, b_enc: Tensor) -> Twins | None:
        """The features that are copies of each other now, for a call without a screen."""
        with self._lock:
            self._begin(W_enc, b_enc)
            if self.sums is None or (self.twins is not None and not self.twins.still(W_enc, b_enc)):
                self._look(W_enc, b_enc, checksums(W_enc, b_enc))
            return self.twins

    def _begin(self, W_enc: Tensor, b_enc: Tensor) -> None:
        weights = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in (W_enc, b_enc))
        if weights != self._weights:
            self._forget()
            self._weights = weights

    def _forget(self) -> None:
        self.screen, self.rows_seen, self.sums, self.twins = None, 0, None, None

    def _look(self, W_enc: Tensor, b_enc: Tensor, sums: Checksums) -> None:
        self.sums, self.twins = sums, twins(W_enc, b_enc, sums)


def worth_screening(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> bool:
    """Whether the device, the type, the number of rows and the CPU let screening be faster than the fp32 product."""
    rows = x.shape[:-1].numel()
    return (
        rows >= FEWEST_ROWS
        and W_enc.numel() >= FEWEST_WEIGHTS
        # Tensors made in inference mode don't say when they change.
        and not (W_enc.is_inference() or b_enc.is_inference())
        and low_is_fast(W_enc)
    )


def encode_topk_chosen(
    x: Float[Tensor, "*rows d_model"],
    W_enc: Float[Tensor, "d_sae d_model"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    cache: EncoderCache,
) -> FeatureActs:
    """`encode_topk_reference` by the fastest path for this call; `cache.stats` says which it was."""
    if worth_screening(x, W_enc, b_enc):
        screen = cache.screen_for(W_enc, b_enc, x.shape[:-1].numel())
        if screen is not None and can_screen(W_enc, k, screen):
            acts, cache.stats = encode_topk_screened(x.to(W_enc.device), W_enc, b_enc, k, screen, twins=cache.twins)
            return acts
    acts = encode_topk(x, W_enc, b_enc, k, twins=cache.twins_for(W_enc, b_enc))
    cache.stats = EncodeStats("plain", acts.shape.numel())
    return acts


def encode_threshold_chosen(
    x: Float[Tensor, "*rows d_model"],
    W_enc: Float[Tensor, "d_sae d_model"],
    b_enc: Float[Tensor, " d_sae"],
    threshold: Float[Tensor, " d_sae"],
    cache: EncoderCache,
) -> FeatureActs:
    """`encode_threshold_reference`, copies of a feature in order of their index."""
    return encode_threshold(x, W_enc, b_enc, threshold, twins=cache.twins_for(W_enc, b_enc))
