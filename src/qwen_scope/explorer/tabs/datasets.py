"""The Datasets tab: whole stores seen as features, and a classifier's decision traced to tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import gradio as gr
import numpy as np

from qwen_scope.analysis import ANALYSES, Dataset, Evidence, Result, Rule, Table
from qwen_scope.errors import InputError, NotFoundError, brief
from qwen_scope.report import Markup, Progress, draw, element
from qwen_scope.scope import TokenFeatures

from ..access.limits import listed
from ..app_state import AppState
from ..jobs import watched
from ..look.components import card, chip, empty, feature_link, heading, name_of, notice, number, progress_panel
from ..wiring import on, panel, stops

ANALYSIS = "analysis"
"""The queue of analyses, which need no model."""

ROWS = 40
NAMES = {
    "overlap": "Overlap between datasets",
    "redundancy": "Coverage and redundancy",
    "drift": "Drift from the first to the second",
    "subset": "Smallest subset with the same features",
    "clusters": "Groups of documents",
}
NO_STORES = (
    "Start the page with --store FOLDER, once for every folder that qwen-scope extract has written, to compare whole"
    " datasets here."
)
START = "Choose stores and an analysis and press Analyse."
TRACE_START = "Upload a rule (the .json that qwen-scope classify writes), give a text and press Trace."


class DatasetsTab:
    """Builds the tab inside the page that is being built, and answers what happens in it."""

    def __init__(self, state: AppState) -> None:
        self.state = state
        names = list(state.stores)
        with gr.Row(elem_classes="qs-fields qs-bench"):
            self.stores = gr.CheckboxGroup(names, value=names[:8], label="Stores", scale=3, elem_id="datasets-stores")
            self.analysis = gr.Dropdown(
                [(NAMES.get(name, name), name) for name in ANALYSES], value="overlap", label="Analysis", scale=2,
                min_width=260, elem_id="datasets-analysis",
            )  # fmt: skip
            common = state.common_layers(names[:8])
            self.layer = gr.Dropdown(
                common, value=common[-1] if common else None, label="Layer", scale=1, min_width=90,
                elem_id="datasets-layer",
            )  # fmt: skip
        with gr.Row(elem_classes="qs-fields"):
            self.go = gr.Button(
                "Analyse", variant="primary", scale=0, min_width=180, elem_classes="qs-go", elem_id="datasets-go"
            )
            self.stop_button = gr.Button("Stop", scale=0, min_width=110, elem_id="datasets-stop")
        self.notice = panel(elem_id="datasets-notice")
        self.result = panel(empty(START if names else NO_STORES), elem_id="datasets-result")
        fold = gr.Accordion("Trace a classifier's decision", open=False, elem_id="datasets-trace-fold")
        with fold, gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=320):
                self.rule = gr.File(label="Rule (.json)", file_types=[".json"], height=110, elem_id="trace-rule")
                self.text = gr.Textbox(label="Text", lines=3, elem_id="trace-text", max_length=state.limits.characters)
                self.chat = gr.Dropdown(state.chats, value="plain", label="Read as")
                self.trace_button = gr.Button("Trace", elem_id="trace-go")
            with gr.Column(scale=3, min_width=420):
                self.trace_notice = panel(elem_id="trace-notice")
                self.traced = panel(empty(TRACE_START), elem_id="trace-result")
        on(
            self.go.click, self.analyse, [self.stores, self.analysis, self.layer], [self.result],
            self.notice, self.state,
            concurrency_id=ANALYSIS,
        )  # fmt: skip
        on(
            self.stores.input, self.choose, [self.stores, self.layer], [self.layer], self.notice, self.state,
            trigger_mode="always_last", concurrency_id="edit",
        )  # fmt: skip
        stops(self.stop_button, state.jobs)
        on(
            self.trace_button.click, self.trace, [self.rule, self.text, self.chat], [self.traced],
            self.trace_notice, self.state, waiting="reading the text",
        )  # fmt: skip

    def choose(self, stores: list[str], layer: int | None) -> dict[Any, Any]:
        """Stores were chosen: the layers that all of them have."""
        common = self.state.common_layers(stores)
        value = layer if layer in common else common[-1] if common else None
        said = "" if common or not stores else notice(f"the stores {', '.join(stores)} have no layer in common")
        return {self.layer: gr.Dropdown(common, value=value), self.notice: said}

    def analyse(
        self, request: gr.Request, stores: list[str], analysis: str, layer: int | None
    ) -> Iterator[dict[Any, Any]]:
        """One analysis of the chosen stores."""
        started = time.monotonic()
        if layer is None:
            raise InputError("these stores have no layer in common; choose stores that share one")
        with self.state.jobs.at_work(str(request.session_hash)) as stop:
            for told in watched(lambda progress: analysed(self.state, stores, analysis, int(layer), progress), stop):
                if isinstance(told, Result):
                    title, took = NAMES.get(analysis, analysis), time.monotonic() - started
                    yield {self.result: result_panel(title, told, took, self.state)}
                    return
                yield {self.result: progress_panel(told)}
        yield {self.result: notice("the analysis was stopped before its end")}

    def trace(self, rule: str | None, text: str, chat: str) -> dict[Any, Any]:
        """Why a rule calls a text positive, or that it does not."""
        if rule is None:
            raise InputError("upload a rule first: the .json that qwen-scope classify writes")
        loaded = Rule.load(rule)
        text, mode = self.state.check_text(text), self.state.chat(chat)
        seen = self.state.scope.features([text], loaded.layers, chat=mode, counted=loaded.counted)
        items = {layer: one_item(self.state, seen, layer) for layer in loaded.layers}
        evidence = loaded.trace(items, 0)
        tokens = seen.tokens[0]
        for layer in loaded.layers:
            self.state.names.learn(layer, [one.feature for one in evidence if one.layer == layer])
        verdict = verdict_of(loaded, items)
        return {self.traced: trace_panel(self.state, loaded, verdict, tokens, evidence)}


def analysed(
    state: AppState, stores: list[str], analysis: str, layer: int, progress: Progress = lambda *_: None
) -> Result:
    """The result of one analysis of stores the page was started with; it reports before each store, and before the end.

    Raises:
        InputError, NotFoundError, MismatchError: unknown names, too few stores, or stores that do not fit together.
    """
    if not isinstance(analysis, str) or analysis not in ANALYSES:
        raise NotFoundError(f"there is no analysis {brief(analysis)}; there are {', '.join(ANALYSES)}")
    chosen = ANALYSES[analysis]
    stores = listed(stores, "stores", len(state.stores))
    for name in stores:
        state.folder(name)
        if stores.count(name) > 1:
            raise InputError(f"the store {name!r} is named twice")
    if len(stores) < chosen.datasets:
        raise InputError(f"{analysis} needs at least {chosen.datasets} stores; {len(stores)} chosen")
    datasets = []
    for i, name in enumerate(stores):
        progress("reading", i / (len(stores) + 1), name)
        with state.store(name) as store:
            texts = chosen.texts
            datasets.append(Dataset.from_store(store, layer, chosen.reduction, name=name, texts=texts))  # pyright: ignore[reportArgumentType]
    progress("comparing", len(stores) / (len(stores) + 1), NAMES.get(analysis, analysis))
    return chosen.run(datasets)


def one_item(state: AppState, seen: TokenFeatures, layer: int) -> Dataset:
    """What was seen of one text, as a dataset of one item."""
    best = sorted(seen.strongest(0, layer), key=lambda one: one.feature)
    sae = state.scope.saes[layer]
    columns = ([one.feature for one in best], [one.maximum for one in best], [one.position for one in best])
    return Dataset(
        "text", ("0",), layer, sae.d_sae, sae.identity.fingerprint, np.zeros(len(best), np.int32),
        np.array(columns[0], np.int32), np.array(columns[1], np.float32), np.array(columns[2], np.int32), "max",
    )  # fmt: skip


def result_panel(title: str, found: Result, seconds: float, state: AppState) -> Markup:
    """What a result comes to, its notes, figures and tables, without any path of this machine."""
    shown = [heading(title, f"{seconds:.1f} s")]
    shown += [element("p", state.discreet(found.verdict))] if found.verdict else []
    shown += [element("p", state.discreet(note), class_="qs-remarkable") for note in found.notes]
    drawn = [
        element("figure", element("figcaption", figure.title), element("div", draw(figure), class_="qs-scroll"))
        for figure in found.figures
    ]
    shown.append(element("div", *drawn, class_="qs-figures"))
    for table in found.tables:
        shown.append(table_of(table, state))
    return card(element("div", *shown, class_="qs-result"))


def table_of(table: Table, state: AppState) -> Markup:
    """The first rows of a table."""
    right = [all(numeric(row[i]) for row in table.rows) for i in range(len(table.columns))]
    names = zip(table.columns, right, strict=True)
    head = element("tr", *(element("th", n, scope="col", class_="qs-figure" if r else None) for n, r in names))
    rows = []
    for row in list(table.rows)[:ROWS]:
        cells = [element("td", cell_of(cell, state), class_="qs-figure" if numeric(cell) else None) for cell in row]
        rows.append(element("tr", *cells))
    more = len(table.rows) - ROWS
    words = f"and {more:,} rows more: qwen-scope analyze shows all"
    body = element("table", element("thead", head), element("tbody", *rows), class_="qs-table qs-ranked")
    rest = element("p", words, class_="qs-note") if more > 0 else None
    return element("div", heading(table.title), element("div", body, class_="qs-scroll"), rest)


def numeric(cell: Any) -> bool:
    """Whether a cell stands to the right."""
    return isinstance(cell, int | float)


def cell_of(cell: Any, state: AppState) -> str | None:
    """A cell as text."""
    return number(cell) if isinstance(cell, float) else None if cell is None else state.discreet(str(cell))


def verdict_of(rule: Rule, items: dict[int, Dataset]) -> str:
    """What a rule says of one text."""
    if rule.decide(items)[0]:
        return "positive"
    if rule.weighted:
        return f"negative: the weighted sum of its features is {number(float(rule.scores(items)[0]))}, not above 0"
    return "negative: no feature of the rule exceeds its threshold"


def trace_panel(state: AppState, rule: Rule, verdict: str, tokens: list[str], evidence: list[Evidence]) -> Markup:
    """The tokens that decided, and the features that fired there."""
    places = {one.position: one for one in reversed(evidence)}
    top = max((one.value for one in evidence), default=1.0)
    made = [
        chip(token, places[i].value if i in places else 0.0, top,
             title=f"feature {places[i].feature}: {number(places[i].value)}" if i in places else None)
        for i, token in enumerate(tokens)
    ]  # fmt: skip
    rows = [
        element(
            "tr",
            element("td", element("b", one.feature), " ", name_of(state.label(one.layer, one.feature))),
            element("td", f"layer {one.layer}"),
            element("td", chip(tokens[one.position]), f" token {one.position}"),
            element("td", number(one.value), class_="qs-figure"),
            element("td", feature_link(one.layer, one.feature)),
        )
        for one in evidence
    ]
    table = element("table", element("tbody", *rows), class_="qs-table qs-ranked") if rows else None
    return card(
        heading(f"“{rule.name}”", verdict), element("div", *made, class_="qs-tokens", dir="auto"), table or Markup("")
    )
