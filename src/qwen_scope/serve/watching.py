"""`Watching`: the rules of the requests of a worker, evaluated between the forward pass of a step and its sampling.

A token's rule is decided once, when the token is computed first: what a preemption computes again was decided before.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwen_scope.model import HookPoint
from qwen_scope.sae import feature_name
from qwen_scope.steer import SAEsByLayer, activations
from qwen_scope.text import PHASES

from .bounds import readable
from .protocol import Ask
from .rows import Phases, Step, places
from .watch import Watch

MOST_REQUESTS = 2**13
"""Of requests whose progress is remembered. Model runner V2 tells of a preemption and of an end in the same way; those
that are computed now were all used a step ago, and the preempted ones shortly before."""

MOST_SERIES = 1000
"""Of different watches, recipes and phases that are counted apart; names come from clients."""

MOST_ALARMS = 4096
"""Of answers whose alarms wait to be fetched; the oldest go first."""

OTHER = "other"


@dataclass(eq=False)
class Progress:
    """How far the watches of one request are.

    Attributes:
        next: the first position that was not asked yet.
        fired: per watch at how many tokens its rule held.
        alarms: per watch the position of its alarm.
    """

    next: int = 0
    fired: dict[str, int] = field(default_factory=dict)
    alarms: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Look:
    """The tokens of one request that are asked in this step.

    Attributes:
        row: of the request in the step.
        rows: of its tokens in the step.
        chosen: per watch which of them are asked.
        phases: of each a label.
    """

    row: int
    name: str
    ask: Ask
    progress: Progress
    prompt: int
    rows: np.ndarray
    positions: np.ndarray
    chosen: list[np.ndarray]
    phases: list[str]


@dataclass(frozen=True, eq=False)
class _Read:
    """What was asked of one layer: activations `(rows, features)` of the rows and features of the step, in order."""

    layer: int
    rows: np.ndarray
    features: np.ndarray
    values: np.ndarray
    h: Tensor

    def values_of(self, rows: np.ndarray, feature: int) -> np.ndarray:
        """Of one feature at some of the rows."""
        return self.values[np.searchsorted(self.rows, rows), np.searchsorted(self.features, feature)]

    def sinks(self, rows: np.ndarray, watch: Watch) -> np.ndarray:
        """Which of the rows do not count for a watch because they are too long."""
        if not watch.counted.norms:
            return np.zeros(len(rows), bool)
        h = self.h[torch.from_numpy(np.searchsorted(self.rows, rows)).to(self.h.device)]
        return watch.counted.sinks(h, HookPoint(self.layer)).cpu().numpy()


class Watching:
    """What a worker does for watches; `WorkerState` calls `plan`, `decide`, `stops` and `take`."""

    def __init__(self, saes: SAEsByLayer) -> None:
        self._saes = saes
        self._looks: list[_Look] = []
        self._stops: list[tuple[int, int]] = []
        self._progress: OrderedDict[str, Progress] = OrderedDict()
        self._kept: OrderedDict[str, dict[str, list[dict[str, Any]]] | None] = OrderedDict()  # None: nobody fetches it
        self._tokens: dict[tuple[str, str, str], list[int]] = {}
        self._alarms: dict[tuple[str, str, str, str], int] = {}

    def progress(self, name: str) -> Progress:
        """Of a request, by its name; it outlives preemptions."""
        found = self._progress.setdefault(name, Progress())
        self._progress.move_to_end(name)
        while len(self._progress) > MOST_REQUESTS:
            self._progress.popitem(last=False)
        return found

    def plan(
        self, step: Step, i: int, ask: Ask, name: str, phases: Phases | None, ids: Callable[[int, int], Sequence[int]]
    ) -> None:
        """Before the forward pass: which tokens of request i its watches ask.

        Args:
            phases: of its tokens, where they are known.
            ids: the ids of its tokens between two positions.
        """
        progress, prompt, positions = self.progress(name), int(step.prompts[i]), step.positions(i)
        new = positions >= progress.next
        if _stopped(ask, progress):
            self._stops.append((i, ask.end))
            new &= positions < prompt  # scheduled before the answer's end was known
        if not new.any():
            return
        positions, rows = positions[new], np.flatnonzero(new) + int(step.starts[i])
        progress.next = int(positions[-1]) + 1
        first, end = int(positions[0]), progress.next
        kinds = None if phases is None else phases(first, end)
        chosen = []
        for watch in ask.watch:
            on = places(watch.where, positions, prompt, kinds)
            if on.any() and (watch.counted.first or watch.counted.special or watch.counted.phases is not None):
                known = torch.tensor(list(ids(first, end)) if watch.counted.special else [0] * len(positions))
                told = None if kinds is None else torch.from_numpy(kinds.astype(np.int64))
                on &= watch.counted.at(known, torch.from_numpy(positions), told).numpy()
            chosen.append(on)
        if any(on.any() for on in chosen):
            halves = ["prompt" if position < prompt else "generated" for position in positions.tolist()]
            labels = halves if kinds is None else [f"{h}:{PHASES[k]}" for h, k in zip(halves, kinds, strict=True)]
            self._looks.append(_Look(i, name, ask, progress, prompt, rows, positions, chosen, labels))

    def decide(self, taps: Mapping[int, Tensor]) -> None:
        """After the forward pass: what holds is counted, kept, and acted upon."""
        looks, self._looks = self._looks, []
        found = self._read(looks, taps)
        for look in looks:
            for watch, on in zip(look.ask.watch, look.chosen, strict=True):
                if on.any():
                    self._one(look, watch, on, found)
            if _stopped(look.ask, look.progress) and (look.row, look.ask.end) not in self._stops:
                self._stops.append((look.row, look.ask.end))

    def stops(self) -> list[tuple[int, int]]:
        """Requests of this step that end now, by their place in it, with the token that ends them; told once."""
        stops, self._stops = self._stops, []
        return stops

    def take(self, ticket: str) -> dict[str, list[dict[str, Any]]]:
        """Alarms under a ticket, by request; handed out once."""
        return self._kept.pop(ticket, None) or {}

    def drop(self, ticket: str) -> None:
        """Nobody will fetch its alarms, whatever is still raised."""
        self._kept[ticket] = None
        self._bound()

    def forget(self, name: str) -> None:
        """The request has ended."""
        self._progress.pop(name, None)

    def counted(self) -> dict[str, list[list[Any]]]:
        """All that was counted: `[watch, recipe, phase, tokens, firings]`, `[watch, recipe, phase, then, alarms]`."""
        return {
            "tokens": [[*key, *numbers] for key, numbers in self._tokens.items()],
            "alarms": [[*key, number] for key, number in self._alarms.items()],
        }

    def _read(self, looks: Sequence[_Look], taps: Mapping[int, Tensor]) -> dict[int, _Read]:
        """By layer the activations of what is asked, each layer at once."""
        asked: dict[int, tuple[set[int], set[int]]] = {}
        for look in looks:
            for watch, on in zip(look.ask.watch, look.chosen, strict=True):
                for layer, feature, _ in watch.features if on.any() else ():
                    rows, features = asked.setdefault(layer, (set(), set()))
                    rows.update(look.rows[on].tolist())
                    features.add(feature)
        found = {}
        for layer, (rows, features) in asked.items():
            at, wanted, buffer = np.array(sorted(rows)), sorted(features), taps[layer]
            h = buffer[torch.from_numpy(at).to(buffer.device)]
            fine = readable(h.float())
            values = activations(self._saes[layer], torch.where(fine[:, None], h.float(), 0), wanted)
            values = values.float() * fine[:, None].to(values.device)
            found[layer] = _Read(layer, at, np.array(wanted), values.cpu().numpy(), h)
        return found

    def _one(self, look: _Look, watch: Watch, on: np.ndarray, found: Mapping[int, _Read]) -> None:
        """Decide one watch of one request."""
        places, rows = np.flatnonzero(on), look.rows[on]
        values = {(layer, f): found[layer].values_of(rows, f) for layer, f, _ in watch.features}
        out = {layer: found[layer].sinks(rows, watch) for layer in watch.layers}
        above = np.stack([(values[layer, f] > least) & ~out[layer] for layer, f, least in watch.features])
        holds = above.any(0)
        named = watch.name, look.ask.label
        labels = np.array([look.phases[p] for p in places])
        for phase in np.unique(labels).tolist():
            numbers = self._tokens.setdefault(self._series(self._tokens, (*named, phase)), [0, 0])
            numbers[0] += int((labels == phase).sum())
            numbers[1] += int((holds & (labels == phase)).sum())
        before = look.progress.fired.get(watch.name, 0)
        look.progress.fired[watch.name] = before + int(holds.sum())
        if watch.name in look.progress.alarms or before + holds.sum() < watch.times:
            return
        j = int(np.flatnonzero(holds)[watch.times - before - 1])
        position = int(look.positions[places[j]])
        look.progress.alarms[watch.name] = position
        key = self._series(self._alarms, (*named, str(labels[j]), watch.then))
        self._alarms[key] = self._alarms.get(key, 0) + 1
        because = {
            feature_name(layer, f): float(values[layer, f][j])
            for (layer, f, _), yes in zip(watch.features, above[:, j], strict=True)
            if yes
        }
        self._keep(look, watch, position, because)

    def _keep(self, look: _Look, watch: Watch, position: int, because: dict[str, float]) -> None:
        if watch.then == "count" or not look.ask.ticket:
            return
        alarm = {"watch": watch.name, "position": position, "then": watch.then, "because": because}
        kept = self._kept.setdefault(look.ask.ticket, {})
        if kept is not None:
            kept.setdefault(look.name, []).append(alarm)
            self._bound()

    def _bound(self) -> None:
        while len(self._kept) > MOST_ALARMS:
            self._kept.popitem(last=False)

    def _series(self, kept: Mapping[Any, Any], key: tuple[str, ...]) -> Any:
        return key if key in kept or len(kept) < MOST_SERIES else (OTHER, OTHER, *key[2:])


def switches(ask: Ask, progress: Progress, prompt: int) -> dict[str, int]:
    """Which watches have switched their recipe on, with the first token it acts on.

    That is the token after the alarm; after an alarm in the prompt the first generated one, as tokens of a prompt are
    computed together.
    """
    return {
        watch.name: max(progress.alarms[watch.name] + 1, prompt)
        for watch in ask.watch
        if watch.then == "switch" and watch.name in progress.alarms
    }


def _stopped(ask: Ask, progress: Progress) -> bool:
    return any(watch.then == "stop" and watch.name in progress.alarms for watch in ask.watch)
