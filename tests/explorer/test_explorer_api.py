"""The HTTP API, called by gradio_client as anybody would; and what the page does not let through."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from explored import ENGLISH, GERMAN, HOSTILE, LAYER, client_of, served
from gradio_client import Client
from gradio_client.exceptions import AppError, AuthenticationError

from qwen_scope.errors import InputError
from qwen_scope.explorer import Api, AppState, Limits, launch
from qwen_scope.scope import TokenFeatures
from qwen_scope.steer import Decoding, Intervention

CHANGE = {"layer": LAYER, "feature": 7, "amount": 0.5}


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Client]:
    with client_of(url) as made:
        yield made


def test_the_api_has_these_endpoints_and_no_other(client: Client) -> None:
    found = client.view_api(return_format="dict", print_info=False)
    assert isinstance(found, dict)
    names = ("info", "features", "compare", "feature", "positions", "steer", "sweep", "analyze")
    assert sorted(found["named_endpoints"]) == sorted(f"/{name}" for name in names)
    assert found["unnamed_endpoints"] == {}


def test_info_names_no_path_of_the_machine(client: Client, state: AppState) -> None:
    told = client.predict(api_name="/info")
    assert told["layers"] == state.layers
    assert told["stores"] == ["german", "english"]
    assert "/" not in told["model"] + told["sae"]


def test_features_are_those_of_the_scope(client: Client, state: AppState) -> None:
    told = client.predict(HOSTILE, LAYER, api_name="/features")
    seen = state.scope.features([HOSTILE], [LAYER])
    assert "".join(one["token"] for one in told["tokens"]) == HOSTILE
    for i, one in enumerate(told["tokens"]):
        assert [f for f, _ in one["features"]] == seen.of(0, LAYER).indices[i][:10].tolist()
    assert [one["feature"] for one in told["strongest"]] == [s.feature for s in seen.strongest(0, LAYER, 10)]
    assert told == Api(state).features(HOSTILE, LAYER)


def test_compare_is_that_of_the_scope(client: Client, state: AppState) -> None:
    told = client.predict(GERMAN[:2], ENGLISH, [LAYER], 3, ["common"], api_name="/compare")
    found = state.scope.compare(GERMAN[:2], ENGLISH, [LAYER], n=3, drop_common=True)[LAYER]
    assert [(one["feature"], one["difference"]) for one in told] == [(c.feature, c.difference) for c in found]


def test_steering_is_that_of_the_scope(client: Client, state: AppState) -> None:
    told = client.predict("[12:30] Anna:", [CHANGE], {"max_new_tokens": 6}, api_name="/steer")
    change = Intervention.add(layer=LAYER, feature=7, amount=0.5, unit="resid_norm")
    how = Decoding(max_new_tokens=6)
    assert told["unsteered"]["text"] == state.scope.generate("[12:30] Anna:", decoding=how).text
    assert told["steered"]["text"] == state.scope.generate("[12:30] Anna:", [change], decoding=how).text
    for one in told["steered"]["tokens"]:
        assert len(one["candidates"]) == 10
        assert dict(one["candidates"]).get(one["token"], one["probability"]) == pytest.approx(one["probability"])


def test_positions_and_one_feature(client: Client, state: AppState) -> None:
    told = client.predict("Where is it?", "0,2-9", api_name="/positions")
    assert told["changed"] == [i == 0 or i >= 2 for i in range(len(told["tokens"]))]
    busiest = state.scope.features(GERMAN, [LAYER]).strongest(0, LAYER, 1)[0].feature
    page = client.predict(LAYER, busiest, "german", api_name="/feature")
    assert page["summary"]["feature"] == busiest
    assert page["store"] == "german"
    assert page["strongest"]


def test_analyses_of_stores(client: Client) -> None:
    told = client.predict("overlap", ["german", "english"], LAYER, api_name="/analyze")
    assert json.dumps(told)


@pytest.mark.slow
def test_a_sweep(client: Client) -> None:
    told = client.predict(
        ["[12:30] Anna:", "[08:10] Paul:"], [CHANGE], "script", "LATIN", {"max_new_tokens": 4}, api_name="/sweep"
    )
    assert told["doses"][0]["amount"] == 0
    assert len(told["doses"]) > 5


@pytest.mark.parametrize(
    ("endpoint", "arguments", "says"),
    [
        ("/features", ("", LAYER), "the text is empty"),
        ("/features", ("Hello", 77), "no SAE for layer 77"),
        ("/feature", (LAYER, 999_999), "there is no feature 999999"),
        ("/feature", (LAYER, 1, "/etc"), "there is no store"),
        ("/compare", ([], ["x"]), "leave one side empty"),
        ("/positions", ("Hello", "7-3"), "runs backwards"),
        ("/steer", ("Hello", [{**CHANGE, "amount": "much"}]), "give the amount"),
        ("/steer", ("Hello", [{**CHANGE, "where": "<b>here</b>"}]), "&lt;b&gt;here"),
        ("/steer", ("Hello", [CHANGE], {"max_new_tokens": 100_000}), "up to 300 tokens"),
        ("/steer", ("Hello", [CHANGE], {"temprature": 0.5}), "no key"),
        ("/steer", ("Hello", [{**CHANGE, "unti": "raw"}]), "an intervention has no key"),
        ("/analyze", ("rm", ["german"], LAYER), "there is no analysis"),
        ("/analyze", ("drift", ["german"], LAYER), "at least 2 stores"),
    ],
)
def test_errors_are_sentences(client: Client, endpoint: str, arguments: tuple, says: str) -> None:
    with pytest.raises(AppError) as error:
        client.predict(*arguments, api_name=endpoint)
    assert says in str(error.value)
    assert "Traceback" not in str(error.value)


def burst(url: str, texts: list[str]) -> list[str]:
    """Queue all texts before the first answer is fetched; what the answers are about, in the order of the texts."""
    route, answers = f"{url}gradio_api/call/features", []
    with httpx.Client(timeout=300) as visitor:
        events = [visitor.post(route, json={"data": [text, LAYER, "plain", 1]}).json()["event_id"] for text in texts]
        for event in events:
            told = visitor.get(f"{route}/{event}").text
            data = next(line for line in told.splitlines() if line.startswith("data: [{"))
            answers.append("".join(one["token"] for one in json.loads(data.removeprefix("data: "))[0]["tokens"]))
    return answers


def resident_bytes() -> int:
    """Memory of this process, in which the server runs too."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_bursts_are_answered_in_order_without_growth(state: AppState, monkeypatch: pytest.MonkeyPatch) -> None:
    own = AppState(state.scope, limits=Limits(remembered_bytes=100_000))
    done, seen = [], own.seen

    def watched(text: str, layer: int, chat: str) -> TokenFeatures:
        done.append(("begun", text))
        found = seen(text, layer, chat)
        done.append(("ended", text))
        return found

    monkeypatch.setattr(own, "seen", watched)
    sizes, kept, memory = [], [], []
    with served(own) as url:
        for number in range(4):
            texts = [f"Burst {number}, request {i}: where is the station, please?" for i in range(50)]
            done.clear()
            assert burst(url, texts) == texts
            assert done == [(what, text) for text in texts for what in ("begun", "ended")]
            gc.collect()
            sizes.append(own.remembered_bytes)
            kept.append(sum(isinstance(one, TokenFeatures) for one in gc.get_objects()))
            memory.append(resident_bytes())
    assert max(sizes) <= own.limits.remembered_bytes
    assert max(kept[1:]) <= kept[0] + 5  # 50 more where a request stays
    assert max(memory[1:]) - memory[0] < 200 * 2**20
    assert own.jobs.running == 0
    assert own.scope.saes.nbytes <= own.scope.saes.cache_bytes


def test_visitors_at_once_get_their_own_answers(url: str) -> None:
    def ask(name: str) -> str:
        with client_of(url) as own:
            return "".join(one["token"] for one in own.predict(name, LAYER, api_name="/features")["tokens"])

    names = ["Anna speaks", "Boris speaks", "Chen speaks"]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(ask, names)) == names


def test_no_file_of_the_machine_can_be_read(url: str, stores: dict[str, Path], state: AppState) -> None:
    secrets = [Path("/etc/passwd"), stores["german"] / "manifest.json", Path(__file__), Path.cwd() / "README.md"]
    for path in secrets:
        for route in (f"gradio_api/file={path}", f"file={path}", f"gradio_api/file=//{path}", f"static/../../{path}"):
            answer = httpx.get(url + route)
            assert answer.status_code in (403, 404), (route, answer.status_code)
            assert path.read_text()[:30] not in answer.text


def test_a_path_is_no_upload(url: str) -> None:
    """Handlers of the page that take a file accept what was uploaded, not a path that a client names."""
    with client_of(url) as client:
        config = client.config
    files = {part["id"] for part in config["components"] if part["type"] in ("file", "uploadbutton")}
    asked = [d for d in config["dependencies"] if files & set(d["inputs"])]
    assert len(asked) >= 3
    for dependency in asked:
        data = [
            {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}} if part in files else None
            for part in dependency["inputs"]
        ]
        body = {"fn_index": dependency["id"], "data": data, "session_hash": "thief", "trigger_id": None}
        answer = httpx.post(url + "gradio_api/queue/join", json=body)
        told = ""
        if answer.status_code == 200:
            with httpx.stream("GET", url + "gradio_api/queue/data?session_hash=thief", timeout=60) as stream:
                for line in stream.iter_lines():
                    told += line
                    if "process_completed" in line or "close_stream" in line:
                        break
        assert "root:" not in answer.text + told
        assert '"success":true' not in told.replace(" ", "") or "notice" in told


def uploaded(url: str, name: str, content: bytes) -> httpx.Response:
    return httpx.post(f"{url}gradio_api/upload", files={"files": (name, content)}, timeout=60)


def test_uploads_are_limited_in_size(url: str, state: AppState) -> None:
    assert uploaded(url, "a.txt", b"x" * 100).status_code == 200
    large = uploaded(url, "a.txt", b"x" * (state.limits.upload_bytes * 2))
    assert large.status_code == 413
    assert "exceeded maximum" in large.text


def told_about(url: str, upload: str, kind: str, label: str) -> str:
    """What a handler that takes a file answers about an upload: everything that the server sends."""
    config = httpx.get(f"{url}config").json()
    files = [
        part["id"] for part in config["components"] if part["type"] == kind and label in part["props"].get("label", "")
    ]
    asked = next(d for d in config["dependencies"] if files[0] in d["inputs"])
    file = {"path": upload, "meta": {"_type": "gradio.FileData"}}
    data = [file if part in files else None for part in asked["inputs"]]
    body = {"fn_index": asked["id"], "data": data, "session_hash": "guest", "trigger_id": None}
    joined = httpx.post(f"{url}gradio_api/queue/join", json=body, timeout=60)
    told = joined.text
    with httpx.stream("GET", f"{url}gradio_api/queue/data?session_hash=guest", timeout=60) as stream:
        for line in stream.iter_lines():
            told += line
            if "process_completed" in line or "close_stream" in line:
                break
    return told


@pytest.mark.parametrize(("kind", "label"), [("file", "A text per line"), ("file", "Rule"), ("uploadbutton", "Load")])
def test_uploads_of_another_type_are_refused_with_a_sentence(url: str, kind: str, label: str) -> None:
    upload = uploaded(url, "program.exe", b"MZ\x00\x01").json()[0]
    told = told_about(url, upload, kind, label)
    assert "Invalid file type" in told
    assert "Traceback" not in told
    assert "/" not in told.split("Invalid file type", 1)[1].split('"')[0]


@pytest.mark.slow
def test_with_a_password_nobody_else_enters(state: AppState) -> None:
    with served(state, auth=[("ada", "secret")]) as url:
        with pytest.raises((AuthenticationError, ValueError)):
            Client(url, verbose=False)
        assert httpx.get(url + "config").status_code == 401
        assert httpx.get(url + "gradio_api/info").status_code == 401
        with client_of(url, auth=("ada", "secret")) as client:
            assert client.predict(api_name="/info")["model"] == "lab"


def test_it_listens_on_this_machine_only(url: str, state: AppState) -> None:
    assert url.startswith("http://127.0.0.1:")
    taken = int(url.rstrip("/").rpartition(":")[2])
    with pytest.raises(InputError, match=f"can't listen at 127.0.0.1, port {taken}"):
        launch(state, port=taken, block=False)
