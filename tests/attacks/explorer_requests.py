"""What a visited page does to a server: its memory over many requests, and whether two visitors ever mix.

    python tests/attacks/explorer_requests.py same --requests 2000       # one text again and again
    python tests/attacks/explorer_requests.py sessions --requests 1000   # two browsers' sessions, interleaved

Each starts `qwen-scope explore` on the lab as a process of its own, speaks HTTP to it over the loopback as a browser
does, prints what it measured and ends with 1 where a bound is broken.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from html import unescape
from pathlib import Path
from typing import Any

import httpx

SETTLED = 200
"""Requests after which memory has to stay flat."""

FLAT = 30
"""Megabytes by which it may differ afterwards."""

LAYER = 4
TEXTS = ("Where is the station?", "Der Zug kommt um neun.")


@contextmanager
def explorer(*options: str) -> Iterator[tuple[str, int]]:
    """A server process: its address and its process id."""
    command = [sys.executable, "-m", "qwen_scope.cli", "explore", "--no-browser", *options]
    quiet = {"stdout": subprocess.PIPE, "stderr": None, "text": True}
    with subprocess.Popen(command, env={**os.environ, "PYTHONUNBUFFERED": "1"}, **quiet) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if found := re.search(r"http://\S+", line):
                    yield found[0], process.pid
                    break
            else:
                raise RuntimeError("the explorer ended before it listened")
        finally:
            process.send_signal(signal.SIGTERM)


def resident(pid: int) -> float:
    """Megabytes of a process that are in memory."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def answer(visitor: httpx.Client, url: str, endpoint: str, data: list[Any]) -> Any:
    """What an endpoint answers."""
    route = f"{url}gradio_api/call/{endpoint}"
    event = visitor.post(route, json={"data": data}).raise_for_status().json()["event_id"]
    lines = visitor.get(f"{route}/{event}").raise_for_status().text.splitlines()
    return json.loads(lines[lines.index("event: complete") + 1].removeprefix("data: "))[0]


def same_text(requests: int, every: int = 100) -> list[tuple[int, float]]:
    """Megabytes in memory after so many requests of one text."""
    curve = []
    with explorer() as (url, pid), httpx.Client(timeout=60) as visitor:
        first = answer(visitor, url, "features", [TEXTS[0], LAYER])
        for number in range(1, requests + 1):
            assert answer(visitor, url, "features", [TEXTS[0], LAYER]) == first
            if number % every == 0:
                curve.append((number, resident(pid)))
    return curve


class Session:
    """One browser's session on the Explore tab, as the page's own script speaks to the server."""

    def __init__(self, url: str, name: str) -> None:
        self.url, self.name, self.client = url, name, httpx.Client(timeout=60)
        config = self.client.get(f"{url}config").json()
        self.parts = {part["props"].get("elem_id"): part["id"] for part in config["components"]}
        self.calls = config["dependencies"]

    def call(self, part: str, event: str, values: dict[str, Any], picked: str | None = None) -> str:
        """What the server has said when an event of a part is done; `values` are those of the parts by name."""
        asked = next(one for one in self.calls if [self.parts[part], event] in one["targets"])
        by_id = {self.parts[name]: value for name, value in values.items()}
        body = {
            "fn_index": asked["id"],
            "data": [by_id.get(one, True) for one in asked["inputs"]],
            "event_data": {"pick": picked} if picked else None,
            "session_hash": self.name,
            "trigger_id": self.parts[part],
        }
        self.client.post(f"{self.url}gradio_api/queue/join", json=body).raise_for_status()
        told = ""
        with self.client.stream("GET", f"{self.url}gradio_api/queue/data?session_hash={self.name}") as stream:
            for line in stream.iter_lines():
                if "process_completed" in line:  # what is shown while it works comes in messages of their own
                    told = line
                    assert json.loads(line.removeprefix("data: "))["success"], line[:500]
                if "close_stream" in line:
                    break
        return told

    def read(self, text: str) -> str:
        """Read a text."""
        return self.call(
            "explore-read", "click", {"explore-text": text, "explore-chat": "plain", "explore-layer": LAYER}
        )

    def pick(self, token: int) -> str:
        """Click a token of the text that was read last."""
        return self.call("explore-tokens", "pick", {}, f"token:{token}")


def shown(told: str) -> str:
    """The text of the tokens' buttons, in their order."""
    return unescape("".join(re.findall(r'data-pick=\\"token:\d+\\"[^>]*>([^<]*)<', told)))


def two_sessions(requests: int) -> int:
    """Requests of two sessions in turn, reading and clicking; how many were not about the session's own text."""
    mixed = 0
    with explorer() as (url, _):
        sessions = [Session(url, f"session{i}") for i in range(2)]
        texts = ["", ""]
        for number in range(requests):
            who = number % 2
            if number % 8 < 2:
                texts[who] = f"{TEXTS[who]} {number}"
                told = sessions[who].read(texts[who])
            else:
                told = sessions[who].pick(number % 5)
            mixed += shown(told) != texts[who]
    return mixed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("same", "sessions"))
    parser.add_argument("--requests", type=int, default=1000)
    given = parser.parse_args()
    started = time.monotonic()
    if given.what == "sessions":
        mixed = two_sessions(given.requests)
        sys.stdout.write(
            f"{given.requests} requests of two sessions: {mixed} mixed ({time.monotonic() - started:.0f} s)\n"
        )
        return int(mixed > 0)
    curve = same_text(given.requests)
    for number, megabytes in curve:
        sys.stdout.write(f"{number:>6} requests {megabytes:8.1f} MB\n")
    later = [megabytes for number, megabytes in curve if number >= SETTLED]
    spread = max(later) - min(later)
    sys.stdout.write(f"after {SETTLED}: within {spread:.1f} MB ({time.monotonic() - started:.0f} s)\n")
    return int(spread > FLAT)


if __name__ == "__main__":
    sys.exit(main())
