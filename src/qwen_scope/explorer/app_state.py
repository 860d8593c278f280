"""`AppState`: what all visitors share. One model and its SAEs, what was read lately, and the limits."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from qwen_scope.errors import InputError, brief
from qwen_scope.features import (
    FeaturePage,
    Label,
    Lens,
    Neighbour,
    Notes,
    feature_page,
    similar,
    with_neighbours,
)
from qwen_scope.sae import SAE, catalog, layers_of, load_sae
from qwen_scope.scope import DO_NOT_USE, Comparison, Scope, TokenFeatures, compare_seen, model_source
from qwen_scope.steer import Generation
from qwen_scope.store import FeatureStore
from qwen_scope.text import Chat, Corpus, Unreadable
from qwen_scope.trust import Card, CardOptions, card

from .components import Named
from .discreet import discreet
from .jobs import Jobs
from .limits import Limits, listed, one_of
from .store_pool import StorePool, stamp

T = TypeVar("T")


CHATS: dict[str, Chat | None] = {"plain": None, "thinking": "thinking", "non_thinking": "non_thinking"}
"""How a text is put to the model, by the name the page and the API use."""

COMPANY = 10
"""Features that fire with another, as many as a page shows of each kind."""


class AppState:
    """One model in memory for all visitors; safe to share between threads.

    Attributes:
        scope: the model and its SAEs, which are kept by bytes.
        stores: by name, the folders that the page may open; it can reach no other.
        limits: what one visitor may ask for.
        model_name, sae_name: what the page calls them; never a whole path of this machine.
        trained_from: the model the SAEs were trained on, where it was said.
        lens: a Jacobian lens of the model, which features are read through beside the direct logits.
    """

    def __init__(
        self,
        scope: Scope,
        stores: Mapping[str, Path] | None = None,
        limits: Limits | None = None,
        *,
        model_name: str | None = None,
        trained_from: str | None = None,
        lens: Lens | None = None,
    ) -> None:
        self.scope, self.stores, self.limits = scope, dict(stores or {}), limits or Limits()
        self.model_name = model_name or ("lab" if scope.name == model_source("lab") else Path(scope.name).name)
        self.sae_name, self.trained_from = Path(scope.saes.source).name, trained_from
        if lens is not None:
            lens.check(scope)
        self.lens = lens
        self.jobs, self.unsteered, self.store_pool = Jobs(), Lately[Generation](32), StorePool()
        self._seen: OrderedDict[tuple[str, str, int], TokenFeatures] = OrderedDict()
        self._lock = threading.Lock()
        self._known_labels: tuple[tuple[tuple[int, int], ...], dict[tuple[int, int], Label]] | None = None

    @cached_property
    def places(self) -> dict[str, str]:
        """Where things lie on this machine, and what the page calls them instead."""
        named = {str(folder): name for name, folder in self.stores.items()}
        named |= {str(self.scope.name): self.model_name, str(self.scope.saes.source): self.sae_name}
        return {place: name for place, name in named.items() if "/" in place.strip("./") or Path(place).is_absolute()}

    def discreet(self, text: str) -> str:
        """A sentence without any path of this machine."""
        return discreet(text, self.places)

    @property
    def layers(self) -> list[int]:
        return self.scope.layers

    def pair(self) -> list[str]:
        """What is known of the pair of model and SAEs, as far as layers have been opened: doubts and verdicts."""
        return [self.discreet(one) for one in self.scope.joined.sentences]

    def doubt(self, layer: int) -> str | None:
        """The sentence of a remembered verdict against the SAE of a layer; None where there is none such."""
        verdict = self.scope.verdicts[layer]
        return self.discreet(verdict.sentence) if verdict is not None and verdict.verdict == DO_NOT_USE else None

    def check_text(self, text: object, what: str = "text") -> str:
        """The text, if it is one that may be read; raises InputError for an empty or too long one."""
        return self.limits.check_text(text, what)

    def chat(self, name: str) -> Chat | None:
        """The chat mode of that name; raises InputError for another."""
        return CHATS[one_of(name, CHATS, "how a text is put to the model")]

    def seen(self, text: str, layer: int, chat: str = "plain") -> TokenFeatures:
        """The features of one text at one layer; what was read lately is not read again.

        Raises:
            InputError, NotFoundError: as `Scope.features` does.
        """
        mode, key = self.chat(chat), (self.check_text(text), chat, layer)
        with self._lock:
            if key in self._seen:
                self._seen.move_to_end(key)
                return self._seen[key]
        found = self.scope.features([text], [layer], chat=mode)
        with self._lock:
            self._seen[key] = found
            while len(self._seen) > 1 and self.remembered_bytes > self.limits.remembered_bytes:
                self._seen.popitem(last=False)
        return found

    @cached_property
    def known(self) -> list[dict[str, Any]]:
        """Features of the lab that detect a factor of its texts, best first; none of another model or SAE."""
        if self.scope.name != model_source("lab"):
            return []
        measured = json.loads((Path(model_source("lab")).parent / "metrics.json").read_text(encoding="utf-8"))
        ours = {layer for layer in self.layers if self.of_the_lab(layer)}
        return sorted((one for one in measured["detectors"] if one["layer"] in ours), key=lambda one: -one["f1"])

    def of_the_lab(self, layer: int) -> bool:
        """Whether the SAE of a layer is the lab's own, wherever it lies; in any other its numbers mean nothing."""
        group = catalog.find("lab").name
        return layer in layers_of(group) and (
            load_sae(group, layer).identity.fingerprint == self.scope.saes[layer].identity.fingerprint
        )

    @cached_property
    def store_layer(self) -> int:
        """The layer that pages about stores begin with: the last one of the first store."""
        for name in self.stores:
            with self.store(name) as store:
                if here := [layer for layer in store.layers if layer in self.layers]:
                    return here[-1]
        return self.layers[-1]

    def default_intervention(self) -> dict[str, Any]:
        """What the Steer tab begins with: the lab's German, or an empty field."""
        german = next((one for one in self.known if one["factor"] == "de"), {"layer": self.layers[0], "feature": None})
        chosen = {"layer": german["layer"], "feature": german["feature"]}
        return {**chosen, "op": "add", "amount": 0.3, "unit": "resid_norm", "where": "all"}

    def default_prompt(self) -> str:
        """What the Steer tab begins with."""
        return "[12:30] Anna: " if self.known else ""

    def side(self, text: str, file: str | None, which: str) -> list[str]:
        """One side of a comparison: the texts of the uploaded file if there is one, else the single text.

        Raises:
            InputError, FormatError: it is empty, too large, or of another kind.
        """
        if file is None:
            return [self.check_text(text, f"{which} text")]
        found = []
        for row in Corpus(file, unit="line").rows():
            if isinstance(row, Unreadable):
                raise InputError(f"row {row.row} of the {which} file can't be used: {row.reason} ({row.detail:.80})")
            if not isinstance(row.text, str):
                raise InputError(f"row {row.row} of the {which} file is a conversation; give plain texts")
            found.append(self.check_text(row.text, f"text in row {row.row} of the {which} file"))
            if len(found) > self.limits.set_texts:
                raise InputError(f"the {which} file has more than {self.limits.set_texts} texts; upload a sample of it")
        if not found:
            raise InputError(f"the {which} file holds no text")
        return found

    def layer_range(self, first: int, last: int) -> list[int]:
        """The layers from `first` to `last`; raises InputError if there are none."""
        chosen = [layer for layer in self.layers if first <= layer <= last]
        if not chosen:
            raise InputError(f"there is no layer from {first} to {last}; put the smaller one first")
        return chosen

    def compare(
        self, a: list[str], b: list[str], layers: list[int], n: int, options: list[str], chat: str = "plain"
    ) -> tuple[dict[int, list[Comparison]], TokenFeatures]:
        """Features ranked by the difference of their rates, and what was seen.

        Args:
            options: of `first`, `common` and `prefix`, the tokens that are left out.

        Raises:
            InputError: another option, more tokens than this page compares, or as `Scope.compare` does.
        """
        for option in listed(options, "tokens to leave out", 3):
            if option not in ("first", "common", "prefix"):
                raise InputError(f"tokens are left out by first, common or prefix, not {brief(option)}")
        self.check_set([*a, *b], layers, chat)
        seen = self.scope.features([*a, *b], layers, chat=self.chat(chat), truncate=len(a) + len(b) > 2)
        first, common, prefix = (name in options for name in ("first", "common", "prefix"))
        return compare_seen(seen, len(a), n=n, drop_first=first, drop_common=common, drop_prefix=prefix), seen

    def check_set(self, texts: list[str], layers: list[int], chat: str) -> None:
        """Refuse a comparison of more tokens, or of more activations, than one visitor may keep the model busy with."""
        lengths = self.scope.tokenize(texts, chat=self.chat(chat), truncate=len(texts) > 2).lengths
        if sum(lengths) > self.limits.set_tokens:
            raise InputError(
                f"the texts have {sum(lengths):,} tokens together and this page compares up to"
                f" {self.limits.set_tokens:,}; give fewer or shorter ones"
            )
        slots = sum(self.scope.saes[layer].k or self.scope.saes[layer].d_sae for layer in layers)
        size = len(texts) * max(lengths, default=0) * slots * 8  # an index and a value each, padded to the longest
        if size > self.limits.set_bytes:
            raise InputError(
                f"{len(texts)} texts of up to {max(lengths)} tokens at {len(layers)} layers take {size / 1e6:,.0f} MB"
                f" and this page has {self.limits.set_bytes / 1e6:,.0f} MB for a comparison; give fewer layers or texts"
            )

    @property
    def remembered_bytes(self) -> int:
        """Bytes of the activations that are kept."""
        return sum(size_of(found) for found in self._seen.values())

    def label(self, layer: int, feature: int) -> Named | None:
        """The label of a feature with its score, where a store knows one for this SAE."""
        found = self._labels().get((layer, feature))
        return None if found is None else Named(found.shown, found.score)

    def _labels(self) -> dict[tuple[int, int], Label]:
        """The labels of all stores that fit the SAEs; read again when a file of notes has changed."""
        stamps = tuple(stamp(folder / "notes.jsonl") for folder in self.stores.values())
        with self._lock:
            if self._known_labels is not None and self._known_labels[0] == stamps:
                return self._known_labels[1]
        found: dict[tuple[int, int], Label] = {}
        for name in self.stores:
            with self.store(name) as store:
                fits = {layer for layer in store.layers if layer in self.layers and self.fits(store, layer)}
                labels = Notes(store).labels() if fits else {}
                found = {**{place: one for place, one in labels.items() if place[0] in fits}, **found}
        with self._lock:
            self._known_labels = (stamps, found)
        return found

    def fits(self, store: FeatureStore, layer: int) -> bool:
        """Whether a store was made with this scope's SAE of the layer."""
        return store.layer(layer).fingerprint == self.scope.saes[layer].identity.fingerprint

    def store(self, name: str) -> FeatureStore:
        """A store that the page was started with, opened; each thread opens its own.

        Raises:
            InputError: another name.   FormatError: it is damaged.
        """
        return FeatureStore(self.folder(name))

    def folder(self, name: str) -> Path:
        """Where a store lies; raises InputError for one that the page was not started with."""
        if not isinstance(name, str) or name not in self.stores:
            raise InputError(f"there is no store {brief(name)} here; the page has {', '.join(self.stores) or 'none'}")
        return self.stores[name]

    def feature_page(
        self, layer: int, feature: int, store: str | None = None, *, with_cofiring: bool = True
    ) -> FeaturePage:
        """All about one feature, with a store or without.

        Args:
            with_cofiring: look for what fires with it, which reads the whole store; else `with_cofiring` can later.

        Raises:
            InputError, NotFoundError: no such layer, feature or store.   MismatchError: the store is of another SAE.
        """
        self.check_feature(layer, feature)
        lens = self.lens if self.lens is not None and layer in self.lens.layers else None
        if store is None:
            page = feature_page(layer, feature, scope=self.scope, layers=self.layers, lens=lens)
        else:
            with self.store_pool.lent(self.folder(store)) as opened:
                page = feature_page(
                    layer, feature, store=opened, scope=self.scope, with_cofiring=with_cofiring, lens=lens
                )
        return replace(page, store=store, model=self.discreet(page.model), group=self.discreet(page.group))

    def with_cofiring(self, page: FeaturePage, store: str) -> FeaturePage:
        """The page with the features that fire on the same tokens, in its own layer and in the others."""
        with self.store_pool.lent(self.folder(store)) as opened:
            return with_neighbours(page, opened, self.scope, COMPANY)

    def card(self, layer: int, feature: int, store: str) -> Card:
        """How far to trust a feature, by what the store's record knows and what is cheap to measure.

        Raises:
            InputError, NotFoundError, MismatchError: as `feature_page`.
        """
        self.check_feature(layer, feature)
        with self.store_pool.lent(self.folder(store)) as opened:
            found = card(layer, feature, store=opened, scope=self.scope, options=CardOptions(n=COMPANY))
        return replace(found, missing=tuple(map(self.discreet, found.missing)))

    def nearest(self, layer: int, feature: int, other: int) -> Neighbour | None:
        """The feature of another layer whose direction is nearest; in its own layer, itself."""
        if other == layer:
            return Neighbour(layer, feature, cosine=1.0)
        return next(iter(similar(self.scope, layer, feature, 1, other_layer=other)), None)

    def warm(self) -> None:
        """Do once what the first visitor would wait for: load what is loaded lazily, and compile what is compiled."""
        self.scope.features(["Hello."], [self.layers[len(self.layers) // 2]])
        self.known  # noqa: B018

    def write_note(self, layer: int, feature: int, store: str, text: str, author: str) -> None:
        """Keep a note about a feature in the store's own file of notes.

        Raises:
            InputError: an empty or very long note, or as `feature_page` does.
        """
        self.check_text(text, "note")
        with self.store(store) as opened:
            opened.require(layer, self.check_feature(layer, feature))
            Notes(opened).write(layer, feature, text, author.strip()[:100])

    def check_feature(self, layer: int, feature: int) -> SAE:
        """The SAE of the layer, if it has such a feature.

        Raises:
            NotFoundError: no such layer.   InputError: no such feature.
        """
        (layer,) = self.scope.check_layers([layer])
        sae = self.scope.saes[layer]
        if not 0 <= feature < sae.d_sae:
            raise InputError(
                f"there is no feature {feature} in layer {layer}: its SAE has features 0 to {sae.d_sae - 1}"
            )
        return sae


class Lately(Generic[T]):
    """The last few values by key; safe to share between threads."""

    def __init__(self, most: int) -> None:
        self._most, self._held, self._lock = most, OrderedDict[Hashable, T](), threading.Lock()

    def get(self, key: Hashable) -> T | None:
        """The value, or None if it is no longer known."""
        with self._lock:
            return self._held.get(key)

    def put(self, key: Hashable, value: T) -> None:
        """Remember a value; the oldest leaves where there are too many."""
        with self._lock:
            self._held[key] = value
            while len(self._held) > self._most:
                self._held.popitem(last=False)


def size_of(found: TokenFeatures) -> int:
    """Bytes of the tensors of what was seen."""
    tensors = [t for acts in found.acts.values() for t in (acts.indices, acts.values)]
    return sum(t.numel() * t.element_size() for t in [*tensors, *found.reasons.values(), found.input_ids, found.mask])
