"""What the plugin reads from vLLM's own configuration."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from qwen_scope.errors import InputError
from qwen_scope.model import load_tokenizer
from qwen_scope.steer import signature_of

from .admit import ModelFacts
from .blocks import SET_FEATURES
from .guard import ARCHITECTURES
from .protocol import FIELD
from .settings import ServeSettings


def settings_of(config: Any) -> ServeSettings | None:
    """The plugin's settings in a `VllmConfig`, None where it was started without.

    Raises:
        FormatError, InputError: settings that can't be read.
    """
    given = config.additional_config or {}
    found = given.get(FIELD) if isinstance(given, dict) else None
    return None if found is None else ServeSettings.from_json(found)


def facts_of(config: Any) -> ModelFacts:
    """The served model in numbers.

    Raises:
        InputError: an architecture, or a way of running it, that the plugin was not tested with.
    """
    model = config.model_config
    text = model.hf_text_config
    check_runnable(config)
    return ModelFacts(
        layers=text.num_hidden_layers,
        width=model.get_hidden_size(),
        dtype=model.dtype,
        context=model.max_model_len,
        signature=signature_of(text),
        follows=not config.scheduler_config.async_scheduling or config.use_v2_model_runner,
    )


# Ways of running vLLM that the plugin was not tested with, each with what would go wrong.
_REFUSED: tuple[tuple[str, Callable[[Any], object], str], ...] = (
    ("speculative decoding", lambda c: c.speculative_config, "the places of drafted tokens are not known in time"),
    ("a KV connector", lambda c: c.kv_transfer_config, "it may hand a steered block to a request without the recipe"),
    ("LoRA", lambda c: c.lora_config, "it has not been tested together"),
    ("pipeline parallelism", lambda c: c.parallel_config.pipeline_parallel_size > 1, "it has not been tested"),
    (
        "data parallelism",
        lambda c: c.parallel_config.data_parallel_size > 1,
        "idle workers overwrite what is read",
    ),
    (
        "expert parallelism over several workers",
        lambda c: c.parallel_config.enable_expert_parallel and c.parallel_config.tensor_parallel_size > 1,
        "blocks may return shards of the residual",
    ),
    (
        "context parallelism",
        lambda c: (
            c.parallel_config.prefill_context_parallel_size > 1 or c.parallel_config.decode_context_parallel_size > 1
        ),
        "blocks return shards of the residual",
    ),
    (
        "sampling in shards of the batch",
        lambda c: getattr(c.parallel_config, "enable_batch_sharded_sampling", False),
        "an answer that a watch stops would go on",
    ),
    ("splitting a batch in two", lambda c: c.parallel_config.enable_dbo, "rows are laid out for the whole batch"),
)


def check_runnable(config: Any) -> None:
    """Refuse what the plugin was not tested with, rather than serve answers that are not steered.

    Raises:
        InputError: which, in one sentence.
    """
    name = config.model_config.architecture
    if name not in ARCHITECTURES:
        raise InputError(f"the architecture {name} is not served; it is one of {', '.join(ARCHITECTURES)}")
    for what, on, why in _REFUSED:
        if on(config):
            raise InputError(f"qwen-scope does not serve with {what}: {why}; start vLLM without it")
    settings = settings_of(config)
    if settings is None or not settings.feature_layers:
        return
    compilation = config.compilation_config
    graphs = getattr(compilation.cudagraph_mode, "name", "NONE")
    split = SET_FEATURES in (compilation.splitting_ops or ())
    if graphs.startswith("FULL") or (graphs == "PIECEWISE" and not split):
        raise InputError(
            f"with CUDA graphs of the mode {graphs} a feature that is set would stay as it is; give vLLM"
            ' --compilation-config \'{"cudagraph_mode": "PIECEWISE"}\', as `qwen-scope serve` does'
        )


def tokenizer_of(config: Any) -> Any:
    """The served model's tokenizer, as transformers loads it."""
    return _tokenizer(config.model_config.tokenizer or config.model_config.model)


@functools.lru_cache(maxsize=2)
def _tokenizer(name: str) -> Any:
    return load_tokenizer(name)
