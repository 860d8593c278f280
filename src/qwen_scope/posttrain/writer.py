"""The rounds of a synthesis: ask for texts, encode them, keep those in which the target fires."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import numpy as np
from jaxtyping import Bool, Float32, Int64

from qwen_scope.errors import InputError, NotFoundError, QwenScopeError
from qwen_scope.features import Endpoint, pool_texts
from qwen_scope.report import Progress
from qwen_scope.scope import Scope

from .journal import COPIED, DUPLICATE, EMPTY, FAILED, FIRING, KEPT, SILENT, Attempt, Journal
from .options import SynthesisOptions
from .targets import Target
from .writing import Answer, Messages, answers, avoid_prompt, imitate_prompt, write_prompt

PIECE, TAKEN = 20, 0.9
MARKS = re.compile(r"<<|>>(?: ?\d+)?|⏎")
"""What excerpts have beside their text."""


@dataclass(frozen=True, eq=False)
class Made:
    """What a run made.

    Attributes:
        attempts: every answer, round by round.
        counts: per target, in how many documents of seed corpus and kept texts it fires.
        curve: answers so far and targets covered, after each round; the first is the seed corpus alone.
        ended: `covered`, `given up` (every open target has had its tries), or `budget`.
    """

    attempts: list[Attempt]
    counts: Int64[np.ndarray, " targets"]
    curve: list[tuple[int, int]]
    ended: str

    @property
    def kept(self) -> list[Attempt]:
        """The attempts that were kept."""
        return [one for one in self.attempts if one.outcome == KEPT]


def activations(scope: Scope, texts: Sequence[str], targets: Sequence[Target]) -> Float32[np.ndarray, "texts targets"]:
    """The largest activation of each target on each text; what goes beyond the model's context does not count."""
    out = np.zeros((len(texts), len(targets)), np.float32)
    if texts:
        layers = np.array([target.layer for target in targets])
        for layer, pooled in pool_texts(scope, texts, sorted(set(layers.tolist()))).items():
            here = np.flatnonzero(layers == layer)
            out[:, here] = pooled.values("max", [targets[int(i)].feature for i in here])
    return out


def fire(values: Float32[np.ndarray, "texts targets"], targets: Sequence[Target]) -> Bool[np.ndarray, "texts targets"]:
    """Which targets fire on which texts, by their largest activations."""
    return values > np.array([target.threshold for target in targets])


def digest(text: str) -> str:
    """The same for texts that differ in letter case and white space alone."""
    return hashlib.sha256(folded(text).encode("utf-8", "replace")).hexdigest()[:32]


def folded(text: str) -> str:
    """The text without differences in letter case and white space."""
    return " ".join(text.casefold().split())


@final
class Writer:
    """Asks, encodes and keeps, round by round; what it knows is what the journal says.

    Args:
        known: digests of texts that are not to be kept again.
        texts: of the seed corpus, for the control to imitate.
    """

    def __init__(
        self,
        scope: Scope,
        targets: Sequence[Target],
        endpoint: Endpoint,
        out: Path,
        options: SynthesisOptions,
        known: Set[str] = frozenset(),
        texts: Sequence[str] = (),
        progress: Progress | None = None,
    ) -> None:
        self.scope, self.targets, self.endpoint, self.out = scope, list(targets), endpoint, out
        self.options, self.known, self.texts = options, known, texts
        self.progress = progress or (lambda stage, share, text: None)
        self.number = {target.place: i for i, target in enumerate(self.targets)}

    def write(self, counts: Int64[np.ndarray, " targets"]) -> Made:
        """Ask for texts until each target fires in `want` documents, has had its tries, or the budget ends.

        Raises:
            QwenScopeError: nothing at all was answered; what the server says.
        """
        o, tried = self.options, Counter[tuple[int, int]]()
        counts, seen = counts.copy(), set(self.known)
        made = Made([], counts, [(0, int((counts > 0).sum()))], "covered")
        journal = Journal(self.out / "rounds")
        while todo := self._open(counts, tried):
            whole, todo = len(todo), todo[: o.budget - len(made.attempts)]
            if not todo:
                return replace(made, ended="budget")
            prompts = [write_prompt(self.targets[i], tried[self.targets[i].place] + 1, o.shown, o.seed) for i in todo]
            wanted = [(self.targets[i].place, tried[self.targets[i].place] + 1, "") for i in todo]
            done = self._round(journal, len(made.curve) - 1, prompts, wanted, whole, seen)
            for one in done:
                tried[one.place] += 1
                if one.outcome == KEPT:
                    seen.add(digest(one.text))
                    counts[[self.number[layer, feature] for layer, feature, _ in one.fires]] += 1
            made.attempts.extend(done)
            made.curve.append((len(made.attempts), int((counts > 0).sum())))
            self.progress(
                "writing", float(np.minimum(counts, o.want).sum() / (o.want * len(counts))), self._spent(made)
            )
            if len(done) < whole:
                return replace(made, ended="budget")
        return replace(made, ended="covered" if (counts >= o.want).all() else "given up")

    def _open(self, counts: Int64[np.ndarray, " targets"], tried: Counter[tuple[int, int]]) -> list[int]:
        """The targets of the next round, the weakest first."""
        o = self.options
        found = [i for i, t in enumerate(self.targets) if counts[i] < o.want and tried[t.place] < o.tries]
        return sorted(found, key=lambda i: (counts[i], tried[self.targets[i].place], self.targets[i].place))[: o.batch]

    def imitate(self, counts: Int64[np.ndarray, " targets"], n: int) -> Made:
        """The control: `n` answers for which no feature is named and nothing is checked but that a text is new.

        Raises:
            InputError: no text of the seed corpus is known.
        """
        if not self.texts:
            raise InputError("texts without a target imitate the seed corpus, and none of it is known")
        counts, seen = counts.copy(), set(self.known)
        made = Made([], counts, [(0, int((counts > 0).sum()))], "budget")
        journal = Journal(self.out / "untargeted")
        while (at := len(made.attempts)) < n:
            numbers = range(at + 1, min(n, at + self.options.batch) + 1)
            prompts = [imitate_prompt(self.texts, i, self.options.shown, self.options.seed) for i in numbers]
            wanted = [((-1, -1), i, "") for i in numbers]
            done = self._round(journal, len(made.curve) - 1, prompts, wanted, self.options.batch, seen)
            for one in done:
                if one.outcome == KEPT:
                    seen.add(digest(one.text))
                    counts[[self.number[layer, feature] for layer, feature, _ in one.fires]] += 1
            made.attempts.extend(done)
            made.curve.append((len(made.attempts), int((counts > 0).sum())))
            self.progress("untargeted", len(made.attempts) / n, self._spent(made))
            if len(done) < len(numbers):
                break
        return made

    def contrast(self, made: Made) -> list[Attempt]:
        """Ask for each kept text without its feature, within what is left of the budget; every attempt.

        Raises:
            QwenScopeError: as `write`.
        """
        o, out, number = self.options, list[Attempt](), 0
        journal = Journal(self.out / "pairs")
        waiting = dict(enumerate(made.kept))
        tried = Counter[int]()
        while waiting and (left := o.budget - len(made.attempts) - len(out)) > 0:
            todo = sorted(waiting, key=lambda i: (tried[i], i))[: o.batch]
            whole, todo = len(todo), todo[:left]
            prompts, wanted = [], []
            for i in todo:
                target = self.targets[self.number[waiting[i].place]]
                prompts.append(avoid_prompt(target, waiting[i].text, tried[i] + 1, o.shown, o.seed))
                wanted.append((target.place, tried[i] + 1, waiting[i].text))
            done = self._round(journal, number, prompts, wanted, whole, {digest(waiting[i].text) for i in todo})
            number += 1
            for i, one in zip(todo, done, strict=False):
                tried[i] += 1
                if one.outcome == KEPT or tried[i] >= o.tries:
                    del waiting[i]
            out += done
            self.progress("pairs", 1 - len(waiting) / max(1, len(made.kept)), f"{len(out)} answers")
            if len(done) < whole:
                break
        return out

    def _round(
        self,
        journal: Journal,
        number: int,
        prompts: Sequence[Messages],
        wanted: Sequence[tuple[tuple[int, int], int, str]],
        whole: int,
        seen: set[str],
    ) -> list[Attempt]:
        """The attempts of one round, from the journal or from the endpoint; those the budget cut off are missing.

        A round is sealed only when it is whole, so that a run with a larger budget goes on as if nothing had stopped.
        """
        # One with too few lines was torn after it was written: it is asked again, mostly from the cache.
        if number < len(journal.rounds) and len(journal.rounds[number]) >= len(wanted):
            done = journal.rounds[number][: len(wanted)]
            asked = [(place, attempt) for place, attempt, _ in wanted[: len(done)]]
            if [(one.place, one.attempt) for one in done] != asked:
                raise InputError(f"{journal.folder} belongs to another run; name another folder to begin anew")
            return done
        found = answers(
            self.endpoint,
            prompts,
            temperature=self.options.temperature,
            max_tokens=self.options.max_answer_tokens,
        )
        check_server(found, nothing_yet=not number)
        done = self._judged(found, prompts, wanted, seen)
        if len(done) == whole:
            journal.seal(number, done)
        return done

    def _judged(
        self,
        found: Sequence[Answer],
        prompts: Sequence[Messages],
        wanted: Sequence[tuple[tuple[int, int], int, str]],
        seen: set[str],
    ) -> list[Attempt]:
        """Answers up to the first that the budget cut off, each with its outcome."""
        cut = next((i for i, answer in enumerate(found) if answer is None), len(found))
        texts = [clean(answer) if isinstance(answer, str) else "" for answer in found[:cut]]
        usable = [i for i, text in enumerate(texts) if text]
        values = dict(zip(usable, activations(self.scope, [texts[i] for i in usable], self.targets), strict=True))
        out, new = [], set(seen)
        for i in range(cut):
            (place, attempt, of), answer = wanted[i], found[i]
            bare = Attempt(*place, attempt, EMPTY, texts[i], of=of)
            if isinstance(answer, QwenScopeError):
                out.append(replace(bare, outcome=FAILED, problem=str(answer)[:300]))
            elif i not in values:
                out.append(bare)
            elif not of and copied(texts[i], prompts[i]):  # a rewritten text is meant to be much like the one shown
                out.append(replace(bare, outcome=COPIED))
            else:
                out.append(self._kept(bare, values[i], new))
                new |= {digest(texts[i])} if out[-1].outcome == KEPT else set()
        return out

    def _kept(self, bare: Attempt, values: Float32[np.ndarray, " targets"], seen: set[str]) -> Attempt:
        """An attempt with its outcome, by what the targets do in its text."""
        on, fires = self.number.get(bare.place), fire(values[None], self.targets)[0]
        outcome = KEPT
        if digest(bare.text) in seen:
            outcome = DUPLICATE
        elif bare.of and on is not None and fires[on]:
            outcome = FIRING
        elif on is not None and not bare.of and not fires[on]:
            outcome = SILENT
        known = np.flatnonzero(fires) if outcome == KEPT and not bare.of else np.zeros(0, np.int64)
        some = tuple((*self.targets[int(i)].place, float(values[i])) for i in known)
        return replace(bare, outcome=outcome, activation=0.0 if on is None else float(values[on]), fires=some)

    def _spent(self, made: Made) -> str:
        covered = made.curve[-1][1]
        return f"{covered} of {len(self.targets)} targets, {len(made.attempts)} answers, {len(made.kept)} kept"


def copied(text: str, question: Messages) -> bool:
    """Whether an answer is taken from its question: of its pieces of `PIECE` letters nearly all stand there.

    Letter case, white space and the marks of excerpts don't count. Small models answer with an excerpt, marks and all;
    the target fires in it, and it is nothing new.
    """
    whole = "\n".join(message["content"] for message in question)
    own, shown = (folded(MARKS.sub("", one)) for one in (text, whole))
    pieces = [own[i : i + PIECE] for i in range(max(1, len(own) - PIECE + 1))]
    return sum(piece in shown for piece in pieces) >= TAKEN * len(pieces)


def clean(answer: str) -> str:
    """The text of an answer; empty where it holds none that can be encoded."""
    try:
        answer.encode()
    except UnicodeEncodeError:
        return ""
    return answer.strip()


def check_server(found: Sequence[Answer], nothing_yet: bool) -> None:
    """Stop where the server has gone, or refuses everything from the start; single failures are only recorded.

    Raises:
        QwenScopeError: the first failure.
    """
    failed = [one for one in found if isinstance(one, NotFoundError | InputError)]
    if not failed or len(failed) < len(found):
        return
    # One request may be refused for what it says; a whole round of them is the key, the name of the model or the like.
    if nothing_yet or len(failed) > 1 or isinstance(failed[0], NotFoundError):
        raise type(failed[0])(f"{failed[0]}; what was answered before is kept: the same command goes on")
