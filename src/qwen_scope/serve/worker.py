"""`WorkerState`: what one worker of vLLM knows: tables, the rows of the step, what to set, what was read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from qwen_scope.steer import Change, Intervention, changed

from .admit import ServedSAEs
from .blocks import change_block, find_blocks, register_setter
from .bounds import readable
from .compiled import Compiled
from .kinds import Kinds, TokensOf
from .protocol import Ask, fingerprint
from .readout import Pending, Readouts
from .rows import Pattern, Phases, Step, spread, step_codes
from .settings import ServeSettings
from .tables import Tables
from .watching import Watching, switches

STATE = "qwen_scope"
"""The attribute of a served model that holds its state."""

SPARE = 64
"""Rows of buffers beyond the tokens of a step, for what graphs pad."""

Listener = Callable[[Step, Sequence[str], Mapping[int, Tensor]], None]
"""Is told of every step that has run: how it lay, its requests' names, and the stream at each tapped layer."""


@dataclass(eq=False)
class Wanted:
    """One request of this worker.

    Attributes:
        ask: what was admitted.
        compiled: its interventions, None where it has none.
        kinds: the phases of its tokens, where they have to be known.
        switched: which of its watches have switched a recipe on, with the first token it acts on.
    """

    ask: Ask
    compiled: Compiled | None
    kinds: Kinds | None
    switched: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Shape:
    """Sizes of a worker.

    Attributes:
        blocks: of the model.
        width: of the residual.
        requests: the most in a step.
        tokens: the most in a step.
    """

    blocks: int
    width: int
    requests: int
    tokens: int


@dataclass(eq=False)
class _Setting:
    """What one recipe sets at one layer in this step: rows of the step, and which of them each change touches."""

    changes: list[Change]
    rows: Tensor
    chosen: list[Tensor]


@dataclass(eq=False)
class Counts:
    """How often things happened, for status and tests.

    Attributes:
        steps: that were prepared.
        steered: of them with an intervention.
        skipped: rows that were too large to be read, or would have become so, where features were to be set.
    """

    steps: int = 0
    steered: int = 0
    skipped: int = 0


@dataclass(eq=False)
class WorkerState:
    """The plugin's state in one worker; the seams call `begin`, `end`, `take` and nothing else.

    Attributes:
        tokenizer: gives the tokenizer; asked for only where phases have to be followed.
    """

    settings: ServeSettings
    shape: Shape
    dtype: torch.dtype
    device: torch.device
    tokenizer: Callable[[], PreTrainedTokenizerBase]
    counts: Counts = field(default_factory=Counts)

    def __post_init__(self) -> None:
        self.saes = ServedSAEs(self.settings, self.shape.width, self.device)
        buffered = self.shape.tokens + SPARE
        self.rows = torch.zeros(buffered, dtype=torch.int64, device=self.device)
        capacity = self.settings.capacity(self.shape.requests)
        self.tables = Tables(self.settings.adding, capacity, self.shape.width, self.device, self.dtype)
        self.taps = {
            layer: torch.zeros(buffered, self.shape.width, dtype=self.dtype, device=self.device)
            for layer in self.settings.tapped
        }
        for layer in {*self.settings.feature_layers, *self.settings.read_layers}:
            for name in ("W_enc", "W_dec"):
                self.saes[layer].check_finite(name)
        self.readouts = Readouts()
        self.watching = Watching(self.saes)
        self.number = register_setter(self)
        self._compiled: dict[str, tuple[Compiled, int]] = {}  # by key, with the number of requests that have it
        self._dirty = 0
        self._settings_now: dict[int, list[_Setting]] = {}
        self._pending: list[Pending] = []
        self.listener: Listener | None = None
        self._step: tuple[Step, Sequence[str]] | None = None

    def install(self, model: nn.Module) -> None:
        """Change the blocks of a model that was just built.

        Raises:
            NotFoundError: its blocks are not found.
        """
        classes: dict[type, type] = {}
        for layer, block in enumerate(find_blocks(model, self.shape.blocks)):
            if layer not in self.settings.touched or type(block).__name__ == "PPMissingLayer":
                continue
            change_block(
                block,
                classes,
                layer=layer,
                setter=self.number if layer in self.settings.feature_layers else None,
                table=self.tables.by_layer.get(layer),
                rows=self.rows,
                into=self.taps.get(layer),
            )

    def wanted(self, text: str | None) -> Wanted | None:
        """What an admitted request wants, from its text in `extra_args`; None for a request without one."""
        if text is None:
            return None
        ask = Ask.from_text(text)
        compiled = self._prepared(ask.interventions) if ask.interventions else None
        kinds = None if ask.phases is None else Kinds(ask.phases, self.tokenizer())
        return Wanted(ask, compiled, kinds)

    def _prepared(self, interventions: Sequence[Intervention]) -> Compiled:
        key = fingerprint(interventions)
        known = self._compiled.get(key)
        compiled = known[0] if known else Compiled.of(interventions, self.saes, self.device, self.dtype)
        self._compiled[key] = compiled, (known[1] if known else 0) + 1
        return compiled

    def _switch(self, one: Wanted, name: str, prompt: int) -> None:
        """Let a request's recipe be what its watches have made of it."""
        now = switches(one.ask, self.watching.progress(name), prompt)
        if now == one.switched:
            return
        later = [i for watch in one.ask.watch if watch.name in now for i in watch.switched(now[watch.name])]
        self.forget(one)
        one.compiled, one.switched = self._prepared((*one.ask.interventions, *later)), now

    def forget(self, wanted: Wanted | None) -> None:
        """The request has gone."""
        if wanted is None or wanted.compiled is None:
            return
        compiled, users = self._compiled[wanted.compiled.key]
        if users == 1:
            del self._compiled[compiled.key]
        else:
            self._compiled[compiled.key] = compiled, users - 1

    def begin(
        self,
        step: Step,
        wanted: Sequence[Wanted | None],
        ids: Sequence[str],
        tokens: Callable[[int, int, int], Sequence[int]],
    ) -> None:
        """Before the forward pass of a step.

        Args:
            wanted: by request, in the order of the step.
            ids: the requests' names, under which their activations are kept.
            tokens: gives the ids of a request's tokens between two positions.
        """
        self.end()
        self._step = step, ids
        self.counts.steps += 1
        self._settings_now = {}
        if not any(wanted):
            self._write_rows(np.zeros(0, np.int64))
            return
        for i, one in enumerate(wanted):
            if one is not None and one.ask.watch:
                self._switch(one, ids[i], int(step.prompts[i]))
        compiled = [None if one is None else one.compiled for one in wanted]
        self.counts.steered += any(compiled)
        busy = {one.key for one in compiled if one is not None}
        phases = [self._phases(one, i, tokens) for i, one in enumerate(wanted)]
        codes = step_codes(step, [None if one is None else one.adds for one in compiled], phases)
        rows = [0 if c is None else self._rows_of(c, code, busy) for c, code in zip(compiled, codes, strict=True)]
        self._write_rows(spread(step, rows))
        for key in busy:
            self._set_rows(
                step, [i for i, one in enumerate(compiled) if one is not None and one.key == key], compiled, phases
            )
        for i, one in enumerate(wanted):
            if one is not None and one.ask.read is not None:
                self._read_rows(step, i, one.ask, ids[i], phases[i])
            if one is not None and one.ask.watch:
                self.watching.plan(step, i, one.ask, ids[i], phases[i], functools.partial(tokens, i))

    def judged(self, logits: Tensor | None) -> Tensor | None:
        """Between the forward pass and sampling: decide the watches; a request that is stopped can only end.

        Args:
            logits: one row for each request of the step, in its order; None on a worker that does not sample.
        """
        self.watching.decide(self.taps)
        for row, end in self.watching.stops():
            if logits is not None:
                logits[row] = -torch.inf
                logits[row, end] = 0.0
        return logits

    def end(self) -> None:
        """After the forward pass: encode what it left in the taps. Safe to call twice."""
        told, self._step = self._step, None
        if self.listener is not None and told is not None:
            self.listener(*told, self.taps)
        self.watching.decide(self.taps)
        self.watching.stops()
        pending, self._pending = self._pending, []
        if pending:
            self.readouts.keep(pending, {layer: self.taps[layer] for layer in self.settings.read_layers}, self.saes)

    def take(self, ticket: str) -> dict[str, Any]:
        """What was read under a ticket, as plain values; it is handed out once."""
        self.end()
        return self.readouts.take(ticket)

    def drop(self, ticket: str) -> None:
        """Nobody will fetch what is read, or raised, under a ticket; the request may still be running."""
        self.end()
        self.readouts.drop(ticket)
        self.watching.drop(ticket)

    def set_features(self, hidden: Tensor, residual: Tensor, layer: int) -> Tensor:
        """The residual after this step's changes at a layer; rows that nothing changes keep their bits."""
        new = residual.clone()
        for setting in self._settings_now.get(layer, ()):
            now, rest = hidden[setting.rows], residual[setting.rows]
            h = now + rest
            chosen = setting.chosen
            fine = readable(h)
            if not bool(fine.all()):  # an SAE refuses them, which would end the worker
                chosen = [mask & fine for mask in chosen]
            after = changed(h, setting.changes, chosen)
            if after is not h:
                fine &= readable(after)
                moved = ((after != h).any(-1) & fine)[:, None]
                new[setting.rows] = torch.where(moved, after - now, rest)
            self.counts.skipped += int((~fine).sum())
        return new

    def status(self) -> dict[str, Any]:
        """What this worker holds, as plain values."""
        return {
            "layers": list(self.settings.adding),
            "feature_layers": list(self.settings.feature_layers),
            "read_layers": list(self.settings.read_layers),
            "table_bytes": self.tables.nbytes,
            "sae_bytes": self.saes.nbytes,
            "rows": self.tables.capacity,
            "rows_free": self.tables.free,
            "recipes": len(self._compiled),
            "held": self.readouts.held,
            "steps": self.counts.steps,
            "steered": self.counts.steered,
            "skipped": self.counts.skipped,
            "watched": self.watching.counted(),
        }

    def _phases(self, one: Wanted | None, i: int, tokens: Callable[[int, int, int], Sequence[int]]) -> Phases | None:
        if one is None or one.kinds is None:
            return None
        kinds: Kinds = one.kinds
        mine: TokensOf = lambda first, end: tokens(i, first, end)  # noqa: E731
        return lambda first, end: kinds.between(first, end, mine)

    def _rows_of(self, compiled: Compiled, code: np.ndarray | int, busy: set[str]) -> np.ndarray | int:
        if not isinstance(code, np.ndarray):
            return self.tables.row(compiled, code, busy)
        kinds, where = np.unique(code, return_inverse=True)
        return np.array([self.tables.row(compiled, int(kind), busy) for kind in kinds])[where]

    def _write_rows(self, rows: np.ndarray) -> None:
        """The row of every token of the step; what the last step wrote beyond them goes back to 0."""
        end = max(len(rows), self._dirty)
        if not end:
            return
        padded = np.zeros(end, np.int64)
        padded[: len(rows)] = rows
        # a copy from ordinary memory: the next step may be prepared while this one has not run
        self.rows[:end].copy_(torch.from_numpy(padded))
        self._dirty = len(rows)

    def _set_rows(
        self,
        step: Step,
        mine: Sequence[int],
        compiled: Sequence[Compiled | None],
        phases: Sequence[Phases | None],
    ) -> None:
        """What the requests of one recipe set in this step, at each of its layers at once."""
        first = compiled[mine[0]]
        assert first is not None
        for layer, (changes, pattern) in first.sets.items():
            rows, codes = [], []
            for i in mine:
                found = self._codes(step, i, pattern, phases[i])
                on = np.flatnonzero(found)
                rows.append(on + int(step.starts[i]))
                codes.append(found[on])
            index, bits = np.concatenate(rows), np.concatenate(codes)
            if not len(index):
                continue
            chosen = [
                torch.from_numpy((bits >> pattern.wheres.index(change.where) & 1).astype(bool)).to(self.device)
                for change in changes
            ]
            setting = _Setting(changes, torch.from_numpy(index).to(self.device), chosen)
            self._settings_now.setdefault(layer, []).append(setting)

    def _codes(self, step: Step, i: int, pattern: Pattern, phases: Phases | None) -> np.ndarray:
        positions = step.positions(i)
        known = phases(int(positions[0]), int(positions[-1]) + 1) if pattern.by_phase and phases is not None else None
        return pattern.codes(positions, int(step.prompts[i]), known)

    def _read_rows(self, step: Step, i: int, ask: Ask, name: str, phases: Phases | None) -> None:
        assert ask.read is not None
        on = np.flatnonzero(self._codes(step, i, Pattern.of([ask.read.where]), phases))
        if len(on):
            rows, positions = on + int(step.starts[i]), step.positions(i)[on]
            self._pending.append(Pending(ask.ticket or name, name, ask.read, rows, positions))


def state_of(model: Any) -> WorkerState | None:
    """The state of a served model, None where the plugin has nothing to do."""
    return getattr(model, STATE, None)
