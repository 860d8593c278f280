"""The Compare tab: two texts, or two uploaded sets of texts."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ..app_state import AppState
from ..look import compare as view
from ..look.components import empty, examples
from ..stages import stage
from ..wiring import SETS, on, panel, picked

PAIRS = (
    ("Please come at nine, dear colleague.", "Come at nine, you idiot."),
    ("Where is the station?", "Wo ist der Bahnhof?"),
)
START = (
    "Give two texts, or upload two sets, and press Compare: features that are active on one side and not on the other."
)
OPTIONS = [
    ("the first token", "first"),
    ("tokens that occur on both sides", "common"),
    ("the common beginning", "prefix"),
]
SUFFIXES = [".txt", ".jsonl", ".csv"]


class CompareTab:
    """Builds the tab inside the page that is being built, and answers what happens in it."""

    def __init__(self, state: AppState) -> None:
        self.state = state
        self.texts, self.files = [], []
        with gr.Row(equal_height=False):
            for side in "AB":
                with gr.Column(min_width=320):
                    self.texts.append(
                        gr.Textbox(label=f"Text {side}", lines=3, max_lines=10, elem_id=f"compare-text-{side.lower()}",
                                   max_length=state.limits.characters, placeholder="Write or paste a text")
                    )  # fmt: skip
                    with gr.Accordion("or upload a set of texts", open=False):
                        self.files.append(
                            gr.File(label="A text per line (.txt), or rows with a column text (.jsonl, .csv)",
                                    file_types=SUFFIXES, height=110, elem_id=f"compare-file-{side.lower()}")
                        )  # fmt: skip
        self.examples = panel(examples([" / ".join(pair) for pair in PAIRS]), elem_id="compare-examples")
        with gr.Row(elem_classes="qs-options", equal_height=False):
            self.options = gr.CheckboxGroup(
                OPTIONS, value=[], label="Also leave out", scale=4, elem_id="compare-options"
            )
            self.chat = gr.Dropdown(state.chats, value="plain", label="Read as", min_width=150, scale=1)
            self.first = gr.Dropdown(state.layers, value=state.layers[0], label="From layer", min_width=90, scale=1)
            self.last = gr.Dropdown(state.layers, value=state.layers[-1], label="to layer", min_width=90, scale=1)
            self.n = gr.Number(
                5, label="Features per layer", minimum=1, maximum=50, precision=0, min_width=110, scale=1
            )
        self.go = gr.Button("Compare", variant="primary", elem_id="compare-go", elem_classes="qs-go")
        self.notice = panel(elem_id="compare-notice")
        with gr.Row(equal_height=False, elem_classes="qs-pair"):
            with gr.Column(scale=2, min_width=340, elem_classes="qs-sticky"):
                self.side_a = panel(elem_id="compare-side-a")
                self.side_b = panel(elem_id="compare-side-b")
            with gr.Column(scale=3, min_width=420):
                self.ranking = panel(empty(START), elem_id="compare-ranking")
        on(self.examples.pick, self.example, [], self.texts, self.notice, self.state, concurrency_id="edit")
        inputs = [*self.texts, *self.files, self.options, self.chat, self.first, self.last, self.n]
        on(
            [self.go.click, *(text.submit for text in self.texts)],
            self.compare, inputs, [self.side_a, self.side_b, self.ranking], self.notice, self.state,
            concurrency_id=SETS, waiting="reading both sides",
        )  # fmt: skip

    def example(self, event: gr.EventData) -> dict[Any, Any]:
        """An example was clicked."""
        pair = PAIRS[picked(event, "example") % len(PAIRS)]
        return dict(zip(self.texts, pair, strict=True))

    def compare(
        self,
        text_a: str,
        text_b: str,
        file_a: str | None,
        file_b: str | None,
        options: list[str],
        chat: str,
        first: int,
        last: int,
        n: float,
    ) -> dict[Any, Any]:
        """Both sides and the ranking."""
        state = self.state
        first_side, second_side = state.side(text_a, file_a, "first"), state.side(text_b, file_b, "second")
        layers, n = state.layer_range(first, last), state.limits.check_features(n or 5)
        found, seen = state.compare(first_side, second_side, layers, n, options, chat)
        stage("looking up names")
        for layer, ranked in found.items():
            state.names.learn(layer, [one.feature for one in ranked])
        a, b, ranking = view.compared(found, seen, len(first_side), state.label)
        return {self.side_a: a, self.side_b: b, self.ranking: ranking}
