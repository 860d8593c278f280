"""A judge without a model: it says in words what the tokens that a feature fires on share, or that it can't."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from heapq import nlargest
from operator import itemgetter
from typing import final

import numpy as np

from qwen_scope.store import Context

from .judges import TokenJudge
from .material import Material
from .wording import AFTER, KINDS, NEXT, TYPICAL, UNCLEAR, fits, in_language, language_of, tokens_in_words

LISTED = 8
"""Tokens that a label lists at most."""
ENOUGH = 0.8
"""What a wording has to tell more than guessing, of the 2 that both scores have above chance."""
PER_TOKEN, PER_LANGUAGE, BESIDE = 0.01, 0.03, 0.3
"""What a wording loses for each token that it lists, for a language beside a kind, so that simple ones win, and for
fitting the other tokens of the feature's own contexts."""

Mask = list[np.ndarray]
"""By context, of every token whether it is what a wording says."""


@final
class RuleJudge:
    """Names from a fixed list of wordings, and tests by the same words: no model, the same answer every time."""

    source, scorer, concurrency = "summary", "rules", 1

    def name(self, given: Material) -> str:
        """The wording that best tells where the feature fires from where it does not, with the tokens it makes likely.

        Where none tells it, the name says so and lists typical tokens, which are tested like any wording.
        """
        words = best_wording(given.examples, given.contrast) or unclear(given.examples)
        return words + (NEXT + tokens_in_words(given.promotes) if given.promotes else "")

    def explain(self, examples: Sequence[Context]) -> str:
        """The same from contexts where it fires alone."""
        return best_wording(examples, ()) or unclear(examples)

    @staticmethod
    def is_unclear(label: str) -> bool:
        """Whether a name says that no wording tells the feature."""
        return label.startswith(UNCLEAR)

    def detect(self, label: str, texts: Sequence[Context]) -> list[bool | None]:
        """Whether a text has a token that is what the label says."""
        return [any(fits(label, context.tokens)) for context in texts]

    def fuzz(self, label: str, marked: Sequence[tuple[Context, frozenset[int]]]) -> list[bool | None]:
        """Whether one of the marked tokens is what the label says."""
        found = []
        for context, places in marked:
            here = fits(label, context.tokens)
            found.append(any(here[i] for i in places))
        return found


def unclear(examples: Sequence[Context]) -> str:
    """What is said of a feature that no wording tells: that, and its typical tokens."""
    return UNCLEAR + TokenJudge().explain(examples).removeprefix(TYPICAL)


def best_wording(examples: Sequence[Context], contrast: Sequence[Context]) -> str:
    """The wording that fits most contexts of a feature and its firing tokens, and fewest others.

    "" where none fits clearly better than guessing.
    """
    ranked = sorted(_Weighed(examples, contrast).wordings(), key=lambda one: -one[1])
    return ranked[0][0] if ranked and ranked[0][1] >= ENOUGH else ""


class _Weighed:
    """The contexts of a feature, and how well wordings tell them from others.

    Lists of tokens are made for a feature, so what they tell is measured on contexts that they were not made from.
    """

    def __init__(self, examples: Sequence[Context], contrast: Sequence[Context]) -> None:
        self.n, self.contexts = len(examples), [*examples, *contrast]
        self.fires = [np.array(context.values) > 0 for context in examples]
        self.count = float(np.mean([one.sum() for one in self.fires])) if examples else 0.0
        self.languages = [language_of("".join(context.tokens)) for context in self.contexts]

    def wordings(self) -> Iterator[tuple[str, float]]:
        """Every wording that is tried, and what it tells."""
        everything = [np.ones(len(context.tokens), bool) for context in self.contexts]
        kinds = {name: [np.array(test(context.tokens), bool) for context in self.contexts]
                 for name, test in KINDS.items()}  # fmt: skip
        told = {name: self.tells(mask) for name, mask in kinds.items()}
        yield from told.items()
        for behind in (False, True):
            words = [_before(context.tokens) if behind else list(context.tokens) for context in self.contexts]
            if kept := self._list(words, range(self.n)):
                name = (AFTER if behind else "") + tokens_in_words(kept)
                kinds[name], told[name] = self._among(words, kept), self._unseen(words) - PER_TOKEN * len(kept)
                yield name, told[name]
        spoken = Counter(language for language in self.languages[: self.n] if language)
        for language in (language for language, times in spoken.items() if 2 * times >= self.n):
            there = [
                np.full(len(one), language == other) for one, other in zip(everything, self.languages, strict=True)
            ]
            yield in_language("", language), self.tells(there)
            for name, mask in kinds.items():
                both = [one & where for one, where in zip(mask, there, strict=True)]
                # a list tells no more of unseen contexts for being read in one language
                more = self.tells(both) - self.tells(mask)
                yield in_language(name, language), told[name] + more - PER_LANGUAGE

    def tells(self, mask: Mask, among: Sequence[int] | None = None) -> float:
        """By how much more often it fits contexts of the feature, and its firing tokens, than others."""
        chosen = range(self.n) if among is None else among
        pairs, others = [(mask[i], self.fires[i]) for i in chosen], mask[self.n :]
        found = float(np.mean([one.any() for one, _ in pairs]))
        marked = float(np.mean([one[fire].any() for one, fire in pairs]))
        beside = [one[~fire] for one, fire in pairs]
        others = others or beside  # other tokens of the same contexts stand in for other texts
        wrong = float(np.mean([one.any() for one in others]))
        guessed = float(np.mean([1 - (1 - one.mean()) ** self.count if len(one) else 0.0 for one in others]))
        silent = np.concatenate(beside)
        return found - wrong + marked - guessed - BESIDE * (float(silent.mean()) if len(silent) else 0.0)

    def _unseen(self, words: Sequence[Sequence[str]]) -> float:
        """What lists made from one half of the contexts tell of the other half, the mean of both ways."""
        halves = [range(0, self.n, 2), range(1, self.n, 2)]
        if not all(halves):
            return 0.0
        pairs = ((halves[0], halves[1]), (halves[1], halves[0]))
        return float(np.mean([self.tells(self._among(words, self._list(words, one)), other) for one, other in pairs]))

    def _list(self, words: Sequence[Sequence[str]], chosen: Sequence[int]) -> list[str]:
        """The few tokens (or those before) that best tell the feature in some contexts, as long as each helps."""
        firing: defaultdict[str, float] = defaultdict(float)
        for i in chosen:
            for word, value in zip(words[i], self.contexts[i].values, strict=True):
                firing[word] += value * bool(value > 0 and word.strip())
        kept: list[str] = []
        best = 0.0
        for word, weight in nlargest(3 * LISTED, firing.items(), key=itemgetter(1)):
            if len(kept) == LISTED or not weight:
                break
            told = self.tells(self._among(words, [*kept, word]), chosen) - PER_TOKEN * (len(kept) + 1)
            if told > best:
                best = told
                kept.append(word)
        return kept

    @staticmethod
    def _among(words: Sequence[Sequence[str]], kept: Sequence[str]) -> Mask:
        known = frozenset(kept)
        return [np.array([word in known for word in one], bool) for one in words]


def _before(tokens: Sequence[str]) -> list[str]:
    return ["", *tokens[:-1]]
