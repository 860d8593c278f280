"""`Torchrun`: the windows of an extraction, taken by the processes that `torchrun` started, one window at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import Any

from qwen_scope.errors import QwenScopeError
from qwen_scope.sae import started_by_torchrun
from qwen_scope.scope import Job, Scope
from qwen_scope.text import Corpus

from .share import accepted, check_shared, opened, refusal

LONGEST = timedelta(days=30)
"""How long a process waits for another; where one dies, `torchrun` ends all of them."""

EXTRACTIONS = count()
"""Of this process; each has its own keys."""

# The keys under which the processes tell each other something.
JOB, NEXT = "job", "next"


class Torchrun:
    """One process's part in an extraction that `torchrun` spreads over several.

    Every process opens the model and the SAEs, reads the corpus, and takes the next window that nobody has taken. The
    first process writes the store, as `Runner`; the others `follow`. All of them see the store's folder.

    It is made before the model is opened: it says which GPU of the machine is this process's.

    Attributes:
        rank, world: this process, and how many there are.

    Raises:
        InputError: as `sae.started_by_torchrun`.
    """

    def __init__(self) -> None:
        from torch.distributed import PrefixStore, rendezvous  # pyright: ignore[reportPrivateImportUsage]

        self.rank, self.world = started_by_torchrun("--on torchrun", "extract")
        store = next(iter(rendezvous("env://", timeout=LONGEST)))[0]
        self.store = PrefixStore(f"qwen-scope-extract-{next(EXTRACTIONS)}", store)
        self.scope: Scope | None = None
        self._told, self._end = False, 0

    @contextmanager
    def reading(self, scope: Scope) -> Iterator[Torchrun]:
        """What `extract` takes as its runner, in the first process; the others go where it has nothing to do."""
        self.scope = scope
        try:
            yield self
        finally:
            if not self._told:
                self._tell("")

    def run(self, job: Job) -> Iterator[tuple[int, dict[str, Any]]]:
        """As `scope.Runner`, for the first process.

        Raises:
            InputError: a store in this process's memory.
            QwenScopeError: what a process ran into.
        """
        check_shared(job)
        self._tell(json.dumps(job.plain()))
        after = job.first
        for _ in self._written(job):
            while self.store.check([str(after)]):
                yield after, self._taken(after)
                after += 1
        while after < self._end:
            yield after, self._taken(after)
            after += 1

    def follow(self, scope: Scope, corpus: Corpus) -> None:
        """Write windows of the extraction that the first process runs, until there are none; for all others.

        What a window runs into is told by the first process.
        """
        self.scope = scope
        if said := self.store.get(JOB):
            for _ in self._written(Job.from_plain(json.loads(said), corpus, scope.tokenizer)):
                pass

    def _tell(self, job: str) -> None:
        self._told = True
        self.store.set(JOB, job)

    def _taken(self, number: int) -> dict[str, Any]:
        """What was told of a window, as soon as it is.

        Raises:
            QwenScopeError: of whoever wrote it.
        """
        found = json.loads(self.store.get(str(number)))
        self.store.delete_key(str(number))
        return accepted(found)

    def _written(self, job: Job) -> Iterator[int]:
        """The windows that this process takes, each told of in the store of keys before it comes."""
        assert self.scope is not None
        engine, mine, device = opened(self.scope, job)
        number, wanted = job.first - 1, self._next(job)
        for number, window in job.windows():
            if number != wanted:
                continue
            try:
                job.check(mine)
                said = job.write(number, window, engine, mine, device)
            except QwenScopeError as error:
                said = refusal(error)
            self.store.set(str(number), json.dumps(said))
            yield number
            wanted = self._next(job)
        self._end = number + 1

    def _next(self, job: Job) -> int:
        return job.first + self.store.add(NEXT, 1) - 1
