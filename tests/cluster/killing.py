"""Ray's worker processes below this one, found and killed by their number: what a machine's death looks like."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def parents() -> dict[int, tuple[int, str]]:
    """Of every process its parent and its title."""
    found = {}
    for path in Path("/proc").iterdir():
        if path.name.isdecimal():
            with suppress(OSError):
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                found[int(path.name)] = parent, (path / "cmdline").read_bytes().decode(errors="replace")
    return found


def below(ancestor: int) -> dict[int, str]:
    """The processes below one, with their titles."""
    known = parents()

    def ours(process: int) -> bool:
        while process in known:
            process = known[process][0]
            if process == ancestor:
                return True
        return False

    return {process: title for process, (_, title) in known.items() if ours(process)}


def workers() -> list[int]:
    """The processes below this one in which Ray Data runs our worker."""
    return [process for process, title in below(os.getpid()).items() if title.startswith("ray::MapWorker")]


def of_rank(ancestor: int, rank: int) -> int | None:
    """The process below one that `torchrun` has given a rank."""
    for process in below(ancestor):
        with suppress(OSError):
            if f"RANK={rank}".encode() in (Path("/proc") / str(process) / "environ").read_bytes().split(b"\0"):
                return process
    return None


@contextmanager
def killing(times: int, written: Path, seed: int = 0) -> Iterator[list[int]]:
    """Kill a worker at random so many times while the block runs, each time after something more was written.

    Args:
        written: a folder whose files tell of progress.

    The list is of the processes that were killed.
    """
    chance, killed, over = random.Random(seed), [], threading.Event()

    def files() -> int:
        return sum(1 for _ in written.glob("*")) if written.is_dir() else 0

    def run() -> None:
        while len(killed) < times and not over.is_set():
            before = files()
            while files() <= before and not over.wait(0.02):
                pass
            over.wait(chance.random() * 0.2)
            if (found := [one for one in workers() if one not in killed]) and not over.is_set():
                killed.append(chance.choice(found))
                with suppress(ProcessLookupError):
                    os.kill(killed[-1], signal.SIGKILL)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()
