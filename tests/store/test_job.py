"""Windows that are written elsewhere, in any order, make the store that one process writes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import stores
from test_merge import same

from qwen_scope.errors import InputError, MismatchError
from qwen_scope.sae import Identity, TopK
from qwen_scope.scope import ExtractOptions, Job, ModelEngine, Runner, extract
from qwen_scope.text import Corpus

HARD = {"row_tokens": 7, "window_tokens": 90, "batch_tokens": 80, "pool": ("mean", "last")}


class Elsewhere:
    """Writes windows two or three times, as workers do that die, and tells of them in an order of its own.

    Args:
        until: after how many it ends early.
    """

    def __init__(self, seed: int, until: int | None = None) -> None:
        self.chance, self.until = random.Random(seed), until

    def run(self, job: Job) -> Iterator[tuple[int, dict[str, Any]]]:
        job.check(stores.saes())
        found = list(job.windows())
        self.chance.shuffle(found)
        for number, window in found[: self.until]:
            for _ in range(self.chance.randint(1, 2)):
                written = job.write(number, window, ModelEngine(stores.scope().model, 80), stores.saes())
            yield number, written


def run(folder: Path, runner: Runner | None = None, source: Any = stores.ROWS, **options) -> Path:
    chosen = ExtractOptions(**{**HARD, **options})
    saes = stores.saes()
    extract(Corpus(source), stores.loaded(), saes, folder, chosen, runner=runner).close()
    return folder


def test_windows_written_elsewhere_are_the_store_of_one_process(tmp_path) -> None:
    rows = [*stores.ROWS[:4], {"other": 1}, *stores.ROWS[4:]]
    same(run(tmp_path / "a", Elsewhere(1), rows), run(tmp_path / "b", None, rows))


def test_what_was_not_written_is_written_by_the_next_run(tmp_path) -> None:
    whole = run(tmp_path / "whole", None, [*stores.ROWS, {"other": 1}])
    folder = tmp_path / "s"
    with pytest.raises(InputError, match=r"window [0-9]+ of .* was not written and later ones were"):
        run(folder, Elsewhere(3, until=2), [*stores.ROWS, {"other": 1}])
    assert (folder / "work").is_dir()
    same(run(folder, Elsewhere(4), [*stores.ROWS, {"other": 1}]), whole)


def test_a_run_begun_here_goes_on_elsewhere_in_the_middle_of_a_document(tmp_path) -> None:
    """The window before ended within a document, whose pooled residuals go over."""
    folder, source = tmp_path / "s", [*stores.ROWS, {"other": 1}]

    class Killed(BaseException): ...

    def stop(now: Any) -> None:
        if now.tokens > 150:
            raise Killed

    with pytest.raises(Killed):
        extract(Corpus(source), stores.loaded(), stores.saes(), folder, ExtractOptions(**HARD), stop)
    same(run(folder, Elsewhere(5), source), run(tmp_path / "whole", None, source))


def test_a_worker_with_another_sae_is_refused(tmp_path) -> None:
    class Other:
        def run(self, job: Job) -> Iterator[tuple[int, dict[str, Any]]]:
            made = stores.saes()[0]
            weights = made.W_enc, made.W_dec, made.b_enc, made.b_dec
            other = TopK(*weights, k=made.k, hook_point=made.hook_point, identity=Identity("SAE", 0, "f" * 64))
            job.check({**stores.saes(), 0: other})
            yield from ()

    with pytest.raises(MismatchError, match="a worker found another SAE for layer 0"):
        run(tmp_path / "s", Other())
    with pytest.raises(InputError, match="can be read only once, and workers read it again"):
        run(tmp_path / "s", Elsewhere(1), iter(stores.TEXTS), counted=stores.Counted.everything())
