"""`Gate`: what a request passes before the page sees it: its host, its origin, its size, who sends it."""

from __future__ import annotations

import ipaddress
import math
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from qwen_scope.errors import InputError, brief

from .limits import Limits

LOOPBACK = ("localhost", "127.0.0.1", "::1")
FORM = 100_000
"""Bytes that an upload may have beside its file."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Logins:
    """How long an address has to wait before it may try another password.

    The first `FREE` mistakes cost nothing, each further one doubles the wait, and an hour without any forgets them.
    Addresses share a fixed number of places, so that no number of them takes more memory.
    """

    FREE, LONGEST, FORGET, PLACES = 5, 300.0, 3600.0, 4096

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._mistakes = [0] * self.PLACES
        self._last = [-math.inf] * self.PLACES

    def wait(self, address: str) -> float:
        """Seconds until the address may try again; 0 if it may now."""
        place, now = self._place(address), self._clock()
        if now - self._last[place] > self.FORGET:
            self._mistakes[place] = 0
        over = self._mistakes[place] - self.FREE
        delay = min(2.0 ** min(over, 20), self.LONGEST) if over >= 0 else 0.0
        return max(0.0, self._last[place] + delay - now)

    def tried(self, address: str) -> None:
        """A password of the address is about to be looked at; it counts as a mistake until it turns out right."""
        place = self._place(address)
        self._mistakes[place], self._last[place] = self._mistakes[place] + 1, self._clock()

    def right(self, address: str) -> None:
        """That password was right. Earlier mistakes stay: one who has a password does not get to guess others."""
        place = self._place(address)
        self._mistakes[place] = max(0, self._mistakes[place] - 1)

    def _place(self, address: str) -> int:
        return hash(address) % self.PLACES  # Python salts the hash, so nobody can choose to share another's place


class Gate:
    """Middleware: answers what may not pass with one sentence, and lets everything else through.

    Args:
        app: the page.
        names: under which it is served besides the loopback and the address that a request came in at.
        limits: of sizes and of waiting requests.
        waiting: how many requests of an address wait now.
    """

    def __init__(self, app: Any, names: Iterable[str], limits: Limits, waiting: Callable[[str], int]) -> None:
        self.app, self.limits, self.waiting = app, limits, waiting
        self.names, self.logins = {host_name(name) for name in names}, Logins()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            if login and message["type"] == "http.response.start" and message["status"] < 400:
                self.logins.right(address_of(scope))
            await send(message)

        login = scope["type"] == "http" and scope["method"] == "POST" and last_part(scope) == "login"
        try:
            self.check_names(scope)
            if scope["type"] == "http":
                self.check_sender(scope, login)
                receive = self.bounded(scope, receive)
            await self.app(scope, receive, sending)
        except HTTPException as refused:
            if begun:
                raise
            await JSONResponse({"detail": refused.detail}, refused.status_code, refused.headers)(scope, receive, send)

    def check_names(self, scope: Message) -> None:
        """Refuse a request that asks for another host than this one, or that another site's page has sent.

        A name that somebody makes point here (DNS rebinding) is in the request's `Host`, a site whose script speaks to
        this one in its `Origin`.
        """
        hosts, origins = header(scope, b"host"), header(scope, b"origin")
        host = hosts[0] if len(hosts) == 1 else ""
        name, server = host_name(host), (scope.get("server") or ("",))[0]
        if name not in {*LOOPBACK, *self.names, host_name(server)} or not name:
            raise refusal(
                421,
                f"this page is not served under the name {brief(name)}; its operator can add one by --allow-host NAME",
            )
        for origin in origins:
            sent_by = urlsplit(origin).netloc.lower() if "://" in origin else ""
            if sent_by != host.lower() and host_name(sent_by) not in self.names:
                raise refusal(403, f"this page takes no requests from pages of {brief(origin)}")

    def check_sender(self, scope: Message, login: bool) -> None:
        """Refuse an address that guesses passwords, or that has many requests waiting."""
        if scope["method"] != "POST":
            return
        address = address_of(scope)
        if login:
            if wait := self.logins.wait(address):
                raise refusal(429, f"too many wrong passwords; try again in {math.ceil(wait)} s", wait)
            self.logins.tried(address)
        elif ("/call/" in scope["path"] or scope["path"].rstrip("/").endswith("/queue/join")) and (
            self.waiting(address) >= self.limits.waiting
        ):
            raise refusal(
                429,
                f"{self.limits.waiting} of your requests wait already; send the next when some have been answered",
                1,
            )

    def bounded(self, scope: Message, receive: Receive) -> Receive:
        """`receive`, which refuses more bytes than a request may have."""
        upload = last_part(scope) == "upload"
        most = self.limits.upload_bytes * 2 + FORM if upload else self.limits.request_bytes
        refused = refusal(413, f"this request is larger than {most:,} bytes, which is what this page takes")
        said = header(scope, b"content-length")
        if said and said[0].isdecimal() and int(said[0][:20]) > most:
            raise refused
        got = 0

        async def receiving() -> Message:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            if got > most:
                raise refused
            return message

        return receiving


def refusal(status: int, sentence: str, wait: float = 0.0) -> HTTPException:
    """A request that goes no further, with the status and the sentence that it is answered with."""
    return HTTPException(status, sentence, {"retry-after": str(math.ceil(wait))} if wait else None)


def header(scope: Message, name: bytes) -> list[str]:
    """The values of a header, as many as there are."""
    return [value.decode("latin-1").strip() for key, value in scope["headers"] if key == name]


def last_part(scope: Message) -> str:
    """The last part of the path that is asked for."""
    return scope["path"].rstrip("/").rpartition("/")[2]


def host_name(host: str) -> str:
    """The name in `NAME:PORT`, in lower case and without the brackets of IPv6; empty where there is none."""
    try:
        return (urlsplit(f"//{host.strip()}").hostname or "").rstrip(".")
    except ValueError:
        pass
    return ""


def check_host(name: str) -> str:
    """A name or an address for `--allow-host`; raises InputError for anything else."""
    found = host_name(f"[{name}]" if name.count(":") > 1 and "[" not in name else name)
    if not found or any(char in name for char in "/*@ ?#"):
        raise InputError(f"--allow-host is a name or an address such as scope.example.org, not {brief(name)}")
    return f"[{found}]" if ":" in found else found


def address_of(scope: Message) -> str:
    """Who sends a request: the address, of IPv6 the network, within which anybody has as many as they like."""
    address = (scope.get("client") or ("",))[0]
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    if found.version == 4:
        return address
    return str(found.ipv4_mapped or ipaddress.ip_network((found, 64), strict=False))
