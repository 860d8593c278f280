"""The judge that options and the environment name, and the features that most deserve one."""

from __future__ import annotations

from qwen_scope.store import FeatureStore

from .endpoint import Endpoint
from .judges import ModelJudge
from .label_options import JudgeOptions
from .rule_judge import RuleJudge


def judge_of(store: FeatureStore, options: JudgeOptions) -> ModelJudge | RuleJudge:
    """Who names features of a store: the model of the environment, or where it names none the rules.

    Raises:
        InputError: an address or a number that can't be.
    """
    if options.summary:
        return RuleJudge()
    found = Endpoint.from_environment(
        model=options.judge,
        cache=options.cache or store.folder.with_name(store.folder.name + ".cache"),
        max_requests=options.max_requests,
        max_tokens=options.max_tokens,
        concurrency=options.concurrency,
    )
    return RuleJudge() if found is None else ModelJudge(found)


def most_frequent(store: FeatureStore, layer: int, n: int) -> list[int]:
    """The `n` features of a layer that fire on most tokens, ties by the lower index."""
    rows = store.stats(layer).sort_by([("tokens", "descending"), ("feature", "ascending")]).slice(0, n)
    return rows["feature"].to_pylist()
