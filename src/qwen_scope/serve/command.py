"""What `qwen-scope serve` runs: vLLM's own server with the plugin, and what that takes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qwen_scope.errors import InputError, check_count, need
from qwen_scope.files import write_text
from qwen_scope.model import load_config
from qwen_scope.sae import layers_of
from qwen_scope.scope import load_scope, tell_of
from qwen_scope.steer import signature_of

from .admit import Admission, ModelFacts, write_stats
from .guard import check
from .plugin import NAME
from .protocol import FIELD, Ask
from .settings import ServeSettings

REQUESTS = 256
"""Requests that run together, where vLLM is not told otherwise; each has its rows in the tables."""

EXTENSION = "qwen_scope.serve.seam_worker.WorkerExtension"
MIDDLEWARE = "qwen_scope.serve.http.Middleware"
PIECES = {"cudagraph_mode": "PIECEWISE"}
"""A graph of the whole model would replay without the code that sets features."""

_OURS = ("--additional-config", "--worker-extension-cls")
_COMPILATION = ("--compilation-config", "-O", "-cc")


@dataclass(frozen=True)
class Launch:
    """A server to be started.

    Attributes:
        argv: what is executed.
        env: variables set for it, beside those of this process.
        table_bytes: of the tables of everything that can be added, on every worker.
        tap_bytes: of the buffers that activations are read from, for each 1,000 tokens of a step.
        sae_bytes: of the SAEs that every worker keeps.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str]
    table_bytes: int
    tap_bytes: int
    sae_bytes: int


def launch(model: str, settings: ServeSettings, flags: Sequence[str] = ()) -> Launch:
    """Work out how vLLM is started, and check all that can be before it is.

    Args:
        model: a folder or a name on the Hub.
        flags: vLLM's own, passed on as they are.

    Raises:
        NotFoundError: no vLLM, or a layer, a file or a recipe that is not there.
        MismatchError: another version of vLLM than the known ones, or SAEs or recipes of another model.
        InputError: flags that the plugin sets itself, or a recipe whose units need statistics.
    """
    need("serving", "vllm")
    check()
    if taken := [flag for flag in flags if flag.partition("=")[0] in _OURS]:
        raise InputError(f"{taken[0].partition('=')[0]} is set by qwen-scope serve; leave it out")
    config = load_config(model)
    text = config.get_text_config(decoder=True)
    facts = facts_before(text, flags)
    admission = Admission(settings, facts)
    check_recipes(admission)
    if settings.sae is not None:
        here = [layer for layer in settings.touched if layer in layers_of(settings.sae)]
        tell_of(model, settings.sae, {layer: admission.saes[layer] for layer in here})
    requests = flag_of(flags, "--max-num-seqs")
    argv = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, *flags]
    if requests is None:
        argv += ["--max-num-seqs", str(REQUESTS)]
    if settings.feature_layers and not any(flag.startswith(_COMPILATION) for flag in flags):
        argv += ["--compilation-config", json.dumps(PIECES)]
    argv += [
        "--middleware",
        MIDDLEWARE,
        "--worker-extension-cls",
        EXTENSION,
        "--additional-config",
        json.dumps({FIELD: settings.to_json()}),
    ]
    number = torch.empty(0, dtype=facts.dtype).element_size() * facts.width
    return Launch(
        tuple(argv),
        {"VLLM_PLUGINS": NAME},
        len(settings.adding) * settings.capacity(requests or REQUESTS) * number,
        len(settings.read_layers) * 1000 * number,
        sum(admission.saes[layer].nbytes for layer in {*settings.feature_layers, *settings.read_layers}),
    )


def engine_arguments(settings: ServeSettings) -> dict[str, Any]:
    """The arguments of vLLM's `LLM` or `AsyncEngineArgs` that put the plugin to work in it.

    Raises:
        MismatchError, NotFoundError: as `guard.check`.
    """
    check()
    made: dict[str, Any] = {"additional_config": {FIELD: settings.to_json()}, "worker_extension_cls": EXTENSION}
    if settings.feature_layers:
        made["compilation_config"] = dict(PIECES)
    return made


def run(made: Launch) -> None:
    """Become that server; does not return."""
    os.execve(made.argv[0], list(made.argv), {**os.environ, **made.env})


def with_stats(settings: ServeSettings, model: str, path: Path) -> ServeSettings:
    """The settings with statistics of their layers, which the units `resid_norm` and `max_act` need.

    A file that is not there is measured first, which loads the model once.

    Raises:
        QwenScopeError: as `load_scope`; or the file can't be written.
    """
    if not path.is_file():
        scope = load_scope(model, settings.sae, k=settings.k)
        write_text(path, write_stats({layer: scope.stats[layer] for layer in settings.adding}))
    return replace(settings, stats=str(path.resolve()))


def facts_before(text: Any, flags: Sequence[str]) -> ModelFacts:
    """The model's facts from its config, before vLLM has looked at it."""
    named = flag_of(flags, "--dtype") or "auto"
    own = getattr(text, "dtype", None) or torch.float32
    dtypes = {"half": torch.float16, "float16": torch.float16, "bfloat16": torch.bfloat16}
    dtypes |= {"float": torch.float32, "float32": torch.float32, "auto": own}
    if named not in dtypes:
        raise InputError(f"--dtype is one of {', '.join(dtypes)}, not {named!r}")
    return ModelFacts(
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        dtype=dtypes[named],
        context=text.max_position_embeddings,
        signature=signature_of(text),
    )


def check_recipes(admission: Admission) -> None:
    """Refuse to start with a recipe that no request could name.

    Raises:
        QwenScopeError: the first that does not fit, as admission says it.
    """
    for name in admission.library.names() if admission.settings.recipes is not None else ():
        admission.fit(Ask(recipe=name))


def flag_of(flags: Sequence[str], name: str) -> Any:
    """The value of one of vLLM's flags, in either way of writing it; a count as a number; None where it is not given.

    Raises:
        InputError: no value, or no whole number for a count.
    """
    for i, flag in enumerate(flags):
        key, equals, value = flag.partition("=")
        if key != name:
            continue
        if not equals:
            if i + 1 == len(flags):
                raise InputError(f"{name} lacks its value")
            value = flags[i + 1]
        if not name.startswith("--max"):
            return value
        return check_count(name, int(value) if value.isdecimal() else value)
    return None
