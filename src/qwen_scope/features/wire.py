"""One HTTP request with an end: no redirect is followed, and time and size of the answer are bounded.

httpx2 does the protocol, TLS and the proxies of the environment. Its timeouts are per read, so a server that sends a
byte now and then would never reach them; here a timer shuts the socket when the time of the whole request is over.
"""

from __future__ import annotations

import re
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, final

import httpx2

from qwen_scope.errors import FormatError, InputError, NotFoundError, brief, foreign, reason

MOST_BYTES = 4 * 2**20  # of an answer, unpacked; a long completion has a hundredth of it
ERROR_BYTES = 2**16  # of the body of an error, of which a line is shown
MOST_VALUES = 100_000  # in an answer
DEEPEST = 64  # objects and lists inside each other; a completion has about six
HOST = re.compile(r"[\w.:-]*\w[\w.:-]*", re.ASCII)
STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"?', re.DOTALL)


class Unreached(NotFoundError):
    """No whole answer came back; asking again may help."""


@dataclass(frozen=True)
class Reply:
    """What a server answers.

    Attributes:
        status: of HTTP.   headers: their names in lower case.   data: the body, unpacked; of an error its beginning.
    """

    status: int
    headers: Mapping[str, str]
    data: bytes


def parse_address(text: str, what: str = "an endpoint") -> httpx2.URL:
    """An http or https address with a host.

    Raises:
        InputError: it is none. What it may hold of a password is not repeated.
    """
    shown = f"not {brief(text)}" if not re.search("[@?]", text) else "not the one that was given"
    with foreign(f"{what} is an http or https address such as http://localhost:8000/v1, {shown}", InputError):
        url = httpx2.URL(text.strip())
        if url.scheme not in ("http", "https"):
            raise ValueError("the scheme is another")
        if not HOST.fullmatch(url.raw_host.decode("ascii")):
            raise ValueError("it names no host")
        if url.port is not None and not 0 < url.port < 2**16:
            raise ValueError(f"there is no port {url.port}")
    return url.copy_with(fragment=None)


def without_secrets(url: httpx2.URL) -> str:
    """An address as it may be shown: no name, password or values of its query."""
    host = f"[{url.host}]" if ":" in url.host else url.host
    port = "" if url.port is None else f":{url.port}"
    query = "?***" if url.query else ""
    return f"{url.scheme}://{host}{port}{url.path}{query}"


@final
class Wire:
    """Sends requests; shared between threads. Every request has a connection of its own, which the timer can shut."""

    def __init__(self) -> None:
        self._client: httpx2.Client | None = None
        self._lock = threading.Lock()

    def post(self, url: httpx2.URL, target: str, body: bytes, headers: Mapping[str, str], seconds: float) -> Reply:
        """One request and its answer.

        Args:
            target: the path and the query that are asked for, in place of those of `url`.

        Raises:
            Unreached: the server can't be reached, or its answer is not whole after `seconds`.
            InputError: the request can't be made, or the server's certificate does not hold.
            FormatError: the answer is too large, or packed in a way that was not asked for.
        """
        client, timer = self._opened(), _Timer(seconds)
        headers = {**headers, "Accept-Encoding": "gzip, deflate"}
        extensions: dict[str, Any] = {"trace": timer.follow, "target": target.encode("ascii")}
        with timer, foreign("the request can't be sent", InputError):
            try:
                with client.stream(
                    "POST", url, content=body, headers=headers, timeout=seconds, extensions=extensions
                ) as reply:
                    most = MOST_BYTES if reply.status_code == 200 else ERROR_BYTES
                    packed = reply.headers.get("content-encoding", "").strip().lower()
                    data = _unpacked(timer.watched(reply.iter_raw(2**16)), packed, most, reply.status_code == 200)
                    return Reply(reply.status_code, dict(reply.headers), data)
            except (httpx2.UnsupportedProtocol, httpx2.LocalProtocolError) as error:
                raise InputError(f"the request can't be sent: {reason(error)}") from error
            except (httpx2.HTTPError, OSError) as error:
                if timer.over:
                    raise Unreached(f"no whole answer in {seconds:.3g} seconds") from error
                if (broken := _certificate(error)) is not None:
                    raise InputError(f"the server's certificate does not hold: {reason(broken)}") from error
                raise Unreached(reason(error)) from error

    def _opened(self) -> httpx2.Client:
        with self._lock:
            if self._client is None:
                with foreign("HTTP can't be set up", InputError, "look at HTTP_PROXY, HTTPS_PROXY and ALL_PROXY"):
                    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
                    no_cookies = CookieJar(DefaultCookiePolicy(allowed_domains=[]))
                    self._client = httpx2.Client(follow_redirects=False, limits=limits, cookies=no_cookies)
            return self._client


class _Timer:
    """Shuts the socket of a request when its time is over."""

    def __init__(self, seconds: float) -> None:
        self.over, self._socket, self._lock = False, None, threading.Lock()
        self._end = time.monotonic() + seconds
        self._timer = threading.Timer(seconds, self._shut)
        self._timer.daemon = True

    def __enter__(self) -> _Timer:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def follow(self, event: str, info: Mapping[str, Any]) -> None:
        """Take note of the socket when it is opened, and again when TLS wraps it."""
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            with self._lock:
                self._socket = info["return_value"].get_extra_info("socket")
            if self.over:
                self._shut()

    def watched(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """The pieces, until the time is over."""
        for piece in pieces:
            if self.over or time.monotonic() > self._end:
                self.over = True
                raise TimeoutError
            yield piece
        if self.over:  # a body without a length ends where the timer shut the socket
            raise TimeoutError

    def _shut(self) -> None:
        with self._lock:
            self.over = True
            if self._socket is not None:
                with _already_gone():
                    self._socket.shutdown(socket.SHUT_RDWR)


@contextmanager
def _already_gone() -> Iterator[None]:
    try:
        yield
    except OSError:
        return


def _unpacked(pieces: Iterable[bytes], packed: str, most: int, whole: bool) -> bytes:
    """A body of at most `most` bytes.

    Args:
        packed: the header `Content-Encoding`.
        whole: a larger one is refused; otherwise its beginning is enough.
    """
    if packed in ("", "identity"):
        unpack = None
    elif packed in ("gzip", "x-gzip", "deflate"):
        unpack = zlib.decompressobj(zlib.MAX_WBITS | 32)
    else:
        raise FormatError(f"it packs its answer as {packed[:40]!r}, which was not asked for")
    out = bytearray()
    for piece in pieces:
        try:
            # One byte beyond the bound tells that there is more; a bomb is never unpacked further.
            out += piece if unpack is None else unpack.decompress(piece, most + 1 - len(out))
        except zlib.error as error:
            raise Unreached(f"the answer can't be unpacked: {reason(error)}") from error
        if len(out) > most:
            if whole:
                raise FormatError(f"its answer is larger than {most // 2**20} MiB")
            break
    return bytes(out[:most])


def costly(data: bytes) -> bool:
    """Whether JSON nests deeper than `DEEPEST` or holds more than `MOST_VALUES`; told without parsing it."""
    bare = STRING.sub(b"", data)
    depth = 0
    for bracket in re.finditer(rb"[\[\]{}]", bare):
        depth += 1 if bracket[0] in b"[{" else -1
        if depth > DEEPEST:
            return True
    return sum(bare.count(mark) for mark in (b",", b"[", b"{")) > MOST_VALUES


def _certificate(error: BaseException) -> BaseException | None:
    """The certificate's own error behind an error of httpx2."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ssl.SSLCertVerificationError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None
