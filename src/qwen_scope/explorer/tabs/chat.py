"""The Chat tab: a conversation with the model, in which the recipe of the Steer tab is on or off turn by turn."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from qwen_scope.errors import InputError

from .. import steering
from ..app_state import AppState
from ..chatting import Turn, answers, asked
from ..look import chat as view
from ..look.components import empty, go
from ..look.steer import sentence
from ..steering import DECODING
from ..wiring import on, panel, picked, stops
from .steer import PAUSE, STEER, SteerTab

NO_TEMPLATE = "This model has no chat template, so there is no conversation with it; Steer continues any text."
NEW_TOKENS = 200


class ChatTab:
    """Builds the tab inside the page that is being built, and answers what happens in it."""

    def __init__(self, state: AppState, steer: SteerTab) -> None:
        self.state, self.steer = state, steer
        modes = [one for one in state.chats if one[1] != "plain"]
        if not modes:
            panel(empty(NO_TEMPLATE), elem_id="chat-talk")
            return
        self.turns = gr.State([], time_to_live=3600)
        self.notice = panel(elem_id="chat-notice")
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=420):
                self.talk = panel(view.chat_panel([]), elem_id="chat-talk")
                self.message = gr.Textbox(
                    label="Message", lines=2, max_lines=8, elem_id="chat-message", placeholder="Say something",
                    max_length=state.limits.characters,
                )  # fmt: skip
                with gr.Row(elem_classes="qs-fields qs-send"):
                    self.on = gr.Checkbox(True, label="With the recipe", elem_id="chat-on", min_width=150)
                    self.send = gr.Button("Send", variant="primary", elem_id="chat-send", min_width=110)
                    self.stop_button = gr.Button("Stop", elem_id="chat-stop", min_width=90)
            with gr.Column(scale=2, min_width=320):
                self.recipe = panel(self.recipe_of([state.default_intervention()]), elem_id="chat-recipe")
                self.mode = gr.Dropdown(modes, value=modes[-1][1], label="Read as", elem_id="chat-mode")
                most = state.limits.new_tokens
                self.new = gr.Slider(1, most, value=min(NEW_TOKENS, most), step=1, label="Most new tokens")
        self.join()

    def join(self) -> None:
        """Which event calls what."""
        work: dict[str, Any] = {"concurrency_id": STEER, "concurrency_limit": 2, "waiting": "preparing"}
        given = [self.turns, self.mode, self.new, self.steer.rows, *self.steer.decoding]
        shown = [self.turns, self.talk, self.message]
        on(
            [self.send.click, self.message.submit], self.say, [self.message, self.on, *given], shown, self.notice,
            self.state, **work,
        )  # fmt: skip
        on(self.talk.pick, self.again, given, shown, self.notice, self.state, **work)
        on(
            self.recipe.pick, lambda: {self.notice: go("steer", "chat")}, [], [], self.notice, self.state,
            concurrency_id="edit",
        )  # fmt: skip
        on(
            self.steer.rows.change, lambda rows: {self.recipe: self.recipe_of(rows)}, [self.steer.rows], [self.recipe],
            self.notice, self.state, concurrency_id="edit",
        )  # fmt: skip
        stops(self.stop_button, self.state.jobs)

    def recipe_of(self, rows: Sequence[dict]) -> Any:
        """The recipe in words."""
        return view.recipe_panel([sentence(row, self.state.label) for row in rows])

    def say(
        self, request: gr.Request, text: str, steered: bool, turns: list[Turn], *given: Any
    ) -> Iterator[dict[Any, Any]]:
        """The visitor says something, and the model answers."""
        talk = asked(self.state, turns, text)
        first = True
        for update in self.answer(str(request.session_hash), talk, steered, *given):
            yield {self.message: "", **update} if first else update
            first = False

    def again(self, request: gr.Request, event: gr.EventData, turns: list[Turn], *given: Any) -> Iterator[dict]:
        """The last answer once more, with the recipe or without; or a new conversation."""
        if picked(event, "new") >= 0:
            yield {self.turns: [], self.talk: view.chat_panel([])}
            return
        steered = picked(event, "again")
        if steered < 0 or not turns or turns[-1].role != "assistant":
            return
        yield from self.answer(str(request.session_hash), turns[:-1], bool(steered), *given)

    def answer(
        self, visitor: str, talk: list[Turn], steered: bool, mode: str, new: int, rows: list[dict], *how: Any
    ) -> Iterator[dict[Any, Any]]:
        """The model's answer to a conversation, growing."""
        fields = dict(zip(DECODING, how, strict=True)) | {"max_new_tokens": new}
        decoding = steering.decoding(self.state, fields)
        chosen = steering.interventions(self.state, rows) if steered else []
        if steered and not chosen:
            raise InputError("the recipe is empty; choose a feature in Steer, or switch the recipe off")
        words = "; ".join(f"{one['op']} {one['amount']} of {one['layer']}/{one['feature']}" for one in rows)
        last, turn = 0.0, None
        yield {self.talk: view.chat_panel(talk)}
        with self.state.jobs.at_work(visitor) as stop:
            for turn in answers(self.state, talk, mode, chosen, words if steered else "", decoding, stop):
                if turn.state != "writing" or time.monotonic() - last > PAUSE:
                    last = time.monotonic()
                    yield {self.talk: view.chat_panel([*talk, turn])}
        if turn is not None:
            yield {self.turns: [*talk, turn], self.talk: view.chat_panel([*talk, turn])}
