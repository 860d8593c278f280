"""In what order visitors' requests are served: each in turn, however many one of them has sent."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

from gradio import Blocks

from .gate import address_of


class Turns(list):
    """A queue in which the visitors take turns; to Gradio it is the list that it keeps its waiting events in.

    Every event belongs to a round. A visitor's next event waits for the round after their last one, so who asks for the
    first time comes before the second request of anybody else.
    """

    def __init__(self) -> None:
        super().__init__()
        self._rounds: dict[Any, int] = {}

    def append(self, event: Any) -> None:
        """At the end of the round it belongs to."""
        own = [self._rounds[other] for other in self if visitor(other) == visitor(event)]
        first = self._rounds[self[0]] if self else 0
        mine = max(own) + 1 if own else first
        at = next((i for i, other in enumerate(self) if self._rounds[other] > mine), len(self))
        self._rounds[event] = mine
        super().insert(at, event)

    def remove(self, event: Any) -> None:
        """It is served, or its visitor has gone."""
        super().remove(event)
        self._rounds.pop(event, None)


def visitor(event: Any) -> Hashable:
    """Who has sent an event: an address, and the name they signed in with."""
    return address_of(event.request.scope), event.username


def take_turns(page: Blocks) -> None:
    """Serve every queue of the page in turns."""
    for fn in page.fns.values():
        if fn.queue:
            page._queue.create_event_queue_for_fn(fn)
    for queue in page._queue.event_queue_per_concurrency_id.values():
        queue.queue = Turns()


def waiting(page: Blocks, address: str) -> int:
    """How many requests of an address wait in any queue."""
    return sum(address_of(event.request.scope) == address for event in events(page))


def events(page: Blocks) -> Iterator[Any]:
    """All that waits."""
    for queue in page._queue.event_queue_per_concurrency_id.values():
        yield from list(queue.queue)
