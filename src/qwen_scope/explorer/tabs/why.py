"""The Why tab: the graph of what leads to a token, to click through, and its features as a recipe for Steer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import gradio as gr

from qwen_scope.circuits import DEFAULT, Graph, Question, WhyOptions, ask, explain, graph_recipe, read
from qwen_scope.errors import InputError, brief
from qwen_scope.report import Progress
from qwen_scope.sae import parse_feature

from ..access.limits import one_of, whole_number
from ..app_state import AppState
from ..jobs import Told, watched
from ..look import why as view
from ..look.components import empty, examples, go, notice, progress_panel
from ..steering import rows_of
from ..wiring import SETS, on, panel, picked, stops
from .steer import SteerTab

METHODS = [
    ("gradient", "gradient"),
    ("RelP", "relp"),
    ("integrated gradients", "ig"),
    ("ablation of the strongest", "exact"),
]
EXAMPLES = (("Guten Morgen, wo ist", " der", " the"), ("3+4=", "", ""))
START = "Give a prompt and press Explain: which features its next token hangs on, and what writes them."
EXACT = 20
"""Features whose effect is compared with ablation."""

CHARACTERS = 200
"""Of a token or of a feature's name."""

FIELDS = ("token", "against", "feature", "position", "method", "nodes")


class WhyTab:
    """Builds the tab inside the page that is being built, and answers what happens in it."""

    def __init__(self, state: AppState) -> None:
        self.state = state
        self.graph = gr.State(None, time_to_live=3600)
        with gr.Row(elem_classes="qs-fields", equal_height=False):
            self.prompt = gr.Textbox(
                label="Prompt", lines=2, max_lines=6, scale=4, min_width=320, elem_id="why-prompt",
                placeholder="Write or paste a text; its next token is explained", max_length=state.limits.characters,
            )  # fmt: skip
            self.chat = gr.Dropdown(state.chats, value="plain", label="Read as", scale=1, min_width=150)
        with gr.Row(elem_classes="qs-fields"):
            word: dict[str, Any] = {"max_lines": 1, "max_length": CHARACTERS, "min_width": 160}
            self.token = gr.Textbox(
                label="Token, with its space", placeholder="the most likely", elem_id="why-token", **word
            )
            self.against = gr.Textbox(label="Against this token", elem_id="why-against", **word)
            self.feature = gr.Textbox(
                label="Or a feature's activation", placeholder="LAYER/FEATURE", elem_id="why-feature", **word
            )
        with gr.Row(elem_classes="qs-fields"):
            self.position = gr.Number(-1, label="Position", precision=0, min_width=90, elem_id="why-position")
            self.method = gr.Dropdown(METHODS, value=DEFAULT, label="Effects by", min_width=150)
            self.nodes = gr.Number(
                min(60, state.limits.graph_nodes), label="Features at most", precision=0, minimum=1, min_width=110,
                maximum=state.limits.graph_nodes, elem_id="why-nodes",
            )  # fmt: skip
        self.examples = panel(examples([one[0] for one in EXAMPLES]) if state.known else "", elem_id="why-examples")
        with gr.Row(elem_classes="qs-fields"):
            self.go = gr.Button("Explain", variant="primary", min_width=110, elem_id="why-go")
            self.stop_button = gr.Button("Stop", min_width=90, elem_id="why-stop")
            self.steer_button = gr.Button("Steer with its features", min_width=230, elem_id="why-steer")
            self.save_button = gr.Button("Save the page", min_width=120, elem_id="why-save")
        self.notice = panel(elem_id="why-notice")
        self.picture = panel(empty(START), elem_id="why-graph")
        self.fields = [self.token, self.against, self.feature, self.position, self.method, self.nodes]
        on(
            [self.go.click, self.prompt.submit], self.explain, [self.prompt, self.chat, *self.fields],
            [self.picture, self.graph], self.notice, state, concurrency_id=SETS,
        )  # fmt: skip
        on(
            self.examples.pick, self.example, [], [self.prompt, self.token, self.against], self.notice, state,
            concurrency_id="edit",
        )  # fmt: skip
        stops(self.stop_button, state.jobs)
        self.save_button.click(None, None, None, api_visibility="private", js="() => window.qwenScope.savePage()")

    def join(self, steer: SteerTab) -> None:
        """One click makes a recipe of the graph's features, or of those that are pinned in it, and goes to Steer."""
        pinned = gr.Textbox(visible=False)

        def take(pins: str, graph: Graph | None, text: str, prompt: str, chat: str) -> dict[Any, Any]:
            name, rows = recipe_rows(self.state, graph, pins)
            prompt = prompt if prompt.strip() else text
            loaded = steer.loaded(name, rows, prompt, chat)
            return {self.notice: go("steer", "why"), steer.prompt: prompt, **loaded}

        on(
            self.steer_button.click, take, [pinned, self.graph, self.prompt, steer.prompt, steer.chat],
            [steer.prompt, *steer.loads], self.notice, self.state, concurrency_id="edit",
            js="(pins, ...others) => [window.qwenScope.pinned(), ...others]",
        )  # fmt: skip

    def example(self, event: gr.EventData) -> dict[Any, Any]:
        """An example was clicked."""
        return dict(
            zip(
                (self.prompt, self.token, self.against), EXAMPLES[picked(event, "example") % len(EXAMPLES)], strict=True
            )
        )

    def explain(self, request: gr.Request, prompt: str, chat: str, *values: Any) -> Iterator[dict[Any, Any]]:
        """The graph of a prompt."""
        fields: dict[str, Any] = dict(zip(FIELDS, values, strict=True))
        with self.state.jobs.at_work(str(request.session_hash)) as stop:
            yield {self.picture: progress_panel(Told("reading", 0.0, "")), self.graph: None}
            for told in watched(lambda progress: explained(self.state, prompt, chat, fields, progress), stop):
                if isinstance(told, Graph):
                    yield {self.picture: view.graph_panel(told), self.graph: told}
                    return
                yield {self.picture: progress_panel(told)}
        yield {self.picture: notice("the graph was stopped before its end")}


def explained(
    state: AppState, prompt: str, chat: str, fields: Mapping[str, Any], progress: Progress = lambda *_: None
) -> Graph:
    """The graph of a prompt, from fields: token, against, feature, position, method, nodes; an empty one is left out.

    Raises:
        InputError, NotFoundError: a field that makes no sense, or more than this page makes a graph of.
    """
    text, mode = state.check_text(prompt, "prompt"), state.chat(chat)
    question = asked(fields)
    method = one_of(fields.get("method") or DEFAULT, [name for _, name in METHODS], "a method")
    nodes = whole_number(fields.get("nodes") or 60, "number of features")
    if not 0 < nodes <= state.limits.graph_nodes:
        raise InputError(f"a graph on this page has 1 to {state.limits.graph_nodes} features, not {nodes}")
    if (n := state.scope.tokenize([text], chat=mode).lengths[0]) > state.limits.graph_tokens:
        raise InputError(
            f"the prompt has {n:,} tokens and this page makes graphs of up to {state.limits.graph_tokens:,};"
            " shorten it, or use qwen-scope why"
        )
    progress("reading", 0.0, f"{n} tokens")
    found = ask(state.scope, text, question, chat=mode)
    reading = read(state.scope, found.ids, found.quantity, tokens=found.tokens)
    options = WhyOptions(method=method, nodes=nodes, exact=min(EXACT, nodes))
    graph = explain(reading, options, labels=lambda *place: view.label_of(state.label(*place)), progress=progress)
    return replace(graph, model=state.model_name, group=state.sae_name)


def asked(fields: Mapping[str, Any]) -> Question:
    """The question that fields ask.

    Raises:
        InputError: a text that is none or too long, or a token beside a feature.
    """
    texts = {}
    for name in ("token", "against", "feature"):
        value = fields.get(name) or None
        if value is not None and (not isinstance(value, str) or len(value) > CHARACTERS):
            raise InputError(f"{name} is a text of up to {CHARACTERS} characters, not {brief(value)}")
        texts[name] = value
    if (feature := texts["feature"]) is not None:
        if texts["token"] or texts["against"]:
            raise InputError("a graph explains a token or a feature's activation; leave the other field empty")
        parse_feature(feature)
    position = fields.get("position")
    at = -1 if position in (None, "") else whole_number(position, "position")
    return Question(texts["token"], texts["against"], feature, position=at)


def recipe_rows(state: AppState, graph: Graph | None, pins: str) -> tuple[str, list[dict[str, Any]]]:
    """The name and the interventions of a recipe of a graph's strongest features, or of those that are pinned.

    Raises:
        InputError: there is no graph yet, or nothing to steer with.
    """
    if graph is None:
        raise InputError("there is no graph yet; press Explain first")
    nodes = None
    if marked := [int(one) for one in pins[1:-1].replace(" ", "").split(",") if one.isdecimal() and len(one) < 10]:
        nodes = [i for i in marked if i in graph.ladder_of]
        if not nodes:
            raise InputError("none of the pinned nodes is a feature; pin features, or none for the strongest")
    recipe = graph_recipe(graph, state.scope, nodes=nodes)
    state.limits.check_rows([{} for _ in recipe.interventions])
    rows = rows_of(recipe.interventions)
    return recipe.name[:100], [{**row, "amount": float(f"{row['amount']:.4g}")} for row in rows]
