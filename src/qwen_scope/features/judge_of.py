"""The judge that options and the environment name, and the features that most deserve one."""

from __future__ import annotations

from pathlib import Path

from qwen_scope.files import Remote
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
        cache=options.cache or beside(store.folder),
        max_requests=options.max_requests,
        max_tokens=options.max_tokens,
        concurrency=options.concurrency,
    )
    return RuleJudge() if found is None else ModelJudge(found)


def beside(folder: Path | Remote) -> Path:
    """Where answers about a store are kept: beside it, or for one at a URI in the working directory."""
    name = f"{folder.name}.cache"
    return folder.with_name(name) if isinstance(folder, Path) else Path(name)


def most_frequent(store: FeatureStore, layer: int, n: int) -> list[int]:
    """The `n` features of a layer that fire on most tokens, ties by the lower index."""
    rows = store.stats(layer).sort_by([("tokens", "descending"), ("feature", "ascending")]).slice(0, n)
    return rows["feature"].to_pylist()
