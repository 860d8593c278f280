"""The Feature tab: the page of one feature, with a link to it and notes that stay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from qwen_scope.errors import InputError
from qwen_scope.features import FeaturePage
from qwen_scope.report import join

from . import feature_view as view
from .app_state import AppState
from .components import card, empty, examples
from .limits import whole_number
from .wiring import LOOK, on, panel, picked

NO_STORE = "no store"
NO_STORES_NOTE = (
    "Without a store this page knows the feature's direction only. Start the page with --store FOLDER (a folder that"
    " qwen-scope extract has written) to see where it fires, and to keep notes."
)
START = "Give a layer and a feature and press Open, or follow an arrow ↗ anywhere on this page."


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
        self.known = state.known[:8]
        names = [f"{one['factor']}: {one['layer']} / {one['feature']}" for one in self.known]
        self.examples = panel(examples(names) if names else "", elem_id="feature-examples")
        self.notice = panel(elem_id="feature-notice")
        with gr.Row(equal_height=False):
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
            self.layer, self.feature,
        ]  # fmt: skip
        fields = [self.layer, self.feature, self.store]
        newest = {"trigger_mode": "always_last", "concurrency_id": LOOK, "concurrency_limit": 2}
        on([self.open.click, self.feature.submit], self.show, fields, self.shown, self.notice, self.state, **newest)
        on(self.examples.pick, self.example, [self.store], self.shown, self.notice, self.state, **newest)
        on(
            self.write.click, self.keep, [*fields, self.note, self.author], [*self.shown, self.note],
            self.notice, self.state,
            concurrency_id=LOOK, concurrency_limit=2,
        )  # fmt: skip

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
        yield self.drawn(page, name)
        if name is not None:
            page = self.state.with_cofiring(page, name)
            yield {self.near: view.neighbours_panel(page, self.state.label)}
            yield {self.trust: view.trust_panel(self.state.card(layer, feature, name))}

    def drawn(self, page: FeaturePage, name: str | None) -> dict[Any, Any]:
        """Every panel for a feature; `name` is that of the store."""
        contexts = [
            view.contexts_panel(title, note, some, page.maximum)
            for title, note, some in (
                ("Strongest contexts", "one per document", page.strongest),
                ("From strong to weak", "spread over its activations", page.spread),
            )
            if some
        ]
        if name is None:
            contexts = [card(view.element("p", NO_STORES_NOTE, class_="qs-note"))]
        elif not contexts:
            contexts = [card(view.element("p", f"It never fires in the store {name}.", class_="qs-note"))]
        return {
            self.layer: page.layer,
            self.feature: page.feature,
            self.title: view.title_panel(page, f"?layer={page.layer}&feature={page.feature}"),
            self.trust: "" if name is None else view.weighing_panel(),
            self.contexts: join(*contexts),
            self.facts: view.facts_panel(page) if page.summary is not None else "",
            self.effects: view.effects_panel(page) if page.promoted else "",
            self.near: view.neighbours_panel(page, self.state.label, searching=name is not None),
            self.note_box: gr.Column(visible=name is not None),
            self.notes: view.notes_panel(page),
        }

    def keep(self, layer: Any, feature: Any, store: str, text: str, author: str) -> Iterator[dict[Any, Any]]:
        """A note is written into the store."""
        if store == NO_STORE:
            raise InputError("notes are kept in a store; start the page with --store FOLDER")
        number = whole_number(feature, "feature")
        self.state.write_note(whole_number(layer, "layer"), number, store, text, author)
        for update in self.show(layer, feature, store):
            yield {self.note: "", **update}
