"""What a visitor may send: everything is bounded, what is refused is one sentence, and nobody delays the others."""

from __future__ import annotations

import json
import re
import shutil
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import pytest
from explored import GERMAN, HOSTILE, LAYER, served

from qwen_scope import load_scope
from qwen_scope.errors import InputError, QwenScopeError
from qwen_scope.explorer import Api, AppState, Limits, steering
from qwen_scope.explorer.access.discreet import discreet
from qwen_scope.explorer.look import explore as explore_view
from qwen_scope.explorer.look import feature as feature_view
from qwen_scope.explorer.look import steer as steer_view
from qwen_scope.explorer.look.components import Named, notice
from qwen_scope.explorer.page import build, header
from qwen_scope.explorer.tabs.datasets import analysed, result_panel, trace_panel
from qwen_scope.explorer.tabs.explore import layer_choice
from qwen_scope.features import Label, Notes, make_label
from qwen_scope.scope import model_source
from qwen_scope.stats import Interval

CHANGE = {"layer": LAYER, "feature": 7, "amount": 0.5}
SLOW = r"(?:(?:.|..|...)*)*(?<=\x07)"
BIG = 10**400
NUMBERS = count()


def answer(url: str, endpoint: str, data: Any, timeout: float = 120) -> tuple[str, Any]:
    """The event, `complete` or `error`, and the data that an endpoint answers with."""
    route = f"{url}gradio_api/call/{endpoint}"
    event = httpx.post(route, json={"data": data}, timeout=timeout).raise_for_status().json()["event_id"]
    told = httpx.get(f"{route}/{event}", timeout=timeout).text.splitlines()
    kind, said = next(pair for pair in pairwise(told) if pair[0] in ("event: complete", "event: error"))
    return kind.removeprefix("event: "), json.loads(said.removeprefix("data: "))


@pytest.fixture(scope="module")
def api(state: AppState) -> Api:
    return Api(state)


DEEP: Any = "x"
for _ in range(200):
    DEEP = [DEEP] * 2

REFUSED = [
    ("features", (["a"], LAYER), "the text is empty"),
    ("features", ("x" * 20_001, LAYER), "reads up to 20,000"),
    ("features", ("Hello", BIG), "whole number"),
    ("features", ("Hello", "9" * 400), "whole number"),
    ("features", ("Hello", DEEP), "whole number"),
    ("features", ("Hello", LAYER, DEEP), "one of plain"),
    ("features", ("Hello", LAYER, {}), "one of plain"),
    ("features", ("Hello", LAYER, "plain", -3), "between 1 and 100"),
    ("features", ("Hello", LAYER, "plain", 0), "between 1 and 100"),
    ("features", ("Hello", LAYER, "plain", 10**9), "between 1 and 100"),
    ("compare", ("abc", "def"), "as a list"),
    ("compare", (["a"] * 6, ["b"]), "up to 5 at a time"),
    ("compare", (["a"], ["b"] * 100_000), "up to 5 at a time"),
    ("compare", ([["a"]], ["b"]), "text 1 is empty"),
    ("compare", ([DEEP], ["b"]), "text 1 is empty"),
    ("compare", (["a"], ["b"], [[0]]), "whole number"),
    ("compare", (["a"], ["b"], [0] * 1000), "up to 6 at a time"),
    ("compare", (["a"], ["b"], "0"), "as a list"),
    ("compare", (["a"], ["b"], [0], 5, [["first"]]), "first, common or prefix"),
    ("compare", (["a"], ["b"], [0], 5, "first"), "as a list"),
    ("feature", (LAYER, BIG), "whole number"),
    ("feature", (LAYER, 2**53), "there is no feature"),
    ("feature", (LAYER, 1, DEEP), "there is no store"),
    ("feature", (LAYER, 1, {}), "there is no store"),
    ("positions", ("Hello", ["all"]), "positions are a text"),
    ("positions", ("Hello", "1," * 600), "positions are a text"),
    ("steer", ("Hello", "x"), "as a list"),
    ("steer", ("Hello", ["x"]), "an object with keys"),
    ("steer", ("Hello", [DEEP]), "an object with keys"),
    ("steer", ("Hello", [CHANGE] * 21), "up to 20 at a time"),
    ("steer", ("Hello", [{**CHANGE, "amount": BIG}]), "finite number"),
    ("steer", ("Hello", [{**CHANGE, "amount": float("nan")}]), "finite number"),
    ("steer", ("Hello", [{**CHANGE, "feature": -1}]), "feature"),
    ("steer", ("Hello", [{**CHANGE, "layer": BIG}]), "whole number"),
    ("steer", ("Hello", [{**CHANGE, "op": DEEP}]), "there is no op"),
    ("steer", ("Hello", [{**CHANGE, "op": "x" * 10**5}]), "there is no op"),
    ("steer", ("Hello", [{**CHANGE, "amuont": 1}]), "did you mean 'amount'"),
    ("steer", ("Hello", [CHANGE], []), "decoding is an object"),
    ("steer", ("Hello", [CHANGE], {"max_tokens": 5}), "did you mean 'max_new_tokens'"),
    ("steer", ("Hello", [CHANGE], {"max_new_tokens": BIG}), "whole number"),
    ("steer", ("Hello", [CHANGE], {"seed": BIG}), "whole number"),
    ("steer", ("Hello", [CHANGE], {"sample": "no"}), "true or false"),
    ("steer", ("Hello", [CHANGE], {"sample": True, "temperature": "hot"}), "finite number"),
    ("steer", ("Hello", [CHANGE], {"sample": True, "top_p": DEEP}), "finite number"),
    ("sweep", (["a", "b"], []), "at least one intervention"),
    ("sweep", ("ab", [CHANGE]), "as a list"),
    ("sweep", (["a"] * 33, [CHANGE]), "up to 32 at a time"),
    ("sweep", (["a"] * 20, [CHANGE], "feature", "", {"max_new_tokens": 300}), "6,000 at every amount"),
    ("sweep", (["a", "b"], [CHANGE], DEEP), "aims at one of"),
    ("sweep", (["a", "b"], [CHANGE], "regex", "("), "not a regular expression"),
    ("sweep", (["a", "b"], [CHANGE], "regex", "(?R)"), "calls itself"),
    ("sweep", (["a", "b"], [CHANGE], "script", "x" * 1001), "give up to 1,000"),
    ("sweep", (["a", "b"], [CHANGE], "text", ["x"]), "say what"),
    ("analyze", (DEEP, ["german"], LAYER), "there is no analysis"),
    ("analyze", ("overlap", "german", LAYER), "as a list"),
    ("analyze", ("overlap", ["german"] * 2, LAYER), "named twice"),
    ("analyze", ("overlap", ["german"] * 1000, LAYER), "up to 2 at a time"),
    ("analyze", ("overlap", [DEEP], LAYER), "there is no store"),
]


@pytest.mark.parametrize(("endpoint", "arguments", "says"), REFUSED, ids=[f"{e}: {s}" for e, _, s in REFUSED])
def test_what_is_refused_is_one_short_sentence(api: Api, endpoint: str, arguments: tuple, says: str) -> None:
    started = time.process_time()
    with pytest.raises(QwenScopeError) as error:
        getattr(api, endpoint)(*arguments)
    assert says in str(error.value)
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)
    assert time.process_time() - started < 1


def test_a_comparison_is_bounded_in_tokens_and_in_memory(state: AppState) -> None:
    texts = ["Where is the station, please?"] * 4
    tokens, k = sum(state.scope.tokenize(texts).lengths), state.scope.saes[LAYER].k
    assert k is not None
    for limits, says in (
        (Limits(set_tokens=tokens - 1), f"{tokens:,} tokens together and this page compares up to {tokens - 1:,}"),
        (Limits(set_bytes=tokens * k * 8 - 1), "give fewer layers or texts"),
    ):
        own = AppState(state.scope, limits=limits)
        with pytest.raises(InputError, match=re.escape(says)):
            own.compare(texts[:2], texts[2:], [LAYER], 5, [])
    fits = Limits(set_tokens=tokens, set_bytes=tokens * k * 8)
    _, seen = AppState(state.scope, limits=fits).compare(texts[:2], texts[2:], [LAYER], 5, [])
    acts = seen.acts[LAYER]
    assert acts.indices.numel() * acts.indices.element_size() + acts.values.numel() * 4 == fits.set_bytes


@pytest.mark.parametrize("text", ["new_tokens", "=5", "new_tokens=", "new_tokens=many", "new_tokens=0", "new_tokens=-1",
                                  "new_tokens=1.5", f"new_tokens={BIG}", "new_token=5", "x=1"])  # fmt: skip
def test_limits_of_the_operator(text: str) -> None:
    assert Limits.of(["new_tokens=7", "set_texts=1000000"]) == Limits(new_tokens=7, set_texts=10**6)
    with pytest.raises(InputError) as error:
        Limits.of([text])
    assert len(str(error.value)) < 400
    with pytest.raises(InputError, match="twice"):
        Limits.of(["new_tokens=7", "new_tokens=8"])


def test_every_limit_is_documented_with_its_default() -> None:
    page = (Path(__file__).parents[2] / "docs" / "explorer.md").read_text()
    listed = dict(re.findall(r"^\| `(\w+)` \| (\d+) \|", page, re.MULTILINE))
    assert listed == {name: str(value) for name, value in vars(Limits()).items()}


def test_the_last_arguments_may_be_left_out_over_http(url: str, state: AppState) -> None:
    kind, told = answer(url, "features", ["Hello there", LAYER])
    assert kind == "complete"
    assert told[0]["strongest"] == Api(state).features("Hello there", LAYER)["strongest"]
    for data, says in (
        ([], "/features needs text"),
        (["Hello"], "/features needs layer"),
        (["a"] * 5, "takes 4 arguments"),
    ):
        kind, told = answer(url, "features", data)
        assert kind == "error"
        assert says in told["error"]


def recipe(**changes: Any) -> dict[str, Any]:
    one = {"hook_point": "layer4", "op": "add", "amount": 1, "feature": 1}
    return {"version": 1, "name": "x", "model": "m", "group": None, "provenance": "", "effect": {},
            "interventions": [one], **changes}  # fmt: skip


BOMB = "version: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"k{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("bomb.yaml", BOMB, "anchor or alias"),
        ("large.yaml", "a: 1\n" * 30_000, "too large for a recipe"),
        ("dense.yaml", "[" + "1," * 14_000 + "]", "holds no keys"),
        ("deep.json", "[" * 29_000, "nested too deeply"),
        ("many.json", json.dumps(recipe(interventions=recipe()["interventions"] * 21)), "up to 20 at a time"),
        ("names.json", json.dumps(recipe(name="<b>" * 1000)), "is for the model"),
    ],
)
def test_hostile_recipes_are_refused_quickly(
    state: AppState, tmp_path: Path, name: str, content: str, says: str
) -> None:
    (tmp_path / name).write_text(content)
    started = time.process_time()
    with pytest.raises(QwenScopeError) as error:
        steering.rows_of_recipe(state, str(tmp_path / name))
    assert says in str(error.value)
    assert time.process_time() - started < 4


@pytest.fixture(scope="module")
def visitors() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def usual_of(url: str, work: Any = None, least: int = 5, most: int = 12) -> float:
    """The median time in which a short request of another visitor is answered, as long as the work goes on."""
    took = []
    while len(took) < least or (work is not None and not work.done() and len(took) < most):
        started = time.monotonic()
        assert answer(url, "features", [f"Where is the station? {next(NUMBERS)}", LAYER, "plain", 1])[0] == "complete"
        took.append(time.monotonic() - started)
    return statistics.median(took)


@pytest.fixture(scope="module")
def open_page(state: AppState) -> Iterator[tuple[AppState, str, float]]:
    """A page with the limits of a plain start, and how long a short request takes when nobody else asks."""
    own = AppState(state.scope)
    with served(own) as url:
        usual_of(url)
        yield own, url, usual_of(url)


WHERE = "Where is the station, please?"
LONG = {
    "a regular expression without end": (
        "sweep", [["a" * 60 + "!", "Where where where!"], [CHANGE], "regex", SLOW, {"max_new_tokens": 8}, "plain"],
    ),
    "a comparison of many texts": ("compare", [[f"{WHERE} {GERMAN[0]} {i}" for i in range(120)]] * 2),
    "a comparison of long texts": ("compare", [[WHERE * 60] * 6] * 2),
    "a long generation": ("steer", [WHERE, [CHANGE] * 20, {"max_new_tokens": 300}, "plain"]),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("what", LONG)
def test_long_work_of_one_visitor_delays_no_other(
    what: str, open_page: tuple[AppState, str, float], visitors: ThreadPoolExecutor
) -> None:
    _, url, quiet = open_page
    work = visitors.submit(answer, url, *LONG[what])
    assert usual_of(url, work) < quiet + 1
    kind, told = work.result()
    if "regular" in what:
        assert (kind, "takes more than 1 s" in told["error"]) == ("error", True)
    else:
        assert kind == "complete"


@pytest.mark.slow
def test_large_recipes_of_one_visitor_delay_no_other(
    open_page: tuple[AppState, str, float], visitors: ThreadPoolExecutor, tmp_path: Path
) -> None:
    """Reading YAML is pure Python, beside which a short request waits for the interpreter at each of its steps."""
    own, url, quiet = open_page
    path = tmp_path / "large.yaml"
    path.write_text("a: [" + ", ".join(["{q: [1, 2, 'x']}"] * 1600) + "]")
    assert 28_000 < path.stat().st_size <= own.limits.recipe_bytes
    over = threading.Event()

    def load() -> None:
        while not over.is_set():
            with pytest.raises(QwenScopeError, match="version"):
                steering.rows_of_recipe(own, str(path))

    work = visitors.submit(load)
    try:
        assert usual_of(url, work) < quiet + 1
    finally:
        over.set()
    work.result()


@pytest.mark.slow
def test_answers_and_errors_name_no_folder(state: AppState, stores: dict[str, Path], tmp_path: Path, url: str) -> None:
    with state.store("german") as store:
        good = Interval(0.9, 0.8, 1.0, 20)
        label = Label("Words", good, good, "/home/someone/models/writer", "tokens")
        Notes(store).add(make_label(LAYER, 9, store.layer(LAYER).fingerprint, label))
    for store in (None, "german"):
        kind, told = answer(url, "feature", [LAYER, 9, store])
        assert kind == "complete"
        assert told[0]["store"] == store
        assert not re.search(r"(?<!<)/(home|tmp|work|usr|var|root)/", json.dumps(told))
        assert str(stores["german"].parent) not in json.dumps(told)
        assert model_source("lab") not in json.dumps(told)
    assert told[0]["label"]["source"] == "writer"

    shutil.copytree(stores["german"], tmp_path / "a store")
    own = AppState(state.scope, {"broken": tmp_path / "a store"})
    with served(own) as broken:
        (tmp_path / "a store" / "manifest.json").write_text("{")
        for endpoint, data in (("feature", [LAYER, 1, "broken"]), ("analyze", ["redundancy", ["broken"], LAYER])):
            kind, told = answer(broken, endpoint, data)
            assert kind == "error"
            assert told["error"]
            assert str(tmp_path) not in told["error"]
        kind, told = answer(broken, "features", ["Hello", 77])
        assert "/" not in told["error"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("there is no file '/etc/passwd'", "there is no file 'passwd'"),
        ("/srv/a b/store has no layer 3", "store has no layer 3"),
        ("feature 4/1028 and 1/2, on https://example.org/a/b", "feature 4/1028 and 1/2, on https://example.org/a/b"),
        ("at /tmp/gradio/0a1b/rule.json: no", "at rule.json: no"),
        (r"C:\Users\me\x.json is no rule", "x.json is no rule"),
        ("one of and/or", "one of and/or"),
        ("/", "/"),
    ],
)
def test_paths_are_cut_to_their_last_part(text: str, shown: str) -> None:
    assert discreet(text, {"/srv/a b/store": "store"}) == shown


@pytest.mark.slow
def test_an_unforeseen_error_is_one_sentence_too(state: AppState, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    own = AppState(state.scope)

    def broken(*_: Any) -> Any:
        raise RuntimeError(f"CUDA is out of memory in {__file__}")

    monkeypatch.setattr(own, "seen", broken)
    with served(own) as url:
        kind, told = answer(url, "features", ["Hello", LAYER])
    assert kind == "error"
    assert "could not be answered" in told["error"]
    assert __file__ not in json.dumps(told)
    assert "CUDA is out of memory" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("layers", [[0], [5], [1, 4], [0, 2, 3, 5]])
def test_groups_with_one_layer_or_scattered_layers_have_a_page(tmp_path: Path, layers: list[int]) -> None:
    source = Path(model_source("lab")).parent / "sae"
    for name in ("config.json", *(f"layer{layer}.sae.pt" for layer in layers)):
        shutil.copy(source / name, tmp_path / name)
    state = AppState(load_scope("lab", sae=str(tmp_path), device="cpu"))
    assert state.layers == layers
    state.warm()
    build(state)
    api = Api(state)
    assert api.info()["layers"] == layers
    for layer in layers:
        assert api.features("Hello there", layer)["layer"] == layer
        assert api.feature(layer, 3)["feature"] == 3
    assert {one["layer"] for one in api.compare(["Hello"], ["Hallo"])} == set(layers)
    with pytest.raises(QwenScopeError, match="no SAE for layer"):
        api.features("Hello", 99)
    with pytest.raises(InputError, match="no layer from 6 to 6"):
        state.layer_range(6, 6)


def test_a_layer_is_chosen_among_those_there_are() -> None:
    with gr.Blocks():
        slider, one, some = (layer_choice(layers) for layers in ([2, 3, 4], [7], [1, 4, 5]))
    assert isinstance(slider, gr.Slider)
    assert (slider.minimum, slider.maximum, slider.value) == (2, 4, 3)
    assert isinstance(one, gr.Dropdown)
    assert isinstance(some, gr.Dropdown)
    assert [value for _, value in one.choices] == [7]
    assert [value for _, value in some.choices] == [1, 4, 5]
    assert some.value == 4


def inert(markup: str) -> None:
    """Nothing of the hostile text has become an element, an attribute or a template."""
    assert "&lt;script&gt;" in markup or "&lt;img" in markup or "script" not in markup
    for alive in ("<script", "<img", "onerror='", 'onerror="', "${", "{{", "`b`"):
        assert alive not in markup, alive
    assert not re.search(r"<[^>]*\sonerror", re.sub(r'"[^"]*"', "", markup))


def test_hostile_names_labels_and_files_are_shown_inertly(state: AppState) -> None:
    """Escaping holds wherever a text from outside meets the page."""
    own = AppState(state.scope, model_name=HOSTILE, trained_from=HOSTILE)
    own.sae_name = HOSTILE
    inert(header(own))
    inert(notice(f"{HOSTILE} is no store"))

    def label(*_: int) -> Named:
        return Named(HOSTILE, 0.9)

    seen = state.seen(HOSTILE, LAYER)
    reading = explore_view.Reading(HOSTILE, "plain", LAYER).with_default_choice(seen)
    inert(explore_view.tokens_panel(seen, reading, label))
    inert(explore_view.token_features_panel(seen, reading, label))
    inert(explore_view.text_features_panel(seen, reading, label))
    inert(explore_view.heat_panel(seen, replace(reading, only_counted=False), label))
    inert(explore_view.token_depth_panel({LAYER: seen}, reading, label))

    good = Interval(0.9, 0.8, 1.0, 20)
    page = state.feature_page(LAYER, 7, "german")
    named = replace(
        page, label=Label(HOSTILE, good, good, HOSTILE, HOSTILE), verdict={"outcome": HOSTILE, "reasons": [HOSTILE]},
        group=HOSTILE, model=HOSTILE, store=HOSTILE,
    )  # fmt: skip
    for panel in (feature_view.title_panel(named, f"?feature={HOSTILE}"), feature_view.facts_panel(named),
                  feature_view.notes_panel(named), feature_view.neighbours_panel(named, label)):  # fmt: skip
        inert(panel)
    row = {"layer": HOSTILE, "feature": HOSTILE, "op": "add", "amount": HOSTILE, "unit": "raw", "where": HOSTILE}
    inert(steer_view.list_panel([row, row], 0))
    inert(steer_view.growing_panel("Original", HOSTILE, HOSTILE))


def test_hostile_names_in_analyses_and_rules_are_shown_inertly(state: AppState, stores: dict[str, Path]) -> None:
    own = AppState(state.scope, {HOSTILE.replace("/", "|"): stores["german"], "<img src=y>": stores["english"]})
    for name in ("overlap", "redundancy", "drift", "subset"):
        inert(result_panel(HOSTILE, analysed(own, list(own.stores), name, LAYER), 1.0, own))
    rule = type("Rule", (), {"name": HOSTILE})()
    inert(trace_panel(own, rule, [HOSTILE], []))  # pyright: ignore[reportArgumentType]
