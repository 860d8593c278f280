"""What the plugin reads from vLLM's own configuration."""

from __future__ import annotations

import functools
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
    )


def check_runnable(config: Any) -> None:
    """Refuse what the plugin was not tested with, rather than serve answers that are not steered.

    Raises:
        InputError: which, in one sentence.
    """
    settings, parallel = settings_of(config), config.parallel_config
    name = config.model_config.architecture
    if name not in ARCHITECTURES:
        raise InputError(f"the architecture {name} is not served; it is one of {', '.join(ARCHITECTURES)}")
    if config.speculative_config is not None:
        raise InputError("speculative decoding is not served: the positions of drafted tokens are not known in time")
    if config.kv_transfer_config is not None:
        raise InputError("KV connectors are not served: they may give a steered block to a request without the recipe")
    if parallel.enable_expert_parallel and parallel.tensor_parallel_size > 1:
        raise InputError("expert parallelism is not served: blocks return shards of the residual there")
    if getattr(config.compilation_config.pass_config, "enable_sp", False):
        raise InputError("sequence parallelism is not served: blocks return shards of the residual there")
    if settings is None or not settings.feature_layers:
        return
    compilation = config.compilation_config
    graphs = getattr(compilation.cudagraph_mode, "name", "NONE")
    split = SET_FEATURES in (compilation.splitting_ops or ())
    if graphs.startswith("FULL") or (graphs == "PIECEWISE" and not split):
        raise InputError(
            f"with CUDA graphs of the mode {graphs} a feature that is set would stay as it is; start with `qwen-scope"
            f" serve`, which asks for PIECEWISE graphs that are split at {SET_FEATURES}"
        )


def tokenizer_of(config: Any) -> Any:
    """The served model's tokenizer, as transformers loads it."""
    return _tokenizer(config.model_config.tokenizer or config.model_config.model)


@functools.lru_cache(maxsize=2)
def _tokenizer(name: str) -> Any:
    return load_tokenizer(name)
