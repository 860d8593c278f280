"""Model runner V2, with prompts in chunks of a few tokens and a cache too small for all requests."""

from __future__ import annotations

from typing import Any

import v2shim  # noqa: F401  # before vLLM is imported

# isort: split
import pytest
import served
from cases import READ

from qwen_scope.serve import Ask, Read, ServeSettings
from qwen_scope.steer import Where


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
    served.check_watches(llm, known)
    assert preempted
