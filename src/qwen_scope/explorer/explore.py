"""The Explore tab: read a text, click through its tokens and features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import gradio as gr

from qwen_scope.report import join

from . import explore_view as view
from .app_state import AppState
from .components import empty, examples, notice, progress_panel
from .explore_view import Reading
from .jobs import Told
from .limits import whole_number
from .wiring import MODEL, SETS, on, panel, picked, stops, told

EXAMPLES = (
    "Could you wait, please? Shut up, you fool!",
    "Where is the station? Wo ist der Bahnhof? 车站在哪里？",
    "def mean(values):\n    return sum(values) / len(values)\n",
)
CHAT_CHOICES = [("Plain text", "plain"), ("Chat, thinking", "thinking"), ("Chat, not thinking", "non_thinking")]

START = "Write or paste a text above and press Read: its tokens appear here, shaded by the feature you pick."


class ExploreTab:
    """Builds the tab inside the page that is being built, and answers what happens in it."""

    def __init__(self, state: AppState) -> None:
        self.state = state
        self.reading = gr.State(None)
        with gr.Row(elem_classes="qs-bench"):
            self.text = gr.Textbox(
                label="Text", lines=3, max_lines=10, elem_id="explore-text", placeholder="Write or paste a text",
                max_length=state.limits.characters, scale=4,
            )  # fmt: skip
            with gr.Column(scale=1, min_width=240):
                self.chat = gr.Dropdown(CHAT_CHOICES, value="plain", label="Read as", elem_id="explore-chat")
                self.read = gr.Button("Read", variant="primary", elem_id="explore-read")
        self.examples = panel(examples(EXAMPLES), elem_id="explore-examples")
        self.notice = panel(elem_id="explore-notice")
        self.layer = layer_choice(state.layers)
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=420):
                self.tokens = panel(empty(START), elem_id="explore-tokens")
                self.heat = panel(elem_id="explore-heat")
                with gr.Row(elem_classes="qs-options", visible=False) as self.heat_options:
                    self.own_scale = gr.Checkbox(True, label="Scale each row by its own maximum")
                    self.only_counted = gr.Checkbox(True, label="Only tokens that count")
            with gr.Column(scale=2, min_width=320):
                self.of_token = panel(elem_id="explore-token-features")
                self.of_text = panel(elem_id="explore-text-features")
        with gr.Row(elem_classes="qs-options", visible=False) as self.depth_options:
            self.through = gr.Button("Through depth", size="sm", elem_id="explore-through", scale=0, min_width=180)
            self.stop_button = gr.Button("Stop", size="sm", elem_id="explore-stop", scale=0, min_width=90)
        self.depth = panel(elem_id="explore-depth")
        self.shown = [
            self.reading, self.tokens, self.of_token, self.of_text, self.heat, self.heat_options, self.depth_options,
            self.depth,
        ]  # fmt: skip
        self.fields = [self.text, self.chat, self.layer]
        self.join()

    def join(self) -> None:
        """Which event calls what."""
        shown = self.shown
        heat = [self.own_scale, self.only_counted]
        on(
            [self.read.click, self.text.submit],
            self.start, [self.text, self.chat, self.layer, *heat], shown, self.notice, self.state,
            show_progress="minimal", show_progress_on=self.tokens,
        )  # fmt: skip
        on(self.examples.pick, self.example, [], [self.text], self.notice, self.state, concurrency_id="edit").then(
            told(self.start, self.notice, self.state), [self.text, self.chat, self.layer, *heat], [*shown, self.notice],
            show_progress="hidden", api_visibility="private", concurrency_id=MODEL, concurrency_limit=1,
        )  # fmt: skip
        on(
            self.layer.input,
            self.move,
            [self.reading, self.layer, *heat],
            shown,
            self.notice,
            self.state,
            trigger_mode="always_last",
        )
        on([box.input for box in heat], self.move, [self.reading, self.layer, *heat], shown, self.notice, self.state)
        on(self.through.click, self.descend, [self.reading], [self.depth], self.notice, self.state, concurrency_id=SETS)
        stops(self.stop_button, self.state.jobs)
        on(
            [part.pick for part in (self.tokens, self.of_token, self.of_text, self.heat)],
            self.choose, [self.reading, *heat], shown, self.notice, self.state,
        )  # fmt: skip

    def descend(self, request: gr.Request, reading: Reading | None) -> Iterator[dict[Any, Any]]:
        """The chosen token and the chosen feature at every layer."""
        if reading is None:
            return
        layers, seen, near = self.state.layers, {}, {}
        with self.state.jobs.at_work(str(request.session_hash)) as stop:
            for i, layer in enumerate(layers):
                if stop.is_set():
                    yield {self.depth: notice("stopped before the last layer")}
                    return
                yield {self.depth: progress_panel(Told("reading", i / len(layers), f"layer {layer}"))}
                seen[layer] = self.state.seen(reading.text, layer, reading.chat)
                if reading.feature >= 0:
                    near[layer] = self.state.nearest(reading.layer, reading.feature, layer)
        shown = view.token_depth_panel(seen, reading, self.state.label)
        yield {self.depth: join(view.feature_depth_panel(seen, near, reading, self.state.label), shown)}

    def start(self, text: str, chat: str, layer: int, own_scale: bool, only_counted: bool) -> dict[Any, Any]:
        """A new text."""
        return self.show(Reading(text, chat, int(layer)), own_scale, only_counted)

    def arrive(self, text: str, chat: str, layer: Any) -> dict[Any, Any]:
        """The text of a link, or of the address when the page is loaded again."""
        layer = whole_number(layer, "layer")
        return {**dict(zip(self.fields, (text, chat, layer), strict=True)), **self.start(text, chat, layer, True, True)}

    def example(self, event: gr.EventData) -> dict[Any, Any]:
        """An example was clicked."""
        return {self.text: EXAMPLES[picked(event, "example") % len(EXAMPLES)]}

    def move(self, reading: Reading | None, layer: int, own_scale: bool, only_counted: bool) -> dict[Any, Any]:
        """Another layer, or another way to draw."""
        if reading is None:
            return {}
        feature = reading.feature if int(layer) == reading.layer else -1
        return self.show(replace(reading, layer=int(layer), feature=feature), own_scale, only_counted)

    def choose(
        self, reading: Reading | None, own_scale: bool, only_counted: bool, event: gr.EventData
    ) -> dict[Any, Any]:
        """A token or a feature was clicked."""
        if reading is None:
            return {}
        if (token := picked(event, "token")) >= 0:
            reading = replace(reading, token=token)
        if (feature := picked(event, "feature")) >= 0:
            self.state.check_feature(reading.layer, feature)
            reading = replace(reading, feature=feature)
        return self.show(reading, own_scale, only_counted)

    def show(self, reading: Reading, own_scale: bool, only_counted: bool) -> dict[Any, Any]:
        """Every panel for what is being looked at."""
        state = self.state
        seen = state.seen(reading.text, reading.layer, reading.chat)
        reading = reading.with_default_choice(seen)
        label, doubt = state.label, state.doubt(reading.layer)
        return {
            self.notice: "" if doubt is None else notice(doubt),
            self.reading: reading,
            self.tokens: view.tokens_panel(seen, reading, label),
            self.of_token: view.token_features_panel(seen, reading, label),
            self.of_text: view.text_features_panel(seen, reading, label),
            self.heat: view.heat_panel(seen, reading, label, own_scale=own_scale, only_counted=only_counted),
            self.heat_options: gr.Row(visible=True),
            self.depth_options: gr.Row(visible=True),
            self.depth: "",
        }


def layer_choice(layers: list[int]) -> gr.Slider | gr.Dropdown:
    """What chooses a layer: a slider, or a list where there is one layer or some between are missing."""
    shared = {"value": layers[len(layers) // 2], "label": "Layer", "elem_id": "explore-layer"}
    if len(layers) > 1 and layers == list(range(layers[0], layers[-1] + 1)):
        return gr.Slider(layers[0], layers[-1], step=1, **shared)
    return gr.Dropdown(layers, **shared)
