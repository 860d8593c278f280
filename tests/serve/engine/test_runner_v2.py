"""Model runner V2, with prompts in chunks of a few tokens and a cache too small for all requests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import v2shim  # noqa: F401  # before vLLM is imported

# isort: split
import pytest
import served
from cases import READ

from qwen_scope.serve import Ask, Read, ServeSettings, Watch
from qwen_scope.steer import Intervention, Where


@pytest.fixture(scope="module")
def llm() -> Any:
    return served.start(
        ServeSettings(
            sae=str(served.LAB / "sae"), layers=tuple(range(6)), feature_layers=(2, 4), read_layers=READ, rows=16
        ),
        max_num_batched_tokens=48,
        enable_chunked_prefill=True,
        kv_cache_memory_bytes=2 * 2**20,
        max_num_seqs=12,
    )


@pytest.fixture
def preempted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The requests that the scheduler has preempted."""
    from vllm.v1.core.sched.scheduler import Scheduler  # pyright: ignore[reportMissingImports]

    names, preempt = [], Scheduler._preempt_request

    def counted(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(request.request_id)
        return preempt(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", counted)
    return names


def test_the_runner_is_v2(llm: Any) -> None:
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    assert any(kind.__module__ == "vllm.v1.worker.gpu.model_runner" for kind in type(runner).__mro__)


def test_cases_at_once(llm: Any, known: dict[str, Any]) -> None:
    served.check(llm, known["cases"][::12])


def test_unsteered_requests_keep_their_log_probabilities_to_the_bit(llm: Any, known: dict[str, Any]) -> None:
    served.check_bits(llm, known, 40)


def test_long_prompts_in_chunks_with_preemption(llm: Any, known: dict[str, Any], preempted: list[str]) -> None:
    served.check(llm, known["long"])
    assert preempted
    served.check(llm, known["long"])  # from the cache


def test_features_of_the_prompt_are_those_of_the_scope(llm: Any, known: dict[str, Any]) -> None:
    read = Ask(read=Read(READ, 5, (), Where.parse("prompt")), ticket="one")
    out = served.answers(llm, known["ids"], [served.params(read, n=3) for _ in known["ids"]])
    (found,) = llm.collective_rpc("qwen_scope_take", args=("one",))
    assert served.compare_features(known, found, [one.request_id for one in out]) > 50


def test_watches_mark_stop_and_switch(llm: Any, known: dict[str, Any], preempted: list[str]) -> None:
    """Alarms are where the activations that were read say, beside requests that are preempted."""
    ids, tokens = known["ids"][0], 12
    read = Ask(read=Read((4,), 256, (), Where.parse("generated")), ticket="read")
    (out,) = served.answers(llm, [ids], [served.params(read, n=tokens, ignore_eos=True)])
    said = list(out.outputs[0].token_ids)
    ((_, layers),) = llm.collective_rpc("qwen_scope_take", args=("read",))[0].items()
    acts = [dict(zip(*row, strict=True)) for row in zip(layers["4"]["features"], layers["4"]["values"], strict=True)]
    rises = [
        (place, feature, value, before)
        for place in range(3, 9)
        for feature, value in acts[place].items()
        if value > (before := max(row.get(feature, 0.0) for row in acts[:place])) + 0.05
    ]
    place, feature, value, before = rises[0]
    position = len(ids) + place
    rule = Watch("w", ((4, feature, (value + before) / 2),), Where.parse("generated"))
    far = Intervention.add(layer=2, direction=[3.0 if i % 3 else -4.0 for i in range(128)], amount=1.0)
    there = Ask(interventions=(replace(far, where=Where.parse(f"{position + 1}-{len(ids) + tokens - 2}")),))
    stop, switch = replace(rule, then="stop"), replace(rule, then="switch", interventions=(far,))
    asks = [Ask(watch=(rule,), ticket="mark"), Ask(watch=(switch,)), there]
    chosen = [served.params(ask, n=tokens, ignore_eos=True) for ask in asks]
    chosen += [served.params(case.ask) for case in known["long"]]
    chosen.append(served.params(Ask(watch=(stop,)), n=tokens))
    prompts = [*[ids] * 3, *(case.ids for case in known["long"]), ids]
    found = [list(one.outputs[0].token_ids) for one in served.answers(llm, prompts, chosen)]
    assert preempted
    assert found[0] == said
    assert found[1] == found[2] != said
    assert found[-1][:-1] == said[: place + 1]
    ((_, (alarm,)),) = llm.collective_rpc("qwen_scope_alarms", args=("mark",))[0].items()
    assert alarm["position"] == position
    assert alarm["because"][f"4/{feature}"] == pytest.approx(value, abs=1e-4)
