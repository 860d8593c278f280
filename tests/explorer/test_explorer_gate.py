"""Who is served at all: hosts, origins, sizes, passwords, and visitors in turn."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from explored import LAYER, served

from qwen_scope.errors import InputError
from qwen_scope.explorer import AppState, Limits
from qwen_scope.explorer.access.fair_queue import Turns
from qwen_scope.explorer.access.gate import Gate, Logins, address_of, check_host, host_name

PORT = 7860


def asked(
    host: str | list[str] | None = f"127.0.0.1:{PORT}", origin: str | None = None, *, names: tuple[str, ...] = (),
    server: str = "127.0.0.1", body: bytes = b"", waiting: int = 0, path: str = "/", method: str = "POST",
    **headers: str,
) -> tuple[int, str]:  # fmt: skip
    """Status and body of what the gate in front of a page that says "inside" answers."""

    async def page(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"inside"})

    given = [host] if isinstance(host, str) else host or []
    sent = [(b"host", one.encode()) for one in given]
    sent += [(key.replace("_", "-").encode(), value.encode()) for key, value in headers.items()]
    sent += [(b"origin", origin.encode())] if origin is not None else []
    scope = {"type": "http", "method": method, "path": path, "headers": sent}
    scope |= {"server": (server, PORT), "client": ("10.0.0.9", 1)}
    pieces = [body[i : i + 1000] for i in range(0, len(body), 1000)] or [b""]
    messages = [{"type": "http.request", "body": one, "more_body": True} for one in pieces[:-1]]
    messages.append({"type": "http.request", "body": pieces[-1], "more_body": False})
    told: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        told.append(message)

    gate = Gate(page, names, Limits(request_bytes=5_000, upload_bytes=50_000, waiting=3), lambda address: waiting)
    asyncio.run(gate(scope, receive, send))
    return told[0]["status"], told[1]["body"].decode()


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "LOCALHOST:7860", "[::1]:7860", "127.0.0.1:9999", "localhost."]
)
def test_the_loopback_is_served_under_its_names(host: str) -> None:
    assert asked(host) == (200, "inside")


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "localhost.evil.example", "192.168.1.7", "0.0.0.0",
     "", "127.1", "2130706433", "[::ffff:127.0.0.1]", "localhost@evil.example", "evil.example#localhost", "[",
     "\x1b[31mred",
     None, ["localhost", "evil.example"], ["localhost", "localhost"], "x" * 5000],
    ids=lambda host: repr(host)[:40],
)  # fmt: skip
def test_other_hosts_are_refused_with_a_sentence(host: Any) -> None:
    status, told = asked(host)
    assert (status, "inside" in told) == (421, False)
    assert "--allow-host" in told
    assert len(told) < 300
    assert "\x1b" not in told


def test_names_of_the_operator_and_the_address_a_request_came_in_at_are_served() -> None:
    assert asked("scope.example.org:443", names=("Scope.Example.org",))[0] == 200
    assert asked("192.168.1.7:7860", server="192.168.1.7")[0] == 200
    assert asked("192.168.1.8:7860", server="192.168.1.7")[0] == 421
    assert asked("[fe80::1]:80", names=("[fe80::1]",))[0] == 200


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [("127.0.0.1:7860", "http://127.0.0.1:7860", 200), ("localhost:9000", "http://localhost:9000", 200),
     ("scope.example.org", "https://scope.example.org", 200), ("127.0.0.1:7860", "https://scope.example.org", 200),
     ("127.0.0.1:7860", "http://evil.example", 403), ("127.0.0.1:7860", "null", 403), ("127.0.0.1:7860", "", 403),
     ("127.0.0.1:7860", "http://127.0.0.1:3000", 403), ("127.0.0.1:7860", "http://localhost:7860", 403),
     ("127.0.0.1:7860", "http://127.0.0.1:7860@evil.example", 403), ("127.0.0.1:7860", "file://", 403)],
)  # fmt: skip
def test_pages_of_other_sites_may_ask_nothing(host: str, origin: str, status: int) -> None:
    assert asked(host, origin, names=("scope.example.org",))[0] == status


@pytest.mark.parametrize("name", ["", "http://a.example", "a/b", "a b", "*", "*.example", "user@a", "a?b", "#", "[::1"])
def test_what_is_no_host_is_refused_at_the_start(name: str) -> None:
    with pytest.raises(InputError, match="--allow-host"):
        check_host(name)
    assert check_host("A.Example:80") == "a.example"
    assert host_name(check_host("fe80::1")) == "fe80::1"


def test_requests_are_bounded_in_bytes() -> None:
    assert asked(body=b"x" * 5_000)[0] == 200
    given: tuple[dict[str, Any], ...] = ({}, {"content_length": "5001"}, {"content_length": "9" * 5000})
    for headers in given:
        status, told = asked(body=b"x" * 5_001, **headers)
        assert status == 413
        assert "larger than 5,000 bytes" in told
    assert asked(body=b"x" * 100_000, path="/gradio_api/upload")[0] == 200
    assert asked(body=b"x" * 300_000, path="/gradio_api/upload")[0] == 413


def test_one_address_has_few_requests_waiting() -> None:
    for path in ("/gradio_api/call/features", "/gradio_api/queue/join", "/gradio_api/call/v2/features"):
        assert asked(path=path, waiting=2)[0] == 200
        status, told = asked(path=path, waiting=3)
        assert (status, "3 of your requests wait already" in told) == (429, True)
    assert asked(path="/gradio_api/call/features/abc", waiting=3, method="GET")[0] == 200


def test_wrong_passwords_cost_more_and_more_time() -> None:
    now = [0.0]
    logins = Logins(lambda: now[0])
    waits = []
    for _ in range(100):
        waits.append(logins.wait("10.0.0.9"))
        now[0] += waits[-1]
        assert logins.wait("10.0.0.9") == 0
        logins.tried("10.0.0.9")
    assert waits[:5] == [0] * 5
    assert waits[5:9] == [1, 2, 4, 8]
    assert max(waits) == Logins.LONGEST
    assert sum(waits) > 6 * 3600
    others = [f"10.1.0.{i}" for i in range(200)]
    assert sum(logins.wait(other) > 0 for other in others) <= 2  # a place may be shared
    now[0] += Logins.FORGET + 1
    assert logins.wait("10.0.0.9") == 0


def test_a_password_of_ones_own_buys_no_guesses() -> None:
    now = [0.0]
    logins = Logins(lambda: now[0])
    for _ in range(20):
        logins.tried("a")
        logins.tried("a")
        logins.right("a")
    assert logins.wait("a") == Logins.LONGEST
    size = len(logins._mistakes)
    for i in range(20_000):
        logins.tried(f"10.{i % 256}.{i // 256}.1")
    assert len(logins._mistakes) == size


def test_a_network_of_ipv6_is_one_address() -> None:
    one, two, other = (address_of({"client": (f"2001:db8:{net}::{host}", 1)}) for net, host in ((1, 1), (1, 2), (2, 1)))
    assert one == two != other
    assert address_of({"client": ("::ffff:10.0.0.9", 1)}) == address_of({"client": ("10.0.0.9", 1)}) == "10.0.0.9"
    assert address_of({"client": None}) == ""


def event(address: str, name: str) -> Any:
    request = SimpleNamespace(scope={"client": (address, 1)})
    return type("Event", (), {"request": request, "username": None, "name": name, "__repr__": lambda self: name})()


def test_visitors_take_turns() -> None:
    turns = Turns()
    for address, name in [*(("a", f"a{i}") for i in range(4)), ("b", "b0"), ("b", "b1"), ("c", "c0")]:
        turns.append(event(address, name))
    assert [one.name for one in turns] == ["a0", "b0", "c0", "a1", "b1", "a2", "a3"]
    turns.remove(turns[0])
    turns.remove(turns[0])
    turns.append(event("d", "d0"))
    turns.append(event("a", "a4"))
    assert [one.name for one in turns] == ["c0", "d0", "a1", "b1", "a2", "a3", "a4"]
    while turns:
        turns.remove(turns[0])
    turns.append(event("a", "last"))
    assert [one.name for one in turns] == ["last"]


@pytest.mark.slow
def test_a_served_page_keeps_the_gate(state: AppState) -> None:
    with (
        served(state, auth=[("ada", "secret")], allow_hosts=["scope.example.org"]) as url,
        httpx.Client(timeout=60) as visitor,
    ):
        assert visitor.get(url, headers={"host": "evil.example"}).status_code == 421
        assert visitor.get(url, headers={"host": "scope.example.org"}).status_code == 200
        assert visitor.get(f"{url}config", headers={"host": "evil.example"}).status_code == 421
        assert visitor.post(f"{url}login", headers={"origin": "http://evil.example"}).status_code == 403
        assert (
            visitor.get(f"{url}nowhere", headers={"host": "evil.example"})
            .json()["detail"]
            .startswith("this page is not")
        )
        statuses = [
            visitor.post(f"{url}login", data={"username": "ada", "password": f"guess{i}"}).status_code
            for i in range(100)
        ]
        assert statuses[0] == 400
        assert statuses.count(400) < 10
        refused = visitor.post(f"{url}login/", data={"username": "ada", "password": "secret"})
        assert refused.status_code == 429
        assert "too many wrong passwords" in refused.json()["detail"]
        wait = int(refused.headers["retry-after"])
        assert 0 < wait <= math.ceil(Logins.LONGEST)
        time.sleep(min(wait, 8))
        if wait <= 8:
            assert visitor.post(f"{url}login", data={"username": "ada", "password": "secret"}).status_code == 200


def test_a_large_body_is_refused_before_it_is_read(url: str) -> None:
    route = f"{url}gradio_api/call/features"

    def endless() -> Any:
        for _ in range(300):
            yield b" " * 10_000

    for content in (b'{"data": ["' + b"x" * 3_000_000 + b'"]}', endless()):
        answer = httpx.post(route, content=content, headers={"content-type": "application/json"}, timeout=60)
        assert answer.status_code == 413
        assert "larger than 2,000,000 bytes" in answer.json()["detail"]


def test_nobody_goes_past_the_queue(url: str) -> None:
    for route in ("run", "api"):
        answer = httpx.post(
            f"{url}gradio_api/{route}/features", json={"data": ["Hello", LAYER, "plain", 1]}, timeout=60
        )
        assert answer.status_code == 404


@pytest.mark.slow
def test_a_crowd_of_one_address_is_told_to_wait(state: AppState) -> None:
    own = AppState(state.scope, limits=Limits(waiting=4))
    go_on, seen = threading.Event(), own.seen
    own.seen = lambda *args: (go_on.wait(30), seen(*args))[1]  # pyright: ignore[reportAttributeAccessIssue]
    with served(own) as url, httpx.Client(timeout=60) as visitor:
        route, body = f"{url}gradio_api/call/features", {"data": ["Hello", LAYER, "plain", 1]}
        statuses = [visitor.post(route, json=body).status_code for _ in range(8)]
        go_on.set()
    assert statuses[:4] == [200] * 4
    assert statuses[-1] == 429
