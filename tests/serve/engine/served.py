"""What the tests of serving share: vLLM in this process on the CPU, and the toolkit's own answers beside it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_PLUGINS", "qwen_scope")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

import qwen_scope
from qwen_scope.serve import FIELD, Ask, Read, ServeSettings, Watch, engine_arguments
from qwen_scope.steer import Intervention, Where

LAB = Path(qwen_scope.__file__).parent / "assets" / "lab"


def start(settings: ServeSettings, model: str | Path = LAB / "model", **options: Any) -> LLM:
    """A small engine with the plugin; `options` are vLLM's."""
    chosen: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_seqs": 32,
        "kv_cache_memory_bytes": 64 * 2**20,
        "block_size": 32,
        "enforce_eager": True,
        "seed": 0,
        "disable_log_stats": True,
    }
    return LLM(str(model), **chosen | engine_arguments(settings) | options)


def params(ask: Ask | None = None, n: int = 24, **options: Any) -> SamplingParams:
    """Greedy sampling of `n` tokens under an ask."""
    extra = None if ask is None else {FIELD: ask.to_text()}
    return SamplingParams(temperature=0, max_tokens=n, extra_args=extra, **options)


def answers(llm: LLM, prompts: list[list[int]], chosen: list[SamplingParams]) -> list[Any]:
    """The outputs in order."""
    return llm.generate([{"prompt_token_ids": ids} for ids in prompts], chosen, use_tqdm=False)


def wrong(llm: LLM, cases: list[Any]) -> list[str]:
    """The names of those cases whose tokens are not the toolkit's."""
    out = answers(llm, [case.ids for case in cases], [params(case.ask) for case in cases])
    ends = {4091, 4092}  # the lab's end of a text, which the toolkit leaves out
    return [
        case.name
        for one, case in zip(out, cases, strict=True)
        if [token for token in one.outputs[0].token_ids if token not in ends] != case.tokens
    ]


def check(llm: LLM, cases: list[Any]) -> None:
    """Every case gives the toolkit's tokens."""
    bad = wrong(llm, cases)
    assert not bad, f"{len(bad)} of {len(cases)}: {bad[:10]}"


def check_bits(llm: LLM, known: dict[str, Any], every: int) -> None:
    """The same batch twice, its steered requests steered and not: the others have the same log-probabilities."""
    steered = [case for case in known["cases"] if case.ask is not None][::every]
    plain = [case for case in known["cases"] if case.ask is None]
    batch = [case for pair in zip(steered, plain * len(steered), strict=False) for case in pair]
    found = []
    for keep in (True, False):
        llm.reset_prefix_cache()
        chosen = [params(case.ask if keep else None, n=12, ignore_eos=True, logprobs=5) for case in batch]
        out = answers(llm, [case.ids for case in batch], chosen)
        found.append([one.outputs[0] for one, case in zip(out, batch, strict=True) if case.ask is None])
    assert len(found[0]) == len(steered) > 4
    for one, other in zip(*found, strict=True):
        assert one.token_ids == other.token_ids
        values = [[{k: v.logprob for k, v in step.items()} for step in side.logprobs] for side in (one, other)]
        assert values[0] == values[1]


def compare_features(known: dict[str, Any], found: dict[str, Any], names: list[str]) -> int:
    """The strongest features of the prompts are the scope's; how many rows were compared."""
    rows = 0
    for i, name in enumerate(names):
        (mine,) = [layers for key, layers in found.items() if key.split("-")[0] == name]
        for layer, read in mine.items():
            features, values = known["features"][layer][i]
            assert read["positions"] == list(range(len(features)))
            for j in range(len(features)):
                count = sum(value > 0 for value in values[j])
                assert read["features"][j] == features[j][:count]
                assert all(abs(a - b) < 1e-4 for a, b in zip(read["values"][j], values[j], strict=False))
                rows += 1
    return rows


def check_watches(llm: LLM, known: dict[str, Any]) -> None:
    """A watch marks, stops and switches where the activations that were read say, beside the long prompts' requests.

    On every worker that says so; with several of tensor parallelism each decides for itself.
    """
    ids, tokens = known["ids"][0], 12
    asked = [one for case in known["long"] if case.ask for one in case.ask.interventions]
    width = next(len(one.direction) for one in asked if one.direction)
    read = Ask(read=Read((4,), 256, (), Where.parse("generated")), ticket="read")
    (out,) = answers(llm, [ids], [params(read, n=tokens, ignore_eos=True)])
    said = list(out.outputs[0].token_ids)
    ((_, layers),) = llm.collective_rpc("qwen_scope_take", args=("read",))[0].items()
    acts = [dict(zip(*row, strict=True)) for row in zip(layers["4"]["features"], layers["4"]["values"], strict=True)]
    place, feature, value, before = next(
        (place, feature, value, before)
        for place in range(3, 9)
        for feature, value in acts[place].items()
        if value > (before := max(row.get(feature, 0.0) for row in acts[:place])) + 0.05
    )
    position = len(ids) + place
    rule = Watch("w", ((4, feature, (value + before) / 2),), Where.parse("generated"))
    far = Intervention.add(layer=2, direction=[3.0 if i % 3 else -4.0 for i in range(width)], amount=1.0)
    kept = Intervention.clamp(layer=4, feature=feature, amount=9.0)
    there = [replace(one, where=Where.parse(f"{position + 1}-{len(ids) + tokens - 2}")) for one in (far, kept)]
    stop, switch = replace(rule, then="stop"), replace(rule, then="switch", interventions=(far, kept))
    asks = [Ask(watch=(rule,), ticket="mark"), Ask(watch=(switch,)), Ask(interventions=tuple(there))]
    chosen = [params(ask, n=tokens, ignore_eos=True) for ask in asks]
    chosen += [params(case.ask) for case in known["long"]]
    chosen.append(params(Ask(watch=(stop,)), n=tokens))
    prompts = [*[ids] * 3, *(case.ids for case in known["long"]), ids]
    found = [list(one.outputs[0].token_ids) for one in answers(llm, prompts, chosen)]
    assert found[0] == said
    assert found[1] == found[2] != said
    assert found[-1][:-1] == said[: place + 1]
    raised = llm.collective_rpc("qwen_scope_alarms", args=("mark",))
    for rank in raised:
        ((_, (alarm,)),) = rank.items()
        assert alarm["position"] == position
        assert abs(alarm["because"][f"4/{feature}"] - value) < 1e-4
