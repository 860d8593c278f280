"""What a scope knows about its layers once it has looked: which tokens count there, and typical sizes."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Mapping
from functools import cached_property

from qwen_scope.errors import QwenScopeWarning
from qwen_scope.model import HookPoint, LayerStats, LoadedModel, counted_of
from qwen_scope.steer import Sample
from qwen_scope.text import Counted

from .saes import SAEs

# How far above the edge of the bulk on one sample a threshold from another sample of the same model may lie.
_FAR = 4.0
_FEW = 8  # tokens of which no share can be told


class ScopeCounted:
    """`counted[layer]`: which tokens count at a layer; safe to share between threads.

    What `set` gave; else what the SAE's files carry from its training; else first and special tokens are left out, and
    sinks by thresholds that are measured once, on first use, on the built-in sample of texts.
    """

    def __init__(self, loaded: LoadedModel, saes: SAEs, given: Counted | None = None) -> None:
        self._loaded, self._saes, self._given = loaded, saes, given
        self._measured: Counted | None = None
        self._held: dict[int, Counted] = {}
        self._carried: set[int] = set()  # layers whose SAE's files say it
        self._checked: set[HookPoint] = set()  # whose carried threshold was held against a sample
        self._said: set[str] = set()
        self._lock = threading.Lock()

    @cached_property
    def sample(self) -> Sample:
        """The built-in texts, whose residuals all figures of the scope share."""
        return Sample(self._loaded.model, self._loaded.tokenizer)

    def __getitem__(self, layer: int) -> Counted:
        with self._lock:
            if layer not in self._held:
                self._held[layer] = self._find(layer)
            return self._held[layer]

    @property
    def given(self) -> Counted | None:
        """What was given for every layer; None where each layer's is carried or measured."""
        return self._given

    def set(self, counted: Counted | None) -> None:
        """Count these tokens at every layer from now on; None goes back to what is carried or measured."""
        with self._lock:
            self._given = counted
            self._held.clear()
            self._carried.clear()

    def _find(self, layer: int) -> Counted:
        carried = counted_of([self._saes[layer]]) if layer in self._saes.layers else None
        if self._given is not None:
            # Asking for every token is a decision, not a disagreement.
            if carried is not None and self._given != Counted.everything():
                self._say(self._given.difference(carried, ("what was asked for", "the training of the SAEs")))
            return self._given
        if carried is not None:
            self._carried.add(layer)
            special = Counted.of(self._loaded.tokenizer).special
            if carried.special and carried.special != special:
                self._say(
                    f"the SAEs were trained without {len(carried.special):,} special tokens, and the tokenizer of"
                    f" {self._loaded.name} has {len(special):,}, which are not the same: special tokens are left out as"
                    " in training"
                )
            return carried
        point = self._point(layer)
        if self._measured is None or (self._measured.norms and str(point) not in self._measured.norms):
            points = {point, *(HookPoint.parse(name) for name in (self._measured.norms if self._measured else ()))}
            self._measured = self.sample.counted(sorted(points))
        return self._measured

    def _point(self, layer: int) -> HookPoint:
        return self._saes.hook_point(layer) if layer in self._saes.layers else HookPoint(layer)

    def check_sample(self, layers: Iterable[int]) -> None:
        """Say in a warning where a threshold that an SAE carries is no threshold for residuals of this model.

        One of this model lies at twice the median norm or at the edge of the bulk. The norms are measured on the
        built-in sample, once for a layer, and only where its threshold is carried.
        """
        points = {layer: self._point(layer) for layer in layers if self[layer].norms}
        carried = {
            point: self[layer].norms.get(str(point)) for layer, point in points.items() if layer in self._carried
        }
        asked = [point for point, norm in carried.items() if norm is not None and point not in self._checked]
        if not asked:
            return
        self._checked.update(asked)
        for point, found in self.sample.norms(asked).items():
            norm, median = carried[point], found.norm_median
            edge = median * max(2.0, (found.norm_quantiles[0.95] / median) ** 4) if median else 0.0
            if norm is not None and not median <= norm <= _FAR * edge:
                self._say(
                    f"the threshold for sinks at {point} is {norm:.4g} in the files of the SAEs, and residuals of"
                    f" this model have a norm of about {median:.4g} there: were the SAEs trained on another model?"
                )

    def check_share(self, tallies: Mapping[int, Mapping[str, int]]) -> None:
        """Say in a warning where a threshold that an SAE carries makes sinks of most tokens of some texts.

        Args:
            tallies: by layer, how many tokens count or do not, as `tally` counts them.
        """
        for layer, found in tallies.items():
            ordinary = found["counts"] + found["sink"]
            if layer in self._carried and found["sink"] > ordinary / 2 and ordinary >= _FEW:
                self._say(
                    f"{found['sink']} of {ordinary} ordinary tokens at layer {layer} are longer than the threshold for"
                    " sinks in the files of the SAEs: were they trained on another model?"
                )

    def _say(self, sentence: str | None) -> None:
        if sentence is not None and sentence not in self._said:
            self._said.add(sentence)
            warnings.warn(sentence, QwenScopeWarning, stacklevel=4)


class ScopeStats:
    """`stats[layer]`: the layer's statistics, measured on first use and kept; safe to share between threads.

    Measured over the tokens that count of the built-in sample of texts, unless `set` brings figures of a better one.
    """

    def __init__(self, saes: SAEs, counted: ScopeCounted) -> None:
        self._saes, self._counted = saes, counted
        self._given: dict[int, LayerStats] = {}
        self._held: dict[int, tuple[Counted, LayerStats]] = {}
        self._lock = threading.Lock()

    def __getitem__(self, layer: int) -> LayerStats:
        with self._lock:
            if layer in self._given:
                return self._given[layer]
            sae = self._saes[layer] if layer in self._saes.layers else None
            counted = self._counted[layer]
            if layer not in self._held or self._held[layer][0] != counted:
                self._counted.check_sample([layer])
                self._held[layer] = counted, self._counted.sample.sizes(layer, sae, counted)
            return self._held[layer][1]

    def set(self, stats: LayerStats) -> None:
        """Use these figures for their layer from now on."""
        with self._lock:
            self._given[stats.hook_point.layer] = stats
