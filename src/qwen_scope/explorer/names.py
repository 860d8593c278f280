"""What the page calls a feature: its label, else the tokens that it promotes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from threading import Lock

from qwen_scope.features import Label, labels_of, promoted_tokens
from qwen_scope.scope import Scope

from .look.components import Named

KEPT = 100_000
"""Features whose promoted tokens are remembered."""

WORDS = 3

ByFingerprint = Mapping[tuple[str, int], Label]
"""Labels by the fingerprint of an SAE and the feature."""


class Names:
    """Names of features for everything on the page; safe to share between threads.

    A label comes from the stores, else from the file beside the SAEs, and has a score. Where there is none, the tokens
    that a feature promotes stand for a name once `learn` has looked them up.
    """

    def __init__(self, scope: Scope, stored: Callable[[], ByFingerprint]) -> None:
        self._scope, self._stored, self._beside = scope, stored, labels_of(scope)
        self._promoted: dict[tuple[int, int], str] = {}
        self._lock = Lock()

    def label(self, layer: int, feature: int) -> Label | None:
        """The label of a feature, where a store or the folder of the SAEs knows one for this SAE."""
        stored = self._stored()
        found = stored.get((self._scope.saes[layer].identity.fingerprint, feature)) if stored else None
        return found if found is not None else self._beside(layer, feature)

    def __call__(self, layer: int, feature: int) -> Named | None:
        """What to show beside a feature's number."""
        if (label := self.label(layer, feature)) is not None:
            return Named(label.shown, label.score)
        with self._lock:
            words = self._promoted.get((layer, feature))
        return None if words is None else Named(words, None)

    def learn(self, layer: int, features: Iterable[int]) -> None:
        """Look up what features promote, those without a label, all at once."""
        with self._lock:
            new = [one for one in dict.fromkeys(features) if (layer, one) not in self._promoted]
        new = [one for one in new if self.label(layer, one) is None]
        if not new:
            return
        found = promoted_tokens(self._scope, layer, new, WORDS)
        with self._lock:
            if len(self._promoted) > KEPT:
                self._promoted.clear()
            self._promoted |= {(layer, one): shown(words) for one, words in zip(new, found, strict=True)}


def shown(words: Iterable[str]) -> str:
    """Promoted tokens in one line."""
    return " · ".join(word.strip() or repr(word) for word in words)
