"""Model runner V1, eager: every operation at every kind of place, alone and beside others."""

from __future__ import annotations

import math
from typing import Any

import pytest
import served
from cases import READ
from vllm.exceptions import VLLMValidationError

from qwen_scope.errors import MismatchError
from qwen_scope.serve import Ask, Read, ServeSettings, Tables, WorkerState, self_test
from qwen_scope.steer import Intervention, Where


@pytest.fixture(scope="module")
def llm() -> Any:
    return served.start(
        ServeSettings(
            sae=str(served.LAB / "sae"), layers=tuple(range(6)), feature_layers=(2, 4), read_layers=READ, rows=16
        )
    )


def test_all_cases_at_once(llm: Any, known: dict[str, Any]) -> None:
    served.check(llm, known["cases"])


def test_each_case_alone(llm: Any, known: dict[str, Any]) -> None:
    """One of each name; a batch of one takes other paths than a batch of many."""
    alone = {case.name: case for case in known["cases"]}
    for case in alone.values():
        served.check(llm, [case])


def test_unsteered_requests_keep_their_log_probabilities_to_the_bit(llm: Any, known: dict[str, Any]) -> None:
    served.check_bits(llm, known, 9)


@pytest.mark.parametrize("beside", [False, True])
def test_features_of_the_prompt_are_those_of_the_scope(llm: Any, known: dict[str, Any], beside: bool) -> None:
    read = Ask(read=Read(READ, 5, (), Where.parse("prompt")), ticket="one")
    chosen, prompts = [served.params(read, n=3) for _ in known["ids"]], list(known["ids"])
    if beside:
        steered = [case for case in known["cases"] if case.ask is not None][::20]
        chosen += [served.params(case.ask) for case in steered]
        prompts += [case.ids for case in steered]
    out = served.answers(llm, prompts, chosen)
    (found,) = llm.collective_rpc("qwen_scope_take", args=("one",))
    assert served.compare_features(known, found, [one.request_id for one in out[: len(known["ids"])]]) > 50
    assert llm.collective_rpc("qwen_scope_take", args=("one",)) == [{}]


def test_named_features_and_generated_tokens_are_read(llm: Any, known: dict[str, Any]) -> None:
    """A generated token's features, read while it was generated, are those of the same token as a prompt's."""
    ids = known["ids"][0]
    tops = Ask(read=Read((4,), 5, (), Where.parse("all")), ticket="tops")
    (out,) = served.answers(llm, [ids], [served.params(tops, n=8, ignore_eos=True)])
    (found,) = llm.collective_rpc("qwen_scope_take", args=("tops",))
    ((_, layers),) = found.items()
    assert layers["4"]["positions"] == list(range(len(ids) + 7))
    again = ids + list(out.outputs[0].token_ids)[:-1]
    served.answers(llm, [again], [served.params(Ask(read=tops.read, ticket="again"), n=1)])
    (other,) = llm.collective_rpc("qwen_scope_take", args=("again",))
    ((_, repeated),) = other.items()
    assert repeated["4"]["features"] == layers["4"]["features"]
    feature = layers["4"]["features"][3][0]
    named = Ask(read=Read.from_json({"features": [f"4/{feature}"], "where": "3"}), ticket="named")
    served.answers(llm, [ids], [served.params(named, n=1)])
    (third,) = llm.collective_rpc("qwen_scope_take", args=("named",))
    ((_, one),) = third.items()
    assert one["4"]["positions"] == [3]
    assert one["4"]["features"] == [[feature]]
    assert one["4"]["values"][0][0] == pytest.approx(layers["4"]["values"][3][0], abs=1e-4)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            '{"interventions": [{"hook_point": "layers.3.resid_post", "op": "clamp", "amount": 1, "feature": 1}]}',
            "not served",
        ),
        (
            '{"interventions": [{"hook_point": "layers.3.resid_post", "op": "add", "amount": 1, "direction": [1, 2]}]}',
            "2 numbers",
        ),
        ('{"recipe": "unknown"}', "no recipes"),
        ('{"read": {"layers": [0]}}', "not served for reading"),
        ('{"steer": 1}', "no key 'steer'"),
        ("[" * 10_000, "nested too deeply"),
        ("no json", "is not JSON"),
    ],
)
def test_raw_arguments_are_admitted_like_any_others(llm: Any, known: dict[str, Any], text: str, sentence: str) -> None:
    chosen = served.params()
    chosen.extra_args = {"qwen_scope": text}
    with pytest.raises(VLLMValidationError, match=sentence):
        served.answers(llm, [known["ids"][0]], [chosen])
    served.check(llm, [case for case in known["cases"] if case.ask is None][:1])


def test_a_residual_that_overflows_does_not_end_the_worker(llm: Any, known: dict[str, Any]) -> None:
    far = [
        Intervention.add(layer=3, direction=[9e14 if i % 2 else 1.0 for i in range(128)], amount=1.0),
        Intervention.scale(layer=4, feature=1, amount=1e6),
    ]
    asked = Ask(interventions=tuple(far), read=Read((5,), 3, (), Where.parse("all")), ticket="far")
    served.answers(llm, [known["ids"][0]], [served.params(asked, n=3)])
    (found,) = llm.collective_rpc("qwen_scope_take", args=("far",))
    ((_, layers),) = found.items()
    assert all(math.isfinite(value) for row in layers["5"]["values"] for value in row)
    served.check(llm, [case for case in known["cases"] if case.ask is None])


@pytest.mark.parametrize(
    ("kind", "method", "sentence"),
    [
        (WorkerState, "begin", "add at layer 0 left the log-probabilities as they were"),
        (Tables, "row", "add at layer 0 left"),
        (WorkerState, "set_features", "clamp at layer 2 left"),
    ],
)
def test_the_self_test_notices_what_does_nothing(
    llm: Any, monkeypatch: pytest.MonkeyPatch, kind: type, method: str, sentence: str
) -> None:
    self_test(llm)
    nothing = {
        "begin": lambda self, *step: None,
        "row": lambda self, *recipe: 0,
        "set_features": lambda self, hidden, residual, layer: residual.clone(),
    }
    monkeypatch.setattr(kind, method, nothing[method])
    with pytest.raises(MismatchError, match=sentence):
        self_test(llm)


def test_requests_that_end_alone_are_forgotten(llm: Any, known: dict[str, Any]) -> None:
    """An engine may tell workers of a request's end in a step that computes nothing."""
    steered, plain = (next(case for case in known["cases"] if (case.ask is None) == none) for none in (False, True))
    served.check(llm, [steered])
    core = llm.llm_engine.engine_core.engine_core
    core.model_executor.execute_model(core.scheduler.schedule())  # nothing is left to compute
    served.check(llm, [plain])
    (status,) = llm.collective_rpc("qwen_scope_status")
    assert status["recipes"] == 0


def test_nothing_is_left_behind(llm: Any, known: dict[str, Any]) -> None:
    served.check(llm, [case for case in known["cases"] if case.ask is None][:1])
    (status,) = llm.collective_rpc("qwen_scope_status")
    assert status["recipes"] == 0
    assert status["held"] == 0
