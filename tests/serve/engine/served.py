"""What the tests of serving share: vLLM in this process on the CPU, and the toolkit's own answers beside it."""

from __future__ import annotations

import os
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
from qwen_scope.serve import FIELD, Ask, ServeSettings, engine_arguments

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
