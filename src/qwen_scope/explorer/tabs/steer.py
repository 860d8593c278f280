"""The Steer tab: change features, and see both continuations grow side by side."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import gradio as gr

from qwen_scope.errors import QwenScopeError
from qwen_scope.features import Sweep
from qwen_scope.report import Markup
from qwen_scope.steer import Decoding, Generation

from .. import steering
from ..access.limits import whole_number
from ..app_state import AppState
from ..jobs import Told, watched
from ..look import steer as view
from ..look.components import empty, examples, notice, progress_panel
from ..steering import DECODING, FIELDS
from ..wiring import on, panel, picked, stops

STEER = "steer"
"""The queue of generations: apart from the model's, so that nobody waits for somebody's long text to read theirs."""

SWEEP = "sweep"
"""The queue of sweeps, each of which generates for long."""

OPS = [
    ("add", "add"),
    ("scale its activation", "scale"),
    ("hold its activation at", "clamp"),
    ("keep its activation at least at", "floor"),
    ("keep its activation at most at", "cap"),
    ("remove", "ablate"),
]
UNITS = [(words, unit) for unit, words in view.UNITS.items()]
AIMS = [
    ("the feature itself, in what is written", "feature"),
    ("texts that match a regular expression", "regex"),
    ("letters of a script, such as CYRILLIC", "script"),
    ("this continuation becoming likelier", "text"),
]
GENERIC = {"Light": 0.1, "Medium": 0.3, "Strong": 0.6}
SHARES = {"Light": 0.25, "Medium": 0.5, "Strong": 1.0}
START = "Choose a feature and press Run: the text as the model writes it, and as it writes it under your changes."
PAUSE = 0.05  # seconds between two updates of a growing text


class SteerTab:
    """Builds the tab inside the page that is being built, and answers what happens in it."""

    def __init__(self, state: AppState) -> None:
        self.state = state
        self.rows = gr.State([state.default_intervention()])
        self.selected = gr.State(0)
        self.sides = gr.State(None, time_to_live=3600)
        self.presets = gr.State({})
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=340):
                self.build_prompt()
                self.build_editor()
                self.build_decoding()
                with gr.Row():
                    self.run_button = gr.Button("Run", variant="primary", elem_id="steer-run")
                    self.stop_button = gr.Button("Stop", elem_id="steer-stop")
            with gr.Column(scale=3, min_width=420):
                self.notice = panel(elem_id="steer-notice")
                with gr.Row(equal_height=True, elem_classes="qs-pair"):
                    self.plain = panel(empty(START), elem_id="steer-plain", min_width=240)
                    self.steered = panel(elem_id="steer-steered", min_width=240)
                self.candidates = panel(elem_id="steer-candidates")
                self.build_sweep()
        self.join()

    def build_prompt(self) -> None:
        """Where the prompt is written, with its tokens below."""
        self.prompt = gr.Textbox(
            self.state.default_prompt(), label="Prompt", lines=2, max_lines=8, elem_id="steer-prompt",
            max_length=self.state.limits.characters,
        )  # fmt: skip
        self.chat = gr.Dropdown(self.state.chats, value="plain", label="Read as")
        shown: Markup | str = ""
        if prompt := self.state.default_prompt():
            rows = [self.state.default_intervention()]
            shown = view.preview_panel(*steering.preview(self.state, prompt, "plain", rows))
        self.preview = panel(shown, elem_id="steer-preview")
        names = list(self.state.presets)
        self.examples = panel(examples(names) if names else "", elem_id="steer-presets")

    def build_editor(self) -> None:
        """The list of interventions, and fields for the chosen one."""
        first = self.state.default_intervention()
        self.listed = panel(self.list_of([first], 0), elem_id="steer-list")
        with gr.Row(elem_classes="qs-fields"):
            self.layer = gr.Dropdown(self.state.layers, value=first["layer"], label="Layer", min_width=80)
            self.feature = gr.Number(
                first["feature"], label="Feature", precision=0, min_width=100, elem_id="steer-feature"
            )
            self.op = gr.Dropdown(OPS, value="add", label="What is done", min_width=150)
        with gr.Row(elem_classes="qs-fields"):
            self.amount = gr.Number(first["amount"], label="Amount", min_width=90, elem_id="steer-amount", step=0.05)
            self.unit = gr.Dropdown(UNITS, value=first["unit"], label="Unit", min_width=170)
            self.where = gr.Textbox(
                "all", label="Positions", placeholder="all, prompt, generated, 0,2,5-8", max_lines=1, min_width=120,
                elem_id="steer-where", max_length=500,
            )  # fmt: skip
        with gr.Row(elem_classes="qs-fields"):
            self.strengths = {name: gr.Button(name, size="sm", min_width=70) for name in GENERIC}
        self.editor = [self.layer, self.feature, self.op, self.amount, self.unit, self.where]

    def build_decoding(self) -> None:
        """How tokens are chosen, beginning with the model's own choice, and recipes."""
        own = Decoding(sample=True).filled(self.state.scope.model)
        with gr.Accordion("Sampling", open=False):
            with gr.Row(elem_classes="qs-fields"):
                new = gr.Slider(1, self.state.limits.new_tokens, value=60, step=1, label="Most new tokens")
                sample = gr.Checkbox(True, label="Sample (off: greedy)")
            with gr.Row(elem_classes="qs-fields"):
                temperature = gr.Number(own.temperature, label="Temperature", minimum=0, min_width=80)
                top_p = gr.Number(own.top_p, label="Top-p", minimum=0, maximum=1, min_width=80)
                top_k = gr.Number(own.top_k, label="Top-k (0: off)", precision=0, minimum=0, min_width=80)
                penalty = gr.Number(own.repetition_penalty, label="Repetition penalty", min_width=80)
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=80)
        self.decoding = [new, sample, temperature, top_p, top_k, penalty, seed]
        with gr.Accordion("Recipes", open=False):
            self.recipe_name = gr.Textbox("my recipe", label="Name", max_lines=1, max_length=100)
            with gr.Row():
                self.save = gr.Button("Save to your computer", size="sm", elem_id="steer-save")
                self.load = gr.UploadButton(
                    "Load", file_types=[".json", ".yaml", ".yml"], size="sm", elem_id="steer-load"
                )
            self.saved = gr.Textbox(visible=False)

    def build_sweep(self) -> None:
        """Dose and response."""
        with gr.Accordion("Strength sweep", open=False, elem_id="steer-sweep-fold"):
            with gr.Row(elem_classes="qs-fields"):
                self.aim = gr.Dropdown(AIMS, value="feature", label="Aim", min_width=240)
                self.aim_value = gr.Textbox(label="What to look for", max_lines=1, min_width=160, max_length=500)
            self.sweep_prompts = gr.Textbox(
                label="Prompts, one a line", lines=2, max_length=self.state.limits.characters,
                placeholder="Left empty: the prompt and seven neutral beginnings",
            )  # fmt: skip
            self.sweep_button = gr.Button("Run the sweep", elem_id="steer-sweep", size="sm")
            self.doses = panel(elem_id="steer-doses")

    def join(self) -> None:
        """Which event calls what."""
        edited = [self.rows, self.selected, *self.editor]
        listed = [self.rows, self.listed, self.preview]
        on(
            [field.change if isinstance(field, gr.Textbox) else field.input for field in
             (*self.editor, self.prompt, self.chat)], self.edited,
            [*edited, self.prompt, self.chat], listed,
            self.notice, self.state, trigger_mode="always_last", concurrency_id="edit",
        )  # fmt: skip
        on(
            self.listed.pick, self.choose, [*edited, self.prompt, self.chat],
            [*listed, self.selected, *self.editor], self.notice, self.state, concurrency_id="edit",
        )  # fmt: skip
        self.loads = [*listed, self.selected, self.recipe_name, *self.editor]
        on(
            self.examples.pick, self.preset, [self.prompt, self.chat], self.loads, self.notice, self.state,
            concurrency_id="edit",
        )  # fmt: skip
        for name, button in self.strengths.items():
            on(
                button.click, self.strength(name), [*edited, self.prompt, self.chat, self.presets],
                [*listed, self.amount, self.unit], self.notice, self.state, concurrency_id="edit",
            )  # fmt: skip
        work = {"concurrency_id": STEER, "concurrency_limit": 2}
        run = [*edited, self.prompt, self.chat, *self.decoding]
        on(
            [self.run_button.click, self.prompt.submit], self.run, run,
            [self.rows, self.listed, self.plain, self.steered, self.candidates, self.sides],
            self.notice, self.state, waiting="preparing", **work,
        )  # fmt: skip
        stops(self.stop_button, self.state.jobs)
        for side in ("plain", "steered"):
            on(getattr(self, side).pick, self.token(side), [self.sides],
               [self.plain, self.steered, self.candidates], self.notice, self.state, concurrency_id="edit")  # fmt: skip
        on(
            self.sweep_button.click, self.sweep,
            [*run, self.aim, self.aim_value, self.sweep_prompts, self.presets],
            [self.doses, self.presets], self.notice, self.state, concurrency_id=SWEEP,
        )  # fmt: skip
        on(self.save.click, self.save_recipe, [*edited, self.recipe_name], [self.saved], self.notice, self.state)
        self.saved.change(None, [self.saved, self.recipe_name], None, api_visibility="private", js=SAVE)
        on(self.load.upload, self.load_recipe, [self.load, self.prompt, self.chat], self.loads,
           self.notice, self.state, concurrency_id="edit")  # fmt: skip

    # --- the list and its fields -------------------------------------------------------------------------------------

    def current(self, rows: list[dict], selected: int, fields: tuple) -> list[dict]:
        """The rows, the chosen one as its fields now stand."""
        made = [dict(row) for row in rows] or [self.state.default_intervention()]
        made[min(selected, len(made) - 1)] = dict(zip(FIELDS, fields, strict=True))
        return made

    def list_of(self, rows: list[dict], selected: int) -> Markup:
        """The list of interventions with the names of their features."""
        for row in rows:
            with suppress(QwenScopeError):  # a field that is not filled in yet
                layer, feature = whole_number(row["layer"], "layer"), whole_number(row["feature"], "feature")
                self.state.check_feature(layer, feature)
                self.state.names.learn(layer, [feature])
        return view.list_panel(rows, selected, self.state.label)

    def drawn(self, rows: list[dict], selected: int, prompt: str, chat: str) -> dict[Any, Any]:
        """The list, and the prompt's tokens with those that are changed."""
        shown: Markup | str = ""
        if prompt.strip():
            try:
                shown = view.preview_panel(*steering.preview(self.state, prompt, chat, rows))
            except QwenScopeError as error:
                shown = notice(self.state.discreet(str(error)))
        return {self.rows: rows, self.listed: self.list_of(rows, selected), self.preview: shown}

    def edited(self, rows: list[dict], selected: int, *values: Any) -> dict[Any, Any]:
        """A field has changed."""
        *fields, prompt, chat = values
        return self.drawn(self.current(rows, selected, tuple(fields)), selected, prompt, chat)

    def choose(self, event: gr.EventData, rows: list[dict], selected: int, *values: Any) -> dict[Any, Any]:
        """An intervention of the list was clicked, dropped, or another is wanted."""
        *fields, prompt, chat = values
        rows = self.current(rows, selected, tuple(fields))
        drop = picked(event, "drop")
        if picked(event, "add") >= 0:
            rows, selected = [*rows, {**rows[-1], "feature": None}], len(rows)
        elif 0 <= drop < len(rows) and len(rows) > 1:
            rows, selected = rows[:drop] + rows[drop + 1 :], max(0, min(selected, len(rows) - 2))
        else:
            selected = min(max(0, picked(event, "row")), len(rows) - 1)
        return {self.selected: selected, **self.filled(rows[selected]), **self.drawn(rows, selected, prompt, chat)}

    def filled(self, row: dict) -> dict[Any, Any]:
        """The fields for one intervention."""
        return {field: row[name] for name, field in zip(FIELDS, self.editor, strict=True)}

    def preset(self, event: gr.EventData, prompt: str, chat: str) -> dict[Any, Any]:
        """An intervention that works at once."""
        name = list(self.state.presets)[picked(event, "example") % len(self.state.presets)]
        return self.loaded(name, [dict(self.state.presets[name])], prompt, chat)

    def strength(self, name: str) -> Any:
        """What the button Light, Medium or Strong does: the amount the sweep found, else a usual one."""

        def press(rows: list[dict], selected: int, *values: Any) -> dict[Any, Any]:
            *fields, prompt, chat, presets = values
            rows = self.current(rows, selected, tuple(fields))
            row = rows[min(selected, len(rows) - 1)]
            found = presets.get(f"{row['layer']}:{row['feature']}", self.measured(row))
            row["amount"] = round(found * SHARES[name], 4) if found is not None else GENERIC[name]
            row["unit"] = "resid_norm"
            shown = {self.amount: row["amount"], self.unit: row["unit"]}
            return {**shown, **self.drawn(rows, selected, prompt, chat)}

        return press

    def measured(self, row: dict) -> float | None:
        """The amount that a sweep proposed before the page was made; None where there was none."""
        same = (one for one in self.state.presets.values() if all(one[k] == row[k] for k in ("layer", "feature")))
        return next((one["amount"] for one in same), None)

    # --- work --------------------------------------------------------------------------------------------------------

    def run(self, request: gr.Request, rows: list[dict], selected: int, *values: Any) -> Iterator[dict[Any, Any]]:
        """Both continuations, growing."""
        fields, prompt, chat, how = values[:6], values[6], values[7], values[8:]
        rows = self.current(rows, selected, tuple(fields))
        chosen = steering.interventions(self.state, rows)
        decoding = steering.decoding(self.state, dict(zip(DECODING, how, strict=True)))
        shown = {self.rows: rows, self.listed: self.list_of(rows, selected), self.candidates: "", self.sides: None}
        texts, finished, last = ("", ""), False, 0.0
        with self.state.jobs.at_work(str(request.session_hash)) as stop:
            for left, right, plain, steered in steering.both(self.state, prompt, chat, chosen, decoding, stop):
                texts = (left, right)
                if plain is not None and steered is not None:
                    finished = True
                    yield {**shown, **self.both_sides(plain, steered), self.sides: (plain, steered)}
                elif time.monotonic() - last > PAUSE:
                    last = time.monotonic()
                    yield {**shown, **self.growing(texts, "writing …")}
        if not finished:
            yield {**shown, **self.growing(texts, "stopped")}

    def growing(self, texts: tuple[str, str], remark: str) -> dict[Any, Any]:
        """Both sides while they are written."""
        return {
            self.plain: view.growing_panel("Original", texts[0], remark),
            self.steered: view.growing_panel("Steered", texts[1], remark),
        }

    def both_sides(self, plain: Any, steered: Any, side: str = "", at: int = -1) -> dict[Any, Any]:
        """Both sides finished; a token of one may be chosen."""
        return {
            self.plain: view.side_panel("Original", plain, at if side == "plain" else -1),
            self.steered: view.side_panel("Steered", steered, at if side == "steered" else -1),
        }

    def token(self, side: str) -> Any:
        """A click on a token of one side shows its most probable alternatives."""

        def pick(event: gr.EventData, sides: tuple[Generation, Generation] | None) -> dict[Any, Any]:
            at = picked(event, "token")
            if sides is None:
                return {}
            chosen = sides[0] if side == "plain" else sides[1]
            if not 0 <= at < len(chosen.tokens):
                return {}
            title = "Original" if side == "plain" else "Steered"
            return {
                **self.both_sides(sides[0], sides[1], side, at),
                self.candidates: view.candidates_panel(title, chosen, at),
            }

        return pick

    def sweep(self, request: gr.Request, rows: list[dict], selected: int, *values: Any) -> Iterator[dict[Any, Any]]:
        """Dose and response, and from it the amounts of Light, Medium and Strong."""
        fields, prompt, chat = values[:6], values[6], values[7]
        how, (aim, value, more, presets) = values[8:-4], values[-4:]
        chosen = steering.interventions(self.state, self.current(rows, selected, tuple(fields)))
        chosen, in_lengths = steering.dosed(chosen)
        decoding = steering.decoding(self.state, dict(zip(DECODING, how, strict=True)) | {"max_new_tokens": 40})
        target = steering.sweep_target(self.state, aim, value, chosen[0])
        prompts = steering.sweep_prompts(self.state, prompt, more)
        with self.state.jobs.at_work(str(request.session_hash)) as stop:
            yield {self.doses: progress_panel(Told("sweep", 0.0, ""))}
            work = watched(
                lambda progress: steering.swept(self.state, prompts, chat, chosen, target, decoding, progress), stop
            )
            for told in work:
                if isinstance(told, Sweep):
                    found = dict(presets)
                    if told.proposed is not None and in_lengths:
                        found[f"{chosen[0].layer}:{chosen[0].feature}"] = told.proposed
                    yield {self.doses: view.sweep_panel(told, in_lengths), self.presets: found}
                    return
                yield {self.doses: progress_panel(told)}
        yield {self.doses: notice("the sweep was stopped before its end")}

    # --- recipes -----------------------------------------------------------------------------------------------------

    def save_recipe(self, rows: list[dict], selected: int, *values: Any) -> dict[Any, Any]:
        """The recipe's text, which the browser saves; nothing is written on the server."""
        *fields, name = values
        chosen = steering.interventions(self.state, self.current(rows, selected, tuple(fields)))
        return {self.saved: f"{time.time_ns()}\n{steering.recipe_text(self.state, name, chosen)}"}

    def load_recipe(self, path: str, prompt: str, chat: str) -> dict[Any, Any]:
        """The interventions of an uploaded recipe."""
        name, rows, said = steering.rows_of_recipe(self.state, path)
        said_here = notice(self.state.discreet("; ".join(said))) if said else ""
        return {**self.loaded(name, rows, prompt, chat), self.notice: said_here}

    def loaded(self, name: str, rows: list[dict], prompt: str, chat: str) -> dict[Any, Any]:
        """Interventions that come from elsewhere, in the place of those that were there; for `loads`."""
        drawn = {**self.filled(rows[0]), **self.drawn(rows, 0, prompt, chat)}
        return {self.selected: 0, self.recipe_name: name, **drawn}


SAVE = """(text, name) => {
  if (text) window.qwenScope.save((name || "recipe").replace(/[^\\w -]/g, "_") + ".json", text.replace(/^.*\\n/, ""));
}"""
