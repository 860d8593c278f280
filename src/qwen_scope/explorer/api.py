"""The HTTP API: what the page shows, as plain JSON. `docs/explorer.md` lists the endpoints."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import gradio as gr
from gradio.context import LocalContext
from gradio.events import api

from qwen_scope.errors import InputError, QwenScopeError
from qwen_scope.report import escaped
from qwen_scope.steer import Generation

from . import steering
from .access.discreet import discreet_value
from .access.limits import listed, whole_number
from .app_state import AppState
from .tabs.datasets import ANALYSIS, analysed
from .tabs.steer import STEER, SWEEP
from .wiring import LOOK, MODEL, SETS

PAIRS = 200_000
"""Features with their activations in one answer."""


class Api:
    """The endpoints; each method is one, under its own name, and can be called from Python just as well."""

    def __init__(self, state: AppState) -> None:
        self.state = state

    def join(self, page: gr.Blocks) -> None:
        """Add the endpoints to the page that is being built."""
        sessions = Passing(page)
        for endpoint, queue, limit in (
            (self.info, MODEL, 1),
            (self.features, MODEL, 1),
            (self.compare, SETS, 1),
            (self.feature, LOOK, 2),
            (self.positions, MODEL, 1),
            (self.steer, STEER, 2),
            (self.sweep, SWEEP, 1),
            (self.analyze, ANALYSIS, 1),
        ):
            name = endpoint.__name__
            api(sentences(endpoint, self.state, sessions), api_name=name, concurrency_id=queue, concurrency_limit=limit)

    def info(self) -> dict[str, Any]:
        """What this page looks at: model, SAEs, whether they fit, layers, features, stores, and the limits."""
        state = self.state
        sae = state.scope.saes[state.layers[0]]
        return {
            "model": state.model_name,
            "sae": state.sae_name,
            "layers": state.layers,
            "d_sae": sae.d_sae,
            "k": sae.k,
            "pair": state.pair(),
            "stores": list(state.stores),
            "limits": asdict(state.limits),
        }

    def features(self, text: str, layer: int, chat: str = "plain", n: int = 10) -> dict[str, Any]:
        """The tokens of a text, the n strongest features of each, and those of its tokens that count.

        left_out: why a token does not count (first, special, sink), or "".
        """
        layer, n = whole_number(layer, "layer"), self.state.limits.check_features(n)
        seen = self.state.seen(text, layer, chat)
        if (pairs := len(seen.tokens[0]) * n) > PAIRS:
            raise InputError(f"{pairs:,} activations are more than one answer holds ({PAIRS:,}); ask for a smaller n")
        acts, left_out = seen.of(0, layer), seen.left_out(0, layer)
        tokens = []
        for i, token in enumerate(seen.tokens[0]):
            pairs = zip(acts.indices[i].tolist(), acts.values[i].float().tolist(), strict=True)
            features = [[f, v] for f, v in pairs if v > 0][:n]
            tokens.append({"token": token, "left_out": left_out[i], "features": features})
        strongest = [asdict(one) for one in seen.strongest(0, layer, n)]
        return {"layer": layer, "tokens": tokens, "strongest": strongest}

    def compare(
        self,
        a: list[str],
        b: list[str],
        layers: list[int] | None = None,
        n: int = 5,
        leave_out: list[str] | None = None,
        chat: str = "plain",
    ) -> list[dict[str, Any]]:
        """Features of two lists of texts ranked per layer by the difference of their activation rates.

        leave_out: any of first, common, prefix.
        """
        state, most = self.state, self.state.limits.set_texts
        a, b = (state.limits.check_texts(side, "text", most) for side in (a, b))
        if layers is not None:
            layers = [whole_number(layer, "layer") for layer in listed(layers, "layers", len(state.layers))]
        chosen = state.scope.check_layers(layers)
        found, _ = state.compare(a, b, chosen, state.limits.check_features(n), leave_out or [], chat)
        return [asdict(one) for ranked in found.values() for one in ranked]

    def feature(self, layer: int, feature: int, store: str | None = None) -> dict[str, Any]:
        """All about one feature; with the name of a store also where it fires, its label and its notes."""
        page = self.state.feature_page(whole_number(layer, "layer"), whole_number(feature, "feature"), store)
        data = page.to_json()
        told = {key: discreet_value(data[key], self.state.places) for key in ("label", "notes", "verdict")}
        return {**data, **told, "store": store}

    def positions(self, prompt: str, where: str = "all", chat: str = "plain") -> dict[str, Any]:
        """The tokens of a prompt, and which of them an intervention at these positions changes."""
        tokens, touched, _ = steering.preview(self.state, prompt, chat, [{"where": where}])
        return {"tokens": tokens, "changed": touched}

    def steer(
        self,
        prompt: str,
        interventions: list[dict],
        decoding: dict | None = None,
        chat: str = "plain",
    ) -> dict[str, Any]:
        """A prompt continued with and without interventions, with the probability of every token.

        interventions: objects with layer, feature, amount, and op (add, scale, clamp, floor, cap, ablate), unit
        (resid_norm, max_act, raw), where. decoding: max_new_tokens, sample, temperature, top_p, top_k,
        repetition_penalty, seed.
        """
        chosen = steering.interventions(self.state, interventions)
        how = steering.decoding(self.state, steering.checked_decoding(decoding))
        for *_, plain, steered in steering.both(self.state, prompt, chat, chosen, how, threading.Event()):
            if plain is not None and steered is not None:
                return {"unsteered": written(plain), "steered": written(steered)}
        raise AssertionError("a generation that nobody stopped comes to its end")

    def sweep(
        self,
        prompts: list[str],
        interventions: list[dict],
        aim: str = "feature",
        value: str = "",
        decoding: dict | None = None,
        chat: str = "plain",
    ) -> dict[str, Any]:
        """Dose and response of interventions, and a proposed amount. aim: feature, regex, script or text."""
        chosen, _ = steering.dosed(steering.interventions(self.state, interventions))
        target = steering.sweep_target(self.state, aim, value, chosen[0])
        how = steering.decoding(self.state, {"max_new_tokens": 40} | steering.checked_decoding(decoding))
        texts = self.state.limits.check_texts(prompts, "prompt", self.state.limits.sweep_prompts)
        return steering.swept(self.state, texts, chat, chosen, target, how, lambda *_: None).to_json()

    def analyze(self, analysis: str, stores: list[str], layer: int) -> dict[str, Any]:
        """One analysis of stores the page was started with: overlap, redundancy, subset, drift or clusters."""
        return analysed(self.state, stores, analysis, whole_number(layer, "layer")).data


def written(side: Generation) -> dict[str, Any]:
    """A continuation as plain data."""
    tokens = [
        {
            "token": one.text,
            "probability": one.probability,
            "candidates": [[other.text, other.probability] for other in one.candidates],
        }
        for one in side.tokens
    ]
    return {"text": side.text, "finished": side.finished, "tokens": tokens}


def plain(value: Any) -> Any:
    """The same as JSON knows it: keys are text."""
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


class Passing:
    """Keeps the page from remembering callers of the API, whose calls have no state.

    Gradio makes a session of every call, of which it keeps as many as of browsers; those of the last few calls, which
    may still be under way, stay.
    """

    KEPT = 64

    def __init__(self, page: gr.Blocks) -> None:
        self._page, self._lately, self._lock = page, OrderedDict[str, None](), threading.Lock()

    def note(self) -> None:
        """A call is being answered; what an old one left is dropped."""
        session = getattr(LocalContext.request.get(), "session_hash", None)
        holder, queue = getattr(self._page, "state_holder", None), self._page._queue
        if session is None or holder is None:
            return
        with self._lock:
            self._lately[session] = None
            self._lately.move_to_end(session)
            old = self._lately.popitem(last=False)[0] if len(self._lately) > self.KEPT else None
        if old is None:
            return
        with holder.lock:
            holder.session_data.pop(old, None)
            holder.time_last_used.pop(old, None)
        if not queue.pending_event_ids_session.get(old):  # it has fetched its answer
            queue.pending_event_ids_session.pop(old, None)
            queue.pending_messages_per_session.pop(old, None)


def sentences(endpoint: Callable[..., Any], state: AppState, sessions: Passing) -> Callable[..., Any]:
    """The endpoint, with errors as sentences that a client can read and a browser shows inertly."""

    @functools.wraps(endpoint)
    def answer(*args: Any, **kwargs: Any) -> Any:
        sessions.note()
        try:
            return plain(endpoint(*args, **kwargs))
        except QwenScopeError as error:
            raise gr.Error(escaped(state.discreet(str(error))), print_exception=False) from error
        except Exception as error:  # the operator reads it in the log, with its place
            raise gr.Error(
                "this request could not be answered; the log of the server tells its operator why"
            ) from error

    return answer
