"""The Feature tab: the page of one feature, with a link to it and notes that stay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from qwen_scope.errors import InputError
from qwen_scope.features import FeaturePage
from qwen_scope.report import Markup, element, join

from ..access.limits import whole_number
from ..app_state import AppState
from ..look import feature as view
from ..look.components import card, empty, examples, go, switch
from ..presets import USUAL, intervention
from ..stages import stage
from ..wiring import LOOK, on, panel, picked, picked_feature
from .steer import SteerTab
from .why import WhyTab

NO_STORE = "no store"
NO_STORES_NOTE = (
    "Without a store this page knows the feature's direction only. Start the page with --store FOLDER (a folder that"
    " qwen-scope extract has written) to see where it fires, and to keep notes."
)
NO_LAYER_NOTE = "No store here has layer {layer}, so this page knows the feature's direction only."
START = "Give a layer and a feature and press Open, or follow an arrow ↗ anywhere on this page."
OPENING = "opening the feature"

Opened = tuple[int, int, str | None]
"""The layer, the feature and the store of the page that is shown."""


class FeatureTab:
    """Builds the tab inside the page that is being built, and answers what happens in it."""

    def __init__(self, state: AppState) -> None:
        self.state = state
        stores = list(state.stores) or [NO_STORE]
        with gr.Row(elem_classes="qs-fields qs-bench"):
            self.layer = gr.Dropdown(state.layers, value=state.store_layer, label="Layer", min_width=90, scale=1)
            self.feature = gr.Number(
                None, label="Feature", precision=0, min_width=120, scale=1, elem_id="feature-number"
            )
            self.store = gr.Dropdown(stores, value=stores[0], label="Store", min_width=160, scale=2)
            self.open = gr.Button("Open", variant="primary", min_width=120, scale=1, elem_id="feature-open")
        self.known = known_here(state)
        names = [f"{one['name']}: {one['layer']} / {one['feature']}" for one in self.known]
        self.examples = panel(examples(names) if names else "", elem_id="feature-examples")
        self.notice = panel(elem_id="feature-notice")
        self.opened = gr.State(None)
        with gr.Row(equal_height=False, elem_classes="qs-pair"):
            with gr.Column(scale=3, min_width=420):
                self.title = panel(empty(START), elem_id="feature-title")
                self.trust = panel(elem_id="feature-trust")
                self.contexts = panel(elem_id="feature-contexts")
            with gr.Column(scale=2, min_width=320):
                self.facts = panel(elem_id="feature-facts")
                self.effects = panel(elem_id="feature-effects")
                self.near = panel(elem_id="feature-near")
                with gr.Column(visible=False) as self.note_box:
                    self.notes = panel(elem_id="feature-notes")
                    self.note = gr.Textbox(label="Note", lines=2, max_length=5000, elem_id="feature-note")
                    with gr.Row():
                        self.author = gr.Textbox(label="Your name", max_lines=1, max_length=100, min_width=120)
                        self.write = gr.Button("Keep the note", size="sm", min_width=120, elem_id="feature-write")
        self.shown = [
            self.title, self.trust, self.contexts, self.facts, self.effects, self.near, self.note_box, self.notes,
            self.layer, self.feature, self.opened,
        ]  # fmt: skip
        fields = [self.layer, self.feature, self.store]
        newest = {
            "trigger_mode": "always_last", "concurrency_id": LOOK, "concurrency_limit": 2, "waiting": OPENING,
        }  # fmt: skip
        on([self.open.click, self.feature.submit], self.show, fields, self.shown, self.notice, self.state, **newest)
        on(self.examples.pick, self.example, [self.store], self.shown, self.notice, self.state, **newest)
        on(
            self.write.click, self.keep, [*fields, self.note, self.author], [*self.shown, self.note],
            self.notice, self.state,
            concurrency_id=LOOK, concurrency_limit=2, waiting="writing the note",
        )  # fmt: skip
        on(self.contexts.pick, self.switch, [self.opened], [self.contexts], self.notice, self.state, **newest)

    def join(self, router: gr.HTML, steer: SteerTab, why: WhyTab) -> None:
        """What leads here and away: a link to a feature anywhere on the page, *Steer with this*, and *Why*."""
        on(
            router.pick, self.follow, [self.store], self.shown, self.notice, self.state,
            trigger_mode="always_last", concurrency_id=LOOK, concurrency_limit=2, waiting=OPENING,
        )  # fmt: skip

        def leave(
            event: gr.EventData, opened: Opened | None, prompt: str, chat: str, text: str | None
        ) -> dict[Any, Any]:
            if opened is None:
                return {}
            layer, feature, _ = opened
            if picked(event, "steer") >= 0:
                row = next(
                    (dict(one) for one in self.state.presets.values() if (one["layer"], one["feature"]) == opened[:2]),
                    intervention(layer, feature, USUAL),
                )
                name = f"feature {layer}-{feature}"
                return {self.notice: go("steer", "feature"), **steer.loaded(name, [row], prompt, chat)}
            asked = {why.token: "", why.against: "", why.feature: f"{layer}/{feature}"}
            return {self.notice: go("why", "feature"), **asked, why.prompt: text if (text or "").strip() else prompt}

        on(
            self.title.pick, leave, [self.opened, steer.prompt, steer.chat, why.prompt],
            [*steer.loads, why.token, why.against, why.feature, why.prompt], self.notice, self.state,
            concurrency_id="edit",
        )  # fmt: skip

    def follow(self, event: gr.EventData, store: str) -> Iterator[dict[Any, Any]]:
        """A link to a feature was clicked, somewhere on the page."""
        if (place := picked_feature(event)) is not None:
            yield from self.show(*place, self.store_with(place[0], store))

    def arrive(self, layer: Any, feature: Any) -> Iterator[dict[Any, Any]]:
        """The feature of a link, or of the address when the page is loaded again."""
        whole_number(feature, "feature")
        yield from self.show(layer, feature, self.store_with(layer, next(iter(self.state.stores), NO_STORE)))

    def store_with(self, layer: Any, store: str) -> str:
        """The store, or another one, that has a layer which a link names; `NO_STORE` where none has."""
        layer = whole_number(layer, "layer")
        names = [name for name in (store, *self.state.stores) if name in self.state.stores]
        return next((name for name in names if layer in self.state.common_layers([name])), NO_STORE)

    def switch(self, event: gr.EventData, opened: Opened | None) -> dict[Any, Any]:
        """Passages or whole documents."""
        if opened is None or opened[2] is None:
            return {}
        layer, feature, store = opened[0], opened[1], opened[2]
        page = self.state.feature_page(layer, feature, store, with_cofiring=False)
        if picked(event, "whole") == 0:
            return {self.contexts: self.passages(page, store)}
        stage("reading whole documents")
        found = self.state.whole_contexts(layer, feature, store)
        return {self.contexts: view.whole_panel(found, page.maximum, whole_switch(True))}

    def example(self, event: gr.EventData, store: str) -> Iterator[dict[Any, Any]]:
        """A known feature was clicked."""
        one = self.known[picked(event, "example") % len(self.known)]
        yield from self.show(one["layer"], one["feature"], store)

    def show(self, layer: Any, feature: Any, store: str) -> Iterator[dict[Any, Any]]:
        """The page of one feature; what takes a look at the whole store comes a moment later: what fires with it, and
        how far to trust it."""
        layer, feature = whole_number(layer, "layer"), whole_number(feature, "feature")
        name = None if store == NO_STORE else store
        page = self.state.feature_page(layer, feature, name, with_cofiring=False)
        self.learn(page)
        yield self.drawn(page, name)
        if name is not None:
            page = self.state.with_cofiring(page, name)
            self.learn(page)
            yield {self.near: view.neighbours_panel(page, self.state.label)}
            yield {self.trust: view.trust_panel(self.state.card(layer, feature, name))}

    def drawn(self, page: FeaturePage, name: str | None) -> dict[Any, Any]:
        """Every panel for a feature; `name` is that of the store."""
        return {
            self.layer: page.layer,
            self.feature: page.feature,
            self.opened: (page.layer, page.feature, name),
            self.title: view.title_panel(page, f"?layer={page.layer}&feature={page.feature}"),
            self.trust: "" if name is None else view.weighing_panel(),
            self.contexts: self.passages(page, name),
            self.facts: view.facts_panel(page) if page.summary is not None else "",
            self.effects: view.effects_panel(page) if page.promoted else "",
            self.near: view.neighbours_panel(page, self.state.label, searching=name is not None),
            self.note_box: gr.Column(visible=name is not None),
            self.notes: view.notes_panel(page),
        }

    def passages(self, page: FeaturePage, name: str | None) -> Markup:
        """Where it fires, in passages; `name` is that of the store."""
        if name is None:
            note = NO_LAYER_NOTE.format(layer=page.layer) if self.state.stores else NO_STORES_NOTE
            return card(element("p", note, class_="qs-note"))
        if not page.strongest:
            return card(element("p", f"It never fires in the store {name}.", class_="qs-note"))
        first = view.contexts_panel(
            "Strongest contexts", "one per document", page.strongest, page.maximum, switched=whole_switch(False)
        )
        spread = "spread over its activations"
        return join(first, view.contexts_panel("From strong to weak", spread, page.spread, page.maximum))

    def learn(self, page: FeaturePage) -> None:
        """Look up the names of its neighbours."""
        stage("looking up names")
        near = [*page.similar, *page.cofiring, *page.elsewhere]
        for layer in {one.layer for one in near}:
            self.state.names.learn(layer, [one.feature for one in near if one.layer == layer])

    def keep(self, layer: Any, feature: Any, store: str, text: str, author: str) -> Iterator[dict[Any, Any]]:
        """A note is written into the store."""
        if store == NO_STORE:
            raise InputError("notes are kept in a store; start the page with --store FOLDER")
        number = whole_number(feature, "feature")
        self.state.write_note(whole_number(layer, "layer"), number, store, text, author)
        for update in self.show(layer, feature, store):
            yield {self.note: "", **update}


def known_here(state: AppState) -> list[dict[str, Any]]:
    """A few features to try: those that a store shows contexts of, where any does."""
    stored = {layer for name in state.stores for layer in state.common_layers([name])}
    return ([one for one in state.known if one["layer"] in stored] or state.known)[:8]


def whole_switch(on: bool) -> Markup:
    """The switch between passages and whole documents."""
    return element("div", switch("whole documents", f"whole:{0 if on else 1}", on), class_="qs-switches")
