"""`VllmEngine`: residuals for `scope.extract` from vLLM in this process, where rows share steps without padding.

The worker runs in this process, so residuals stay on its device: `extract` encodes them there, each SAE brought for its
turn, and (index, value) are all that leaves.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qwen_scope.errors import InputError, MismatchError, foreign, need
from qwen_scope.model import HookPoint, LoadedModel, context_length
from qwen_scope.steer import signature_of
from qwen_scope.text import start_ids

from .command import engine_arguments
from .plugin import NAME
from .rows import Step
from .settings import ServeSettings

Batch = tuple[list[int], dict[HookPoint, Tensor]]

# The engine in this process; its threads are not bound to cores, which would bind those of the caller; a row may be as
# long as the context, although one more token is asked for, which is never computed.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": NAME,
}
_SEVERAL = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
REQUESTS = 256
NO_CONTEXT = 2**15
"""Tokens of the longest row for a model that states no context."""


@dataclass(eq=False)
class VllmEngine:
    """An engine for `scope.extract(..., engine=)`; vLLM starts when the first row is read.

    Attributes:
        model: a folder or a name on the Hub, the same as the scope's.
        signature: of its architecture, as `steer.signature_of` gives it.
        dtype: of its weights.
        longest: tokens of the longest row.
        batch_tokens: tokens of a step at most; a longer row comes in pieces.
        beside: the scope's own copy of the model, which leaves a GPU before vLLM takes it.
        options: of vLLM's `LLM`, beside what is set here.
    """

    model: str
    signature: str
    dtype: str
    longest: int
    batch_tokens: int = 4096
    beside: nn.Module | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._llm: Any = None
        self._state: Any = None
        self._told: list[tuple[Step, list[str], dict[int, Tensor]]] = []

    @classmethod
    def of(
        cls, loaded: LoadedModel, *, batch_tokens: int = 4096, row_tokens: int | None = None, **options: Any
    ) -> VllmEngine:
        """The engine that reads the same model as `loaded`.

        Args:
            row_tokens: of a document's piece at most, if that is less than the context: vLLM keeps room for one row.
            options: of vLLM's `LLM`.

        Raises:
            NotFoundError: vLLM is not installed.
            InputError: a model that vLLM would load with other weights, or more than one worker.
        """
        need("the vLLM engine", "vllm")
        if loaded.name.endswith(".gguf") or getattr(loaded.model.config, "quantization_config", None) is not None:
            raise InputError(f"the vLLM engine reads unquantised checkpoints, not {loaded.name}; use --engine model")
        if os.path.isfile(os.path.join(loaded.name, "adapter_config.json")):
            raise InputError(f"the vLLM engine reads whole models, and {loaded.name} is an adapter; merge and save it")
        if several := [name for name in _SEVERAL if options.get(name, 1) != 1]:
            raise InputError(
                f"the vLLM engine of extract has one worker, in this process, and {several[0]} asks for"
                f" {options[several[0]]}: from workers in other processes whole residuals would have to travel here;"
                " leave it out, or use --engine model"
            )
        context, text = context_length(loaded.model) or NO_CONTEXT, loaded.model.config.get_text_config(decoder=True)
        longest = context if row_tokens is None else min(context, row_tokens + len(start_ids(loaded.tokenizer)))
        if not torch.cuda.is_available():  # left alone, vLLM takes nearly all of a machine's memory
            tokens = max(longest + 1, 4 * batch_tokens)
            options = {"kv_cache_memory_bytes": _cache_bytes(text, tokens, loaded.model.dtype), **options}
        dtype = str(loaded.model.dtype).removeprefix("torch.")
        return cls(loaded.name, signature_of(text), dtype, longest, batch_tokens, loaded.model, options)

    def activations(self, rows: Sequence[Sequence[int]], points: Sequence[HookPoint]) -> Iterator[Batch]:
        """As `scope.Engine`.

        Raises:
            InputError: another stream than the output of a block, or layers that a running engine does not read.
            MismatchError: vLLM loads another model, or runs without the plugin.
        """
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

        self._start(points)
        engine, ends = self._llm.llm_engine, [len(row) for row in rows]
        params = SamplingParams(temperature=0, max_tokens=1, detokenize=False, ignore_eos=True)
        names = self._llm.enqueue([{"prompt_token_ids": list(row)} for row in rows], params, use_tqdm=False)
        numbers = {name: i for i, name in enumerate(names)}
        read = [0] * len(rows)
        try:
            while engine.has_unfinished_requests():
                engine.step()
                self._state.end()
                told, self._told = self._told, []
                for step, ids, found in told:
                    yield from _batches(step, [numbers[name] for name in ids], found, points, read, ends)
        finally:
            engine.abort_request(list(names), internal=True)
            self._told = []
        if read != ends:
            raise MismatchError(f"vLLM computed {sum(read):,} of {sum(ends):,} tokens of the rows")

    def _start(self, points: Sequence[HookPoint]) -> None:
        if other := [point for point in points if point.stream != "resid_post"]:
            raise InputError(f"the vLLM engine reads resid_post, not {other[0]}; use --engine model")
        layers = tuple(sorted({point.layer for point in points}))
        if self._llm is not None:
            if missing := [layer for layer in layers if layer not in self._state.taps]:
                raise InputError(f"this engine was started without layer {missing[0]}; make another one")
            return
        settings = ServeSettings(tap_layers=layers)
        chosen: dict[str, Any] = {
            "dtype": self.dtype,
            "max_model_len": self.longest + 1,
            "max_num_batched_tokens": self.batch_tokens,
            "max_num_seqs": min(REQUESTS, self.batch_tokens),
            "enable_prefix_caching": False,  # what is cached is not computed
            "enforce_eager": True,
            "async_scheduling": False,
            "disable_log_stats": True,
            "seed": 0,
        }
        _make_room(self.beside)
        with _environment(), foreign("vLLM could not be started"):
            from vllm import LLM  # pyright: ignore[reportMissingImports]

            llm = LLM(self.model, **chosen | engine_arguments(settings) | dict(self.options))
        served = signature_of(llm.llm_engine.vllm_config.model_config.hf_text_config)
        if served != self.signature:
            raise MismatchError(f"vLLM loaded {served} from {self.model}, not {self.signature}")
        found = llm.collective_rpc("qwen_scope_state")
        if len(found) != 1 or found[0] is None:
            raise MismatchError("the vLLM engine of extract reads with one worker in this process, and found none")
        self._llm, (self._state,) = llm, found
        self._state.listener = self._listen

    def _listen(self, step: Step, ids: Sequence[str], taps: Mapping[int, Tensor]) -> None:
        found = {layer: buffer[: step.tokens].clone() for layer, buffer in taps.items()}
        self._told.append((step, list(ids), found))


def _batches(
    step: Step,
    numbers: list[int],
    found: dict[int, Tensor],
    points: Sequence[HookPoint],
    read: list[int],
    ends: Sequence[int],
) -> Iterator[Batch]:
    """The tokens of a step that were not read before: whole rows together, pieces of longer ones each alone.

    Args:
        read: tokens of each row that were read so far; counted on here. What was preempted is computed twice.
    """
    whole: list[int] = []
    tokens: list[np.ndarray] = []
    for j, i in enumerate(numbers):
        start, first = int(step.starts[j]), int(step.computed[j])
        last = min(first + int(step.counts[j]), ends[i])
        if last <= read[i]:
            continue
        here = np.arange(start + read[i] - first, start + last - first)
        alone = read[i] > 0 or last < ends[i]
        read[i] = last
        if alone:
            yield [i], {point: _some(found[point.layer], here) for point in points}
        else:
            whole.append(i)
            tokens.append(here)
    if whole:
        chosen = np.concatenate(tokens)
        yield whole, {point: _some(found[point.layer], chosen) for point in points}


def _cache_bytes(text: Any, tokens: int, dtype: torch.dtype) -> int:
    """Of a KV cache for so many tokens, with a tenth to spare."""
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(1.1 * tokens * text.num_hidden_layers * 2 * heads * width * dtype.itemsize)


def _make_room(model: nn.Module | None) -> None:
    """Move the scope's copy of the model from its GPU into main memory; vLLM counts on an empty one."""
    if model is None or hasattr(model, "hf_device_map") or next(model.parameters()).device.type != "cuda":
        return
    model.to("cpu")
    torch.cuda.empty_cache()


def _some(h: Tensor, rows: np.ndarray) -> Tensor:
    return h if len(rows) == len(h) else h[torch.from_numpy(rows).to(h.device)]


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """vLLM reads these variables while it starts; the caller's own come back afterwards."""
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
