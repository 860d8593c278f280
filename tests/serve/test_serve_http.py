"""The field on its way: bodies in, activations out, recipes in a folder; with vLLM itself in engine/test_http.py."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import qwen_scope
from qwen_scope import Intervention, load_scope
from qwen_scope.errors import FormatError, InputError, MismatchError, NotFoundError, QwenScopeError
from qwen_scope.serve import FIELD, Admission, Ask, ModelFacts, ServeSettings, answers
from qwen_scope.serve.http import MOST_BYTES, Middleware
from qwen_scope.serve.phases import chat_kinds
from qwen_scope.steer import Recipe, signature
from qwen_scope.text import PHASES

LAB_FOLDER = Path(qwen_scope.__file__).parent / "assets" / "lab" / "model"
ADD = {"hook_point": "layers.4.resid_post", "op": "add", "feature": 17, "amount": 1.0}


@pytest.fixture(scope="module")
def scope():
    return load_scope("lab", device="cpu")


@pytest.fixture
def admission(scope, tmp_path) -> Admission:
    settings = ServeSettings(
        sae=str(scope.saes.source), layers=(4, 5), feature_layers=(4,), read_layers=(4,), recipes=str(tmp_path / "r")
    )
    return Admission(settings, ModelFacts(6, 128, torch.float32, 512, signature(scope.model)))


@pytest.fixture
def recipe(scope) -> Recipe:
    return Recipe.of("mine", scope.model, [Intervention.add(layer=4, feature=17, amount=2.0)], scope.saes)


class Server:
    """A server behind the middleware: keeps the body it was given and gives what it was told to."""

    def __init__(self, admission: Admission, *, pieces: tuple[bytes, ...] = (b"{}",), kind: str = "application/json"):
        config = SimpleNamespace(model_config=SimpleNamespace(tokenizer=str(LAB_FOLDER)))
        config.__dict__["_qwen_scope_admission"] = admission
        engine = SimpleNamespace(vllm_config=config, collective_rpc=self.rpc)
        self.state = SimpleNamespace(state=SimpleNamespace(engine_client=engine))
        self.pieces, self.kind = pieces, kind
        self.body: Any = None
        self.asked: list[tuple[str, tuple]] = []
        self.read: list[Any] = [None]

    async def rpc(self, method: str, args: tuple) -> list[Any]:
        self.asked.append((method, args))
        return self.read

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        self.body = json.loads((await receive())["body"])
        headers = [(b"content-type", self.kind.encode()), (b"content-length", b"2")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for i, piece in enumerate(self.pieces, 1):
            await send({"type": "http.response.body", "body": piece, "more_body": i < len(self.pieces)})

    def post(self, body: bytes | dict, path: str = "/v1/completions") -> tuple[int, bytes]:
        """The status and the body of the answer; checks the length that it states."""
        given = body if isinstance(body, bytes) else json.dumps(body).encode()
        parts = [given[:5], given[5:]]
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": path, "app": self.state,
                 "headers": [(b"content-type", b"application/json")]}  # fmt: skip
        asyncio.run(Middleware(self.app)(scope, receive, send))
        answer = b"".join(one.get("body", b"") for one in sent)
        if b"event-stream" not in self.kind.encode():
            assert dict(sent[0]["headers"])[b"content-length"] == str(len(answer)).encode() or self.asked == []
        return sent[0]["status"], answer


def test_a_body_without_the_field_passes_as_it_is(admission) -> None:
    server = Server(admission)
    body = {"model": "lab", "prompt": "\u2028 x", "n": "odd"}
    assert server.post(body) == (200, b"{}")
    assert server.body == body


def test_the_field_goes_into_vllm_xargs(admission) -> None:
    server = Server(admission)
    body = {"prompt": "x", "vllm_xargs": {"other": 1}, FIELD: {"interventions": [ADD]}}
    assert server.post(body) == (200, b"{}")
    text = server.body["vllm_xargs"].pop(FIELD)
    assert server.body == {"prompt": "x", "vllm_xargs": {"other": 1}}
    assert Ask.from_text(text) == Ask(interventions=(Intervention.from_json(ADD),))
    assert server.post({"prompt": "x", FIELD: {}}) == (200, b"{}")
    assert server.body == {"prompt": "x"}


def test_a_recipe_is_taken_as_it_stands(admission, recipe) -> None:
    admission.library.write("mine", json.dumps(recipe.to_json()).encode())
    server = Server(admission)
    server.post({"prompt": "x", FIELD: {"recipe": "mine"}})
    assert Ask.from_text(server.body["vllm_xargs"][FIELD]).interventions == recipe.interventions


def test_activations_come_by_choice_and_once(admission) -> None:
    layer = {"positions": [0], "features": [[3]], "values": [[1.5]]}
    server = Server(admission, pieces=(b'{"id": ', b'"a"}'))
    server.read = [
        {"cmpl-ab-cd-1-0a1b2c3d": {"4": layer}, "2_cmpl-ab-cd-0-0a1b2c3d": {"4": layer}},
        {"cmpl-ab-cd-1-0a1b2c3d": {"5": layer}},  # another rank of a pipeline
    ]
    status, answer = server.post({"prompt": ["x", "y"], "n": 3, FIELD: {"read": {"layers": [4]}}})
    assert (status, json.loads(answer)) == (
        200,
        {"id": "a", FIELD: {"activations": [
            {"choice": 2, "layers": {"4": layer}}, {"choice": 3, "layers": {"4": layer, "5": layer}}]}},
    )  # fmt: skip
    ticket = Ask.from_text(server.body["vllm_xargs"][FIELD]).ticket
    assert len(ticket) == 32
    assert server.asked == [("qwen_scope_take", (ticket,))]


WATCH = {"name": "w", "features": {"4/3": 0.5}}
ALARM = {"watch": "w", "position": 7, "then": "mark", "because": {"4/3": 0.75}}


def test_alarms_come_by_choice(admission, recipe) -> None:
    admission.library.write("mine", json.dumps(recipe.to_json()).encode())
    server = Server(admission)
    server.read = [{"1_cmpl-ab-0-0a1b2c3d": [ALARM], "cmpl-ab-0-0a1b2c3e": [{**ALARM, "position": 9}, ALARM]}, None]
    status, answer = server.post({"prompt": "x", "n": 2, FIELD: {"recipe": "mine", "watch": [WATCH]}})
    listed = [(one["choice"], one["position"]) for one in json.loads(answer)[FIELD]["alarms"]]
    assert (status, listed) == (200, [(0, 7), (0, 9), (1, 7)])
    ask = Ask.from_text(server.body["vllm_xargs"][FIELD])
    assert server.asked == [("qwen_scope_alarms", (ask.ticket,))]
    assert (ask.label, ask.interventions, [one.name for one in ask.watch]) == ("mine", recipe.interventions, ["w"])


def test_a_server_that_watches_marks_answers_without_the_field(admission, tmp_path) -> None:
    (tmp_path / "watch.json").write_text(json.dumps({"version": 1, "watch": [WATCH]}))
    server = Server(Admission(replace(admission.settings, watch=str(tmp_path / "watch.json")), admission.facts))
    server.read = [{"chatcmpl-ab-0a1b2c3d": [ALARM]}]
    _, answer = server.post({"messages": [{"role": "user", "content": "Hi"}]}, "/v1/chat/completions")
    assert json.loads(answer)[FIELD] == {"alarms": [{"choice": 0, **ALARM}]}
    ask = Ask.from_text(server.body["vllm_xargs"][FIELD])
    assert ask.watch == ()  # admission adds those of the server, so that nobody's request is without
    assert PHASES[int(ask.phases.tokens[-1])] == "answer"
    tools = {"messages": [{"role": "user", "content": "Hi"}], "tools": [{"type": "function"}]}
    assert server.post(tools, "/v1/chat/completions")[0] == 200
    assert Ask.from_text(server.body["vllm_xargs"][FIELD]).phases is None
    assert server.post({"input": "x"}, "/v1/embeddings") == (200, b"{}")
    assert server.body == {"input": "x"}


def test_a_stream_has_them_before_its_end(admission) -> None:
    said = b'data: {"id":"a","model":"m","choices":[{"text":"data: [DONE]"}]}\n\n'  # a text is not the end
    pieces = (said, b"data: [DONE]\n\n")
    server = Server(admission, pieces=pieces, kind="text/event-stream; charset=utf-8")
    server.read = [{"chatcmpl-ab-0a1b2c3d": {"4": {}}}]
    _, answer = server.post({"stream": True, FIELD: {"read": {"layers": [4]}}}, "/v1/chat/completions")
    first, event, done, end = answer.split(b"\n\n")
    assert (first + b"\n\n", done + b"\n\n", end) == (*pieces, b"")
    assert json.loads(event.removeprefix(b"data: ")) == {
        "id": "a", "model": "m", "choices": [], FIELD: {"activations": [{"choice": 0, "layers": {"4": {}}}]}
    }  # fmt: skip


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({FIELD: 5}, "is an object with keys, not 5"),
        ({FIELD: {"recipe": "nope"}}, "there is no recipe 'nope'"),
        ({FIELD: {"ticket": "mine", "read": {"layers": [4]}}}, "has no key 'ticket'"),
        ({FIELD: {"interventions": [ADD]}, "use_beam_search": True}, "beam search is not served"),
        ({"vllm_xargs": {FIELD: "{}"}, "use_beam_search": True}, "beam search is not served"),
        ({FIELD: {}, "vllm_xargs": {FIELD: "{}"}}, "leave one away"),
        ({FIELD: {}, "vllm_xargs": 5}, "vllm_xargs is an object"),
        (b'{"qwen_scope": {}, "qwen_scope": {"recipe": "mine"}}', "the key 'qwen_scope' twice"),
        (b'{"qwen\\u005fscope": {"recipe": "nope"}}', "there is no recipe"),
        (json.dumps({FIELD: {"recipe": "nope"}}).encode("utf-16"), "there is no recipe"),
        (b'{"qwen_scope": ' + b"[" * 100_000, "can't be read as JSON"),
        (b'{"qwen_scope": {"recipe": "' + b"x" * MOST_BYTES + b'"}}', "are read with this field"),
    ],
)
def test_refusals_are_one_sentence_and_reach_no_server(admission, body, says) -> None:
    server = Server(admission)
    status, answer = server.post(body)
    message = json.loads(answer)["error"]["message"]
    assert (status, server.body) == (400, None)
    assert says in message
    assert "\n" not in message


@pytest.mark.parametrize("path", ["/v1/responses", "/tokenize", "/v1/completions/"])
def test_elsewhere_the_field_is_refused(admission, path) -> None:
    status, answer = Server(admission).post({FIELD: {"interventions": [ADD]}}, path)
    assert status == 400
    assert b"it is served at" in answer


def test_recipes_are_kept_only_where_they_fit(admission, recipe) -> None:
    library, data = admission.library, recipe.to_json()
    assert library.names() == []
    assert library.write("mine", json.dumps(data).encode()).interventions == recipe.interventions
    assert library.names() == ["mine"]
    assert library.read("mine").name == "mine"
    one = data["interventions"][0]
    wrong: list[tuple[type[QwenScopeError], dict]] = [
        (MismatchError, {**data, "model": "llama, 6 layers of 128"}),
        (NotFoundError, {**data, "interventions": [{**one, "hook_point": "layer3"}]}),
        (InputError, {**data, "interventions": [{**one, "sae": None, "feature": 9999}]}),
        (FormatError, {**data, "version": 2}),
    ]
    for kind, made in wrong:
        with pytest.raises(kind):
            library.write("other", json.dumps(made).encode())
    for name in ("../x", "a/b", ".x", "", "x" * 300, "a\nb"):
        for call in (library.read, library.delete, lambda name: library.write(name, b"{}")):
            with pytest.raises(InputError, match="a recipe names one file or folder"):
                call(name)
    with pytest.raises(FormatError, match="too large"):
        library.write("other", b" " * 9_000_000)
    assert library.names() == ["mine"]
    library.delete("mine")
    with pytest.raises(NotFoundError, match="no recipe 'mine'"):
        library.read("mine")


def test_phases_of_a_chat_are_those_of_the_toolkit(scope) -> None:
    ask = Ask(interventions=(Intervention.add(layer=4, feature=17, amount=1.0, where="user"),))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is the station?"}]
    tokens = scope.tokenize([messages], chat="default")
    kinds = chat_kinds(ask, {"messages": messages}, scope.tokenizer)
    assert kinds.tokens.tolist() == tokens.phases(0)[1].tolist()
    assert {PHASES[one] for one in kinds.tokens} >= {"system", "user"}
    assert (kinds.chat, kinds.first) == ("default", tokens.rendered[0].next_phase)
    for body in (
        {"messages": messages, "tools": [{}]},
        {"messages": messages, "chat_template": "x"},
        {"messages": messages, "chat_template_kwargs": {"odd": 1}},
        {"messages": messages, "add_generation_prompt": False},
        {"messages": []},
        {},
    ):
        with pytest.raises(InputError):
            chat_kinds(ask, body, scope.tokenizer)
    parts = [{"type": "text", "text": text} for text in ("Where is ", "the station?")]
    with pytest.raises(InputError, match="where the content of each message is one text; join its parts"):
        chat_kinds(ask, {"messages": [messages[0], {"role": "user", "content": parts}]}, scope.tokenizer)


def test_names_of_requests_tell_their_choice() -> None:
    assert answers.choice_of("cmpl-9-8-7-2-0123abcd", 1) == 2
    assert answers.choice_of("3_cmpl-9-8-7-2-0123abcd", 4) == 11
    assert answers.choice_of("1_chatcmpl-9f8e-0123abcd", 4) == 1
    with pytest.raises(FormatError, match="tells no choice"):
        answers.choice_of("resp_1", 1)
