"""What a visitor may send: everything is bounded, what is refused is one sentence."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from explored import LAYER, answer

from qwen_scope.errors import InputError, QwenScopeError
from qwen_scope.explorer import Api, AppState, Limits, steering

CHANGE = {"layer": LAYER, "feature": 7, "amount": 0.5}
BIG = 10**400


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
