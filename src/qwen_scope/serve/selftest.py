"""The self-test of a server that has just started: at every layer that it serves, a change must be felt.

vLLM may compile, capture and split its graphs in ways that leave a block as it was; an answer would then go out
unsteered. So before the first request, the same short prompt is asked unsteered and with a change at each layer.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qwen_scope.errors import MismatchError
from qwen_scope.steer import Intervention

from .protocol import FIELD, Ask
from .seam_front import admission_of, unwatched
from .settings import ServeSettings

PROMPT = tuple(range(11, 35))
"""Ids of some tokens, which every vocabulary has."""

FAR = 100.0
"""The length of what is added, as a multiple of the square root of the width: beside it the residual is short."""


def asks(settings: ServeSettings, width: int) -> list[tuple[str, Ask | None]]:
    """What is asked, in order, with the name of what it tests; the first and the last change nothing."""
    direction = torch.randn(width, generator=torch.Generator().manual_seed(0)).tolist()
    found: list[tuple[str, Ask | None]] = [("nothing", None)]
    for layer in settings.adding:
        one = Intervention.add(layer=layer, direction=direction, amount=FAR)
        found.append((f"add at layer {layer}", Ask(interventions=(one,))))
    for layer in settings.feature_layers:
        one = Intervention.clamp(layer=layer, feature=0, amount=1e5)
        found.append((f"clamp at layer {layer}", Ask(interventions=(one,))))
    return [*found, ("nothing, once more", None)]


def params(ask: Ask | None) -> dict[str, Any]:
    """The arguments of vLLM's `SamplingParams` for one of them."""
    return {
        "temperature": 0.0,
        "max_tokens": 1,
        "logprobs": 5,
        "skip_reading_prefix_cache": True,
        "extra_args": None if ask is None else {FIELD: ask.to_text()},
    }


def judge(settings: ServeSettings, width: int, found: Sequence[Mapping[int, float]]) -> None:
    """Refuse to serve unless every change was felt, and nothing of it by the requests beside it.

    Args:
        found: for each of `asks`, the log-probabilities of the most probable first tokens.

    Raises:
        MismatchError: a change at a layer left them as they were, or an unsteered request differs from the first.
    """
    names = [name for name, _ in asks(settings, width)]
    plain = dict(found[0])
    for name, (_, ask), one in zip(names, asks(settings, width), found, strict=True):
        if ask is not None and dict(one) == plain:
            raise MismatchError(
                f"the self-test of serving failed: {name} left the log-probabilities as they were, so answers would go"
                " out unsteered"
            )
        if ask is None and any(abs(one.get(token, value) - value) > 1e-2 for token, value in plain.items()):
            raise MismatchError("the self-test of serving failed: an unsteered request felt another's interventions")


def self_test(llm: Any) -> None:
    """Test an engine in this process (vLLM's `LLM`).

    Raises:
        MismatchError: as `judge`, or a worker without the plugin.
    """
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

    settings, width = _served(llm.llm_engine.vllm_config)
    check_workers(llm.collective_rpc("qwen_scope_status"))
    found = []
    with unwatched(llm.llm_engine.vllm_config):
        for _, ask in asks(settings, width):
            (out,) = llm.generate([{"prompt_token_ids": list(PROMPT)}], SamplingParams(**params(ask)), use_tqdm=False)
            found.append(_first(out))
    judge(settings, width, found)


async def self_test_server(engine: Any) -> None:
    """The same of an engine that a server talks to (vLLM's `AsyncLLM`).

    Raises:
        MismatchError: as `judge`, or a worker without the plugin.
    """
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

    settings, width = _served(engine.vllm_config)
    check_workers(await engine.collective_rpc("qwen_scope_status"))
    found = []
    with unwatched(engine.vllm_config):
        for _, ask in asks(settings, width):
            name = f"qwen-scope-self-test-{uuid.uuid4().hex}"
            prompt = {"prompt_token_ids": list(PROMPT)}
            *_, out = [one async for one in engine.generate(prompt, SamplingParams(**params(ask)), name)]
            found.append(_first(out))
    judge(settings, width, found)


def _served(config: Any) -> tuple[ServeSettings, int]:
    admission = admission_of(config)
    return admission.settings, admission.facts.width


def _first(out: Any) -> dict[int, float]:
    """The log-probabilities of the first token that was generated."""
    return {token: one.logprob for token, one in out.outputs[0].logprobs[0].items()}


def check_workers(states: Sequence[Mapping[str, Any] | None]) -> None:
    """Refuse workers without the plugin.

    Raises:
        MismatchError: the answer of one to `qwen_scope_status` is None.
    """
    without = [rank for rank, state in enumerate(states) if state is None]
    if without:
        raise MismatchError(f"qwen-scope is not at work in the worker of rank {without[0]}; its log says why")
