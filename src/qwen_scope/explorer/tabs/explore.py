"""The Explore tab: read a text, click through its tokens and features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import gradio as gr

from qwen_scope.report import join

from ..access.limits import whole_number
from ..app_state import AppState
from ..jobs import Told
from ..look import explore as view
from ..look.components import empty, examples, notice, progress_panel
from ..look.explore import Reading
from ..stages import stage
from ..wiring import MODEL, SETS, on, panel, picked, stops, told

EXAMPLES = (
    "Could you wait, please? Shut up, you fool!",
    "Where is the station? Wo ist der Bahnhof? 车站在哪里？",
    "def mean(values):\n    return sum(values) / len(values)\n",
)

READING = "reading the text"

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
                self.chat = gr.Dropdown(state.chats, value="plain", label="Read as", elem_id="explore-chat")
                self.read = gr.Button("Read", variant="primary", elem_id="explore-read")
        self.examples = panel(examples(EXAMPLES), elem_id="explore-examples")
        self.notice = panel(elem_id="explore-notice")
        self.layer = layer_choice(state.layers)
        with gr.Row(equal_height=False, elem_classes="qs-pair"):
            with gr.Column(scale=3, min_width=420):
                self.tokens = panel(empty(START), elem_id="explore-tokens")
                self.heat = panel(elem_id="explore-heat")
            with gr.Column(scale=2, min_width=320):
                self.of_token = panel(elem_id="explore-token-features")
                self.of_text = panel(elem_id="explore-text-features")
        with gr.Row(elem_classes="qs-options", visible=False) as self.depth_options:
            self.through = gr.Button("Through depth", size="sm", elem_id="explore-through", scale=0, min_width=180)
            self.stop_button = gr.Button("Stop", size="sm", elem_id="explore-stop", scale=0, min_width=90)
        self.depth = panel(elem_id="explore-depth")
        self.shown = [
            self.reading, self.tokens, self.of_token, self.of_text, self.heat, self.depth_options, self.depth,
        ]  # fmt: skip
        self.fields = [self.text, self.chat, self.layer]
        self.join()

    def join(self) -> None:
        """Which event calls what."""
        shown, started = self.shown, [self.text, self.chat, self.layer, self.reading]
        on([self.read.click, self.text.submit], self.start, started, shown, self.notice, self.state, waiting=READING)
        on(self.examples.pick, self.example, [], [self.text], self.notice, self.state, concurrency_id="edit").then(
            told(self.start, self.notice, self.state, READING), started, [*shown, self.notice],
            show_progress="hidden", api_visibility="private", concurrency_id=MODEL, concurrency_limit=1,
        )  # fmt: skip
        on(
            self.layer.input, self.move, [self.reading, self.layer], shown, self.notice, self.state,
            trigger_mode="always_last", waiting=READING,
        )  # fmt: skip
        on(self.through.click, self.descend, [self.reading], [self.depth], self.notice, self.state, concurrency_id=SETS)
        stops(self.stop_button, self.state.jobs)
        on(
            [part.pick for part in (self.tokens, self.of_token, self.of_text, self.heat)],
            self.choose, [self.reading], shown, self.notice, self.state, waiting=READING,
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
                self.state.names.learn(layer, view.depth_features(seen[layer], layer, reading.token))
                if reading.feature >= 0:
                    near[layer] = found = self.state.nearest(reading.layer, reading.feature, layer)
                    self.state.names.learn(layer, [found.feature] if found is not None else [])
        shown = view.token_depth_panel(seen, reading, self.state.label)
        yield {self.depth: join(view.feature_depth_panel(seen, near, reading, self.state.label), shown)}

    def start(self, text: str, chat: str, layer: int, before: Reading | None = None) -> dict[Any, Any]:
        """A new text; the heat map is drawn as before."""
        drawn = before if before is not None else Reading("", "plain", 0)
        return self.show(Reading(text, chat, int(layer), -1, -1, drawn.own_scale, drawn.only_counted))

    def arrive(self, text: str, chat: str, layer: Any) -> dict[Any, Any]:
        """The text of a link, or of the address when the page is loaded again."""
        layer = whole_number(layer, "layer")
        return {**dict(zip(self.fields, (text, chat, layer), strict=True)), **self.start(text, chat, layer)}

    def example(self, event: gr.EventData) -> dict[Any, Any]:
        """An example was clicked."""
        return {self.text: EXAMPLES[picked(event, "example") % len(EXAMPLES)]}

    def move(self, reading: Reading | None, layer: int) -> dict[Any, Any]:
        """Another layer."""
        if reading is None:
            return {}
        feature = reading.feature if int(layer) == reading.layer else -1
        return self.show(replace(reading, layer=int(layer), feature=feature))

    def choose(self, reading: Reading | None, event: gr.EventData) -> dict[Any, Any]:
        """A token, a feature or a switch of the heat map was clicked."""
        if reading is None:
            return {}
        if (token := picked(event, "token")) >= 0:
            reading = replace(reading, token=token)
        if (feature := picked(event, "feature")) >= 0:
            self.state.check_feature(reading.layer, feature)
            reading = replace(reading, feature=feature)
        if picked(event, "own") >= 0:
            reading = replace(reading, own_scale=not reading.own_scale)
        if picked(event, "counted") >= 0:
            reading = replace(reading, only_counted=not reading.only_counted)
        return self.show(reading)

    def show(self, reading: Reading) -> dict[Any, Any]:
        """Every panel for what is being looked at."""
        state = self.state
        seen = state.seen(reading.text, reading.layer, reading.chat)
        reading = reading.with_default_choice(seen)
        stage("looking up names")
        state.names.learn(reading.layer, view.shown_features(seen, reading))
        label, doubt = state.label, state.doubt(reading.layer)
        return {
            self.notice: "" if doubt is None else notice(doubt),
            self.reading: reading,
            self.tokens: view.tokens_panel(seen, reading, label),
            self.of_token: view.token_features_panel(seen, reading, label),
            self.of_text: view.text_features_panel(seen, reading, label),
            self.heat: view.heat_panel(seen, reading, label),
            self.depth_options: gr.Row(visible=True),
            self.depth: "",
        }


def layer_choice(layers: list[int]) -> gr.Slider | gr.Dropdown:
    """What chooses a layer: a slider, or a list where there is one layer or some between are missing."""
    shared = {"value": layers[len(layers) // 2], "label": "Layer", "elem_id": "explore-layer"}
    if len(layers) > 1 and layers == list(range(layers[0], layers[-1] + 1)):
        return gr.Slider(layers[0], layers[-1], step=1, **shared)
    return gr.Dropdown(layers, **shared)
