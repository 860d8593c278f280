"""`AppState`: what all visitors share. One model and its SAEs, what was read lately, and the limits."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from qwen_scope.errors import InputError, QwenScopeError, brief
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
from qwen_scope.sae import SAE
from qwen_scope.scope import DO_NOT_USE, Comparison, Scope, TokenFeatures, compare_seen, model_source
from qwen_scope.steer import Generation
from qwen_scope.store import Context, FeatureStore
from qwen_scope.text import Chat, Corpus, Unreadable, render
from qwen_scope.trust import Card, CardOptions, card

from .access.discreet import discreet
from .access.limits import Limits, listed, one_of
from .jobs import Jobs
from .lately import Lately, size_of
from .look.components import Named
from .names import Names
from .presets import PROMPT, USUAL, intervention, known_features, presets_of
from .stages import stage
from .store_pool import StorePool, stamp

CHATS: dict[str, Chat | None] = {
    "plain": None,
    "thinking": "thinking",
    "non_thinking": "non_thinking",
    "default": "default",
}
"""How a text is put to the model, by the name the page and the API use."""

WHOLE = 1000
"""Tokens of a document that are shown on each side of the place where a feature is strongest in it."""

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
        self._known_labels: tuple[tuple[tuple[int, int], ...], dict[tuple[str, int], Label]] | None = None
        self.names = Names(scope, self._labels)

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
        stage(f"loading the SAE of layer {layer}")
        self.scope.saes[self.scope.check_layers([layer])[0]]
        stage(f"reading the text at layer {layer}")
        found = self.scope.features([text], [layer], chat=mode)
        with self._lock:
            self._seen[key] = found
            while len(self._seen) > 1 and self.remembered_bytes > self.limits.remembered_bytes:
                self._seen.popitem(last=False)
        return found

    @cached_property
    def known(self) -> list[dict[str, Any]]:
        """Features of the lab that detect a factor of its texts, best first; see `known_features`."""
        return known_features(self.scope)

    @cached_property
    def presets(self) -> dict[str, dict[str, Any]]:
        """By name the fields of an intervention that works at once."""
        return presets_of(self.scope)

    @cached_property
    def chats(self) -> list[tuple[str, str]]:
        """How a text can be put to this model: the words for it and the name, as far as its chat template goes."""
        found = [("Plain text", "plain")]
        for words, name in (
            ("Chat, thinking", "thinking"),
            ("Chat, not thinking", "non_thinking"),
            ("Chat", "default"),
        ):
            if name == "default" and len(found) > 1:
                break  # the template has a switch for thinking, so its default is one of the two
            with suppress(QwenScopeError):
                render(self.scope.tokenizer, "Hello", CHATS[name])
                found.append((words, name))
        return found

    @cached_property
    def store_layer(self) -> int:
        """The layer that pages about stores begin with: the last one of the first store."""
        for name in self.stores:
            with self.store(name) as store:
                if here := [layer for layer in store.layers if layer in self.layers]:
                    return here[-1]
        return self.layers[-1]

    def common_layers(self, stores: Sequence[str]) -> list[int]:
        """The layers that all of these stores have; raises InputError for one that the page was not started with."""
        found: set[int] | None = None
        for name in stores:
            with self.store(name) as store:
                found = set(store.layers) if found is None else found & set(store.layers)
        return sorted(found or ())

    def default_intervention(self) -> dict[str, Any]:
        """What the Steer tab begins with: the first preset, or an empty field."""
        first = next(iter(self.presets.values()), None)
        return dict(first) if first is not None else intervention(self.layers[0], None, USUAL)

    def default_prompt(self) -> str:
        """What the Steer tab begins with."""
        return PROMPT if self.known else ""

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
        for layer in layers:
            stage(f"loading the SAE of layer {layer}")
            self.scope.saes[layer]
        self.check_set([*a, *b], layers, chat)
        stage("reading both sides")
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
        """What to call a feature: its label with its score, else what it promotes as far as `names` has learnt it."""
        return self.names(layer, feature)

    def _labels(self) -> dict[tuple[str, int], Label]:
        """The labels of all stores by SAE and feature; read again when a file of notes has changed."""
        stamps = tuple(stamp(folder / "notes.jsonl") for folder in self.stores.values())
        with self._lock:
            if self._known_labels is not None and self._known_labels[0] == stamps:
                return self._known_labels[1]
        found: dict[tuple[str, int], Label] = {}
        for name in self.stores:
            with self.store(name) as store:
                prints = {layer: store.layer(layer).fingerprint for layer in store.layers}
                labels = Notes(store).labels()
                found = {**{(prints[at], i): one for (at, i), one in labels.items() if at in prints}, **found}
        with self._lock:
            self._known_labels = (stamps, found)
        return found

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
        stage(f"loading the SAE of layer {layer}")
        self.check_feature(layer, feature)
        stage("gathering what is known of the feature")
        lens = self.lens if self.lens is not None and layer in self.lens.layers else None
        if store is None:
            page = feature_page(layer, feature, scope=self.scope, layers=self.layers, lens=lens)
        else:
            with self.store_pool.lent(self.folder(store)) as opened:
                page = feature_page(
                    layer, feature, store=opened, scope=self.scope, with_cofiring=with_cofiring, lens=lens
                )
        told = {"store": store, "model": self.discreet(page.model), "group": self.discreet(page.group)}
        return replace(page, label=page.label or self.names.label(layer, feature), **told)

    def whole_contexts(self, layer: int, feature: int, store: str, n: int = COMPANY) -> list[Context]:
        """The documents in which a feature is strongest, each up to `WHOLE` tokens around its strongest place.

        Raises:
            InputError, NotFoundError, MismatchError: as `feature_page`.
        """
        sae = self.check_feature(layer, feature)
        with self.store_pool.lent(self.folder(store)) as opened:
            opened.require(layer, sae)
            return opened.contexts(layer, feature, n, before=WHOLE, after=WHOLE, per_document=True)

    def with_cofiring(self, page: FeaturePage, store: str) -> FeaturePage:
        """The page with the features that fire on the same tokens, in its own layer and in the others."""
        stage("counting what fires on the same tokens")
        with self.store_pool.lent(self.folder(store)) as opened:
            return with_neighbours(page, opened, self.scope, COMPANY)

    def card(self, layer: int, feature: int, store: str) -> Card:
        """How far to trust a feature, by what the store's record knows and what is cheap to measure.

        Raises:
            InputError, NotFoundError, MismatchError: as `feature_page`.
        """
        self.check_feature(layer, feature)
        stage("measuring how far to trust it")
        with self.store_pool.lent(self.folder(store)) as opened:
            found = card(layer, feature, store=opened, scope=self.scope, options=CardOptions(n=COMPANY))
        return replace(found, missing=tuple(map(self.discreet, found.missing)))

    def nearest(self, layer: int, feature: int, other: int) -> Neighbour | None:
        """The feature of another layer whose direction is nearest; in its own layer, itself."""
        if other == layer:
            return Neighbour(layer, feature, cosine=1.0)
        return next(iter(similar(self.scope, layer, feature, 1, other_layer=other)), None)

    def warm(self) -> None:
        """Do once what the first visitor would wait for: load what is loaded lazily, compile what is compiled, and
        measure what the amount that Steer begins with is counted in."""
        self.scope.features(["Hello."], [self.layers[len(self.layers) // 2]])
        self.scope.stats[self.default_intervention()["layer"]]
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
