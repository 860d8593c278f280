"""The endpoint against servers that are wrong, slow, endless, curious or newer than expected: all real, on loopback."""

from __future__ import annotations

import gzip
import json
import logging
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from qwen_scope.errors import FormatError, InputError, NotFoundError
from qwen_scope.features import BadAnswer, BudgetSpent, Endpoint, Refused
from qwen_scope.features.completion import spoken
from qwen_scope.features.endpoint import LONGEST_WAIT, _retry_after
from qwen_scope.features.wire import DEEPEST, MOST_BYTES, costly

ASK = [{"role": "user", "content": "x"}]
KEY = "sk-geheim/tief+unten"


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, answer: Callable[[Handler, dict], None]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.bodies, self.headers, self.paths = answer, [], [], []

    def handle_error(self, request, client_address) -> None:
        """A client that hangs up is what these tests are about."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        self.server.headers.append(dict(self.headers))
        self.server.paths.append(self.path)
        self.server.answer(self, body)

    def send(self, data: bytes | str | dict, status: int = 200, **headers: str) -> None:
        raw = json.dumps(data).encode() if isinstance(data, dict) else data.encode() if isinstance(data, str) else data
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(raw)

    def drip(self, data: bytes, pause: float = 0.05) -> None:
        for i in range(len(data)):
            self.wfile.write(data[i : i + 1])
            self.wfile.flush()
            time.sleep(pause)


@contextmanager
def serving(answer: Callable[[Handler, dict], None]) -> Iterator[Server]:
    server = Server(answer)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def says(content: object, **more: object) -> dict:
    message = content if isinstance(content, dict) else {"content": content}
    return {"choices": [{"message": message, **more}], "usage": {"total_tokens": 7}}


def always(data: bytes | str | dict, status: int = 200, **headers: str) -> Callable[[Handler, dict], None]:
    return lambda handler, body: handler.send(data, status, **headers)


# --- where the key goes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_neither_key_nor_text_follows_a_redirect(status: int) -> None:
    with (
        serving(always(says("stolen"))) as thief,
        serving(
            always("", status, Location=f"{thief.url.replace('127.0.0.1', 'localhost')}/chat/completions")
        ) as first,
    ):
        with pytest.raises(InputError, match=r"sends on to http://localhost.*OPENAI_BASE_URL"):
            Endpoint(first.url, "m", KEY).ask(ASK)
        assert thief.bodies == []
        assert len(first.bodies) == 1


@pytest.mark.parametrize(
    "location",
    ["", "/elsewhere", "//other.example/v1", "file:///etc/passwd", "javascript:alert(1)", "http://[", f"/?k={KEY}"],
)
def test_odd_targets_of_a_redirect_are_one_sentence(location: str) -> None:
    with serving(always("", 302, Location=location)) as server, pytest.raises(InputError, match="sends on") as caught:
        Endpoint(server.url, "m", KEY).ask(ASK)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("status", [200, 400, 401, 403, 404, 418, 429, 500])
def test_a_key_that_is_echoed_is_masked(status: int, tmp_path: Path) -> None:
    def echo(handler: Handler, body: dict) -> None:
        auth = handler.headers["Authorization"]
        handler.send(json.dumps({"error": {"message": f"Bad {auth}", "escaped": KEY.replace("/", "\\/")}}), status)

    with serving(echo) as server:
        endpoint = Endpoint(server.url, "m", KEY, tries=1, cache=tmp_path)
        with pytest.raises((InputError, NotFoundError, FormatError)) as caught:
            endpoint.ask(ASK)
    for text in (str(caught.value), repr(endpoint)):
        assert "geheim" not in text
        assert "unten" not in text


@pytest.mark.parametrize("padding", [0, 150, 190, 195, 199, 65520, 65530])
def test_no_part_of_a_key_is_left_where_a_sentence_is_cut(padding: int) -> None:
    answer = " " * padding + "x" * min(padding, 190) + KEY
    with serving(always(answer, 401)) as server, pytest.raises(InputError) as caught:
        Endpoint(server.url, "m", KEY).ask(ASK)
    assert "sk-" not in str(caught.value)


def test_a_key_in_an_answer_reaches_neither_answer_nor_cache(tmp_path: Path) -> None:
    with serving(lambda h, b: h.send(says(f"your key is {h.headers['Authorization']}"))) as server:
        assert Endpoint(server.url, "m", KEY, cache=tmp_path).ask(ASK) == "your key is Bearer ***"
    assert all("geheim" not in path.read_text() for path in tmp_path.iterdir())


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "schlüssel", "\x1b[31m", "a\x00b"])
def test_a_key_that_is_no_header_is_refused_unseen(key: str) -> None:
    with pytest.raises(InputError, match="printable ASCII") as caught:
        Endpoint("http://localhost/v1", "m", key)
    assert key not in str(caught.value)


def test_a_line_end_after_the_key_is_no_part_of_it() -> None:
    with serving(always(says("yes"))) as server:
        assert Endpoint(server.url, "m", "abcdef\n").ask(ASK) == "yes"
    assert server.headers[0]["Authorization"] == "Bearer abcdef"


def test_secrets_in_the_address_are_sent_and_never_shown(caplog, tmp_path: Path) -> None:
    caplog.set_level(logging.DEBUG)
    with serving(lambda h, b: h.send(f"no: {h.headers['Authorization']} {h.path}", 401)) as server:
        base = server.url.replace("http://", "http://ann:pass%2Fwort@") + "?api-key=verborgen99&v=2"
        endpoint = Endpoint(base, "m", cache=tmp_path)
        with pytest.raises(InputError, match="answers 401") as caught:
            endpoint.ask(ASK)
        assert server.paths == ["/v1/chat/completions?api-key=verborgen99&v=2"]
        assert server.headers[0]["Authorization"] == "Basic YW5uOnBhc3Mvd29ydA=="
    for text in (str(caught.value), repr(endpoint), endpoint.shown, caplog.text):
        for secret in ("wort", "verborgen99", "YW5u"):
            assert secret not in text


# --- addresses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    ["ftp://x/v1", "file:///etc/passwd", "localhost:8000/v1", "http://", "http:///v1", "//host/v1", "https://h:99999/v1",
     "http://h:x/v1", "http://a b/v1", "http://h\n/v1", "http://[::1/v1", "unix:///run/x", "gopher://h", " ", "http://h:0/"],
)  # fmt: skip
def test_addresses_that_are_none_are_refused(address: str) -> None:
    with pytest.raises(InputError, match="http or https address"):
        Endpoint(address, "m")


def test_a_refused_address_does_not_show_its_password() -> None:
    for address in ("ftp://ann:passwort@h/v1", "http://ann:passwort@h:x/v1", "http://h:x/v1?key=passwort"):
        with pytest.raises(InputError) as caught:
            Endpoint(address, "m")
        assert "passwort" not in str(caught.value)


def test_a_whole_address_or_a_slash_at_its_end_is_the_same() -> None:
    with serving(always(says("yes"))) as server:
        for end in ("", "/", "/chat/completions", "/chat/completions/"):
            Endpoint(server.url + end, "m").ask(ASK)
    assert set(server.paths) == {"/v1/chat/completions"}


def test_the_proxy_of_the_environment_is_used(monkeypatch) -> None:
    with serving(always(says("by way of a proxy"))) as proxy:
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, proxy.url.removesuffix("/v1"))
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        assert Endpoint("http://llm.example/v1?k=4444", "m").ask(ASK) == "by way of a proxy"
    assert proxy.paths == ["http://llm.example/v1/chat/completions?k=4444"]


@pytest.mark.parametrize("proxy", ["socks9://x", "nonsense://", "http://["])
def test_a_proxy_that_is_none_is_one_sentence(proxy: str, monkeypatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises((InputError, NotFoundError)):
        Endpoint("http://llm.example/v1", "m", tries=1).ask(ASK)


def test_who_is_not_there_and_who_speaks_no_tls() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        with pytest.raises(NotFoundError, match=r"gave no answer in 2 tries.*refused"):
            Endpoint(f"http://127.0.0.1:{port}/v1", "m", tries=2, wait=0).ask(ASK)
    with pytest.raises(NotFoundError, match="gave no answer"):
        Endpoint("http://no-such-host.invalid/v1", "m", tries=1).ask(ASK)
    with serving(always(says("x"))) as server, pytest.raises(NotFoundError, match="gave no answer"):
        Endpoint(server.url.replace("http:", "https:"), "m", tries=1).ask(ASK)


# --- bounds ---------------------------------------------------------------------------------------------------------


def endless_body(handler: Handler, body: dict) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b" " * 2**16)


def dripping_body(handler: Handler, body: dict) -> None:
    handler.send_response(200)
    handler.end_headers()
    handler.drip(b" " * 10_000)


def dripping_head(handler: Handler, body: dict) -> None:
    handler.drip(b"HTTP/1.1 200 OK\r\nX-Long: " + b"a" * 10_000)


def endless_head(handler: Handler, body: dict) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        handler.wfile.write(b"X-More: " + b"a" * 1000 + b"\r\n")


def endless_continue(handler: Handler, body: dict) -> None:
    while True:
        handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")


def silence(handler: Handler, body: dict) -> None:
    time.sleep(3)


def dripping_error(handler: Handler, body: dict) -> None:
    handler.send_response(400)
    handler.end_headers()
    handler.drip(b"no " * 10_000)


def gzip_bomb(handler: Handler, body: dict) -> None:
    handler.send(gzip.compress(b" " * (20 * MOST_BYTES)), Content_Encoding="gzip")


def bomb_of_an_error(handler: Handler, body: dict) -> None:
    handler.send(zlib.compress(b"no " * 2**24), 400, Content_Encoding="deflate")


def too_much_of_an_error(handler: Handler, body: dict) -> None:
    handler.send_response(400)
    handler.end_headers()
    while True:
        handler.wfile.write(b"no " * 2**14)


@pytest.mark.parametrize(
    "answer",
    [endless_body, dripping_body, dripping_head, endless_head, endless_continue, silence, dripping_error, gzip_bomb,
     bomb_of_an_error, too_much_of_an_error],
)  # fmt: skip
def test_an_answer_without_end_ends(answer: Callable[[Handler, dict], None]) -> None:
    begin = time.monotonic()
    with serving(answer) as server, pytest.raises((NotFoundError, InputError, BadAnswer)):
        Endpoint(server.url, "m", tries=1, timeout=1.0).ask(ASK)
    assert time.monotonic() - begin < 2.5


@pytest.mark.parametrize(
    "raw",
    [
        b"hello",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nZZZ\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 7\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nX: \x00\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
        b"HTTP/1.1 999 \x1b[31m\r\nContent-Length: 0\r\n\r\n",
        b'HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: {"choices": []}\n\ndata: [DONE]\n\n',
        b"HTTP/1.1 200 OK\r\n\r\n<html>log in</html>",
        b'HTTP/1.1 200 OK\r\n\r\n{"choices":[{"message":{"content":"x"}}],"usage":' + b"9" * 5000 + b"}",
    ],
    ids=range(11),
)
def test_what_is_no_answer_of_http_or_no_json_is_one_sentence(raw: bytes) -> None:
    def answer(handler: Handler, body: dict) -> None:
        handler.close_connection = True
        handler.wfile.write(raw)

    with serving(answer) as server, pytest.raises((NotFoundError, InputError, BadAnswer)) as caught:
        Endpoint(server.url, "m", KEY, tries=1, timeout=2.0).ask(ASK)
    assert "\n" not in str(caught.value)
    assert "geheim" not in str(caught.value)


def test_packed_answers_are_unpacked_and_unknown_packing_refused() -> None:
    raw = json.dumps(says("packed")).encode()
    for data, name in ((gzip.compress(raw), "gzip"), (zlib.compress(raw), "deflate"), (raw, "identity")):
        with serving(always(data, Content_Encoding=name)) as server:
            assert Endpoint(server.url, "m").ask(ASK) == "packed"
    for name in ("br", "zstd", "gzip, gzip", "x" * 1000):
        with serving(always(raw, Content_Encoding=name)) as server, pytest.raises(BadAnswer, match="packs its answer"):
            Endpoint(server.url, "m").ask(ASK)
    with (
        serving(always(b"\x1f\x8bnot gzip", Content_Encoding="gzip")) as server,
        pytest.raises(NotFoundError) as caught,
    ):
        Endpoint(server.url, "m", tries=1).ask(ASK)
    assert "unpacked" in str(caught.value)


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}"), ("[", ""), ('["' + "[" * 9 + '",', "]")])
def test_json_is_not_parsed_where_it_nests_deep(opening: str, closing: str) -> None:
    deep = opening * 200_000 + "0" + closing * 200_000
    with serving(always(deep)) as server, pytest.raises(BadAnswer, match="nested deeper"):
        Endpoint(server.url, "m", tries=1).ask(ASK)


def test_brackets_in_texts_are_no_nesting() -> None:
    assert not costly(json.dumps(says("[" * 1000 + '\\"' + "{" * 1000)).encode())
    assert not costly(b"[" * DEEPEST + b"]" * DEEPEST)
    assert costly(b"[" * (DEEPEST + 1))
    assert costly(b"[" + b"[]," * 200_000 + b"0]")
    with serving(always(says("[" * 1000))) as server:
        assert Endpoint(server.url, "m").ask(ASK) == "[" * 1000


@pytest.mark.parametrize(
    "value",
    ["²", "٣", "-1", "-99999999999", "1e9", "inf", "nan", "", "soon", "0x10", "1_0", "9" * 30, "+5", "1;2", "1, 2",
     "Thu, 01 Jan 1970 00:00:00 GMT", "Thu, 99 Foo 2026 25:61:00 GMT", "\x1b[31m", "9" * 5000],
)  # fmt: skip
def test_odd_waits_are_not_believed(value: str) -> None:
    assert _retry_after(value, 0.25) == 0.25


def test_waits_are_believed_up_to_a_minute() -> None:
    assert [_retry_after(v, 9.0) for v in ("0", " 3 ", "1.5", "999999999")] == [0.0, 3.0, 1.5, LONGEST_WAIT]
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=20), usegmt=True)
    assert 15 < _retry_after(later, 9.0) <= 20
    assert _retry_after(format_datetime(datetime.now(UTC) + timedelta(days=9999), usegmt=True), 9.0) == LONGEST_WAIT


@pytest.mark.parametrize("header", ["²".encode(), b"-5", b"\xff\xfe", b"1e400"])
def test_a_strange_wait_of_a_server_does_not_end_the_asking(header: bytes) -> None:
    def answer(handler: Handler, body: dict) -> None:
        if len(handler.server.bodies) > 1:
            return handler.send(says("now"))
        handler.wfile.write(b"HTTP/1.1 429 Slow\r\nContent-Length: 0\r\nRetry-After: " + header + b"\r\n\r\n")
        return None

    with serving(answer) as server:
        assert Endpoint(server.url, "m", wait=0.001).ask(ASK) == "now"


def test_all_tries_together_have_an_end() -> None:
    begin = time.monotonic()
    with serving(always("", 503, Retry_After="50")) as server, pytest.raises(NotFoundError, match=r"0\.5 seconds"):
        Endpoint(server.url, "m", tries=100, patience=0.5).ask(ASK)
    assert time.monotonic() - begin < 2


@pytest.mark.parametrize(
    "options",
    [{"timeout": 0}, {"timeout": float("nan")}, {"timeout": float("inf")}, {"tries": 0}, {"wait": -1},
     {"concurrency": 0}, {"concurrency": 10**9}, {"patience": -1}],
)  # fmt: skip
def test_numbers_that_can_not_be_are_refused(options: dict) -> None:
    with pytest.raises(InputError):
        Endpoint("http://localhost/v1", "m", **options)


# --- answers --------------------------------------------------------------------------------------------------------

BAD: dict[str, object] = {
    "null": says(None),
    "a number": says(7),
    "true": says(True),
    "an object": says({"content": {"text": "x"}}),
    "no content": says({}),
    "a refusal": says({"content": None, "refusal": "I can't help with \x1b[31mthat"}),
    "parts without text": says([{"type": "image_url", "image_url": {}}]),
    "parts with wrong text": says([{"type": "text", "text": 3}]),
    "no parts": says([]),
    "parts of parts": says([[{"type": "text", "text": "x"}]]),
    "no choices": {"choices": []},
    "null choices": {"choices": None},
    "choices of nothing": {"choices": [None]},
    "choices as a text": {"choices": "yes"},
    "choices as an object": {"choices": {"0": {}}},
    "no message": {"choices": [{"text": "old"}]},
    "message as a text": {"choices": [{"message": "hello"}]},
    "an error with status 200": {"error": {"message": "overloaded"}},
    "nothing": {},
    "a list": b"[1]",
    "a text": b'"hello"',
    "null itself": b"null",
}


@pytest.mark.parametrize("way", BAD)
def test_a_bad_answer_is_one_sentence_asked_again_where_it_is_judged_and_never_kept(way: str, tmp_path: Path) -> None:
    with serving(lambda h, b: h.send(BAD[way] if len(h.server.bodies) % 2 else says("fine"))) as server:  # type: ignore
        endpoint = Endpoint(server.url, "m", cache=tmp_path)
        with pytest.raises(BadAnswer, match="no chat completion"):
            endpoint.ask(ASK)
        assert not list(tmp_path.iterdir())
        server.bodies.clear()
        assert endpoint.ask(ASK, lambda text: text == "fine") == "fine"
        assert len(server.bodies) == 2
        assert endpoint.spent.unusable == 2
        assert endpoint.ask(ASK) == "fine"
        assert endpoint.spent.cached == 1


def test_one_bad_answer_of_many_is_one_bad_answer(tmp_path: Path) -> None:
    many = [[{"role": "user", "content": str(i)}] for i in range(6)]
    with serving(lambda h, b: h.send(says(None if b["messages"][0]["content"] == "3" else "ok"))) as server:
        found = Endpoint(server.url, "m", concurrency=2).ask_many(many, fits=lambda i, text: text == "ok")
        assert [isinstance(one, BadAnswer) for one in found] == [i == 3 for i in range(6)]
        assert len(server.bodies) == 7


def test_parts_are_joined_and_thoughts_left_out() -> None:
    parts = [{"type": "reasoning", "text": "hm"}, {"type": "text", "text": "NAME: "}, {"type": "text", "text": "cats"}]
    with serving(always(says(parts))) as server:
        assert Endpoint(server.url, "m").ask(ASK) == "NAME: cats"
    for text, said in (
        ("<think>NAME: wrong</think>\nNAME: right", "NAME: right"),
        ("NAME: wrong</think>\n\nNAME: right", "NAME: right"),
        ("<think>a</think><think>b</think> c", "c"),
        ("<thinking>a</thinking> c", "c"),
        ("<think>never ends NAME: x", ""),
        ("a text with < and > and think", "a text with < and > and think"),
        ("  kept as it is \n", "  kept as it is \n"),
    ):
        assert spoken(text) == said


def test_of_an_answer_that_was_cut_off_whole_lines_count(tmp_path: Path) -> None:
    def fits(text: str) -> bool:
        return "NAME:" in text

    cut = {"finish_reason": "length"}
    with serving(
        lambda h, b: h.send(says("NAME: half a na", **cut) if b["max_tokens"] < 40 else says("NAME: all"))
    ) as s:
        assert Endpoint(s.url, "m", cache=tmp_path).ask(ASK, fits, max_tokens=10) == "NAME: all"
        assert [body["max_tokens"] for body in s.bodies] == [10, 40]
        assert Endpoint(s.url, "m", cache=tmp_path).ask(ASK, fits, max_tokens=10) == "NAME: all"
        assert Endpoint(s.url, "m").ask(ASK, max_tokens=10) == "NAME: half a na"
    with serving(always(says("NAME: all\nbecause", **cut))) as s:
        assert Endpoint(s.url, "m").ask(ASK, fits, max_tokens=10) == "NAME: all"
    with serving(always(says("NAME: half", **cut))) as s, pytest.raises(BadAnswer, match="cut off"):
        Endpoint(s.url, "m").ask(ASK, fits, max_tokens=10)


def newer(refuses: tuple[str, ...], param: bool, status: int = 400) -> Callable[[Handler, dict], None]:
    """A server that takes neither of these fields, and names one at a time."""

    def answer(handler: Handler, body: dict) -> None:
        for name in refuses:
            if name in body:
                error = {"message": f"Unsupported: '{name}' is not supported with this model.", "type": "invalid"}
                return handler.send({"error": error | ({"param": name} if param else {})}, status)
        return handler.send(says("yes"))

    return answer


@pytest.mark.parametrize("param", [True, False])
@pytest.mark.parametrize("refuses", [("max_tokens",), ("temperature",), ("max_tokens", "temperature")])
def test_a_newer_server_is_asked_in_its_own_words_and_that_is_remembered(refuses: tuple[str, ...], param: bool) -> None:
    with serving(newer(refuses, param)) as server:
        endpoint = Endpoint(server.url, "m", tries=1)
        for _ in range(3):
            assert endpoint.ask(ASK, temperature=0.0, max_tokens=5) == "yes"
        assert len(server.bodies) == 3 + len(refuses)
        last = server.bodies[-1]
        assert last.get("max_completion_tokens") == (5 if "max_tokens" in refuses else None)
        assert ("temperature" in last) is ("temperature" not in refuses)


def test_what_does_not_help_is_not_remembered_nor_tried_for_ever() -> None:
    with serving(always({"error": {"message": "max_tokens and temperature are too large"}}, 422)) as server:
        endpoint = Endpoint(server.url, "m")
        with pytest.raises(Refused, match="too large"):
            endpoint.ask(ASK, temperature=0.0, max_tokens=5)
        assert len(server.bodies) == 3
        assert not endpoint.changes
    with serving(always({"error": {"message": "no temperature here", "param": "messages"}}, 400)) as server:
        with pytest.raises(Refused):
            Endpoint(server.url, "m").ask(ASK, temperature=0.0)
        assert len(server.bodies) == 1


@pytest.mark.parametrize(
    "usage", [{"total_tokens": -(10**6)}, {"total_tokens": 10**30}, {"total_tokens": True}, {"total_tokens": "9"},
              {"total_tokens": 1.5}, {"total_tokens": None}, {"total_tokens": 0}, None, [], "x", {}]
)  # fmt: skip
def test_no_count_of_a_server_undoes_the_budget(usage: object) -> None:
    with serving(always({**says("yes"), "usage": usage})) as server:
        endpoint = Endpoint(server.url, "m", max_tokens=100, concurrency=1)
        many = [[{"role": "user", "content": f"{i}"}] for i in range(50)]
        assert None in endpoint.ask_many(many)
        with pytest.raises(BudgetSpent, match="100 tokens"):
            endpoint.ask(ASK)
        assert 100 <= endpoint.spent.tokens < 300


def test_bad_answers_cost_tokens_too() -> None:
    with serving(always(says(None))) as server:
        endpoint = Endpoint(server.url, "m")
        with pytest.raises(BadAnswer):
            endpoint.ask(ASK)
    assert endpoint.spent.tokens == 7


# --- at once --------------------------------------------------------------------------------------------------------


def test_one_failure_does_not_wait_for_the_rest() -> None:
    def answer(handler: Handler, body: dict) -> None:
        if body["messages"][0]["content"] != "0":
            time.sleep(3)
        handler.send("no", 401)

    begin = time.monotonic()
    many = [[{"role": "user", "content": str(i)}] for i in range(50)]
    with serving(answer) as server:
        with pytest.raises(InputError, match="401"):
            Endpoint(server.url, "m", concurrency=4).ask_many(many)
        assert time.monotonic() - begin < 2
        assert len(server.bodies) <= 5
