"""Where requests enter vLLM, and where its engine names blocks: admission, and the prefix cache's key."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from qwen_scope.errors import InputError, MismatchError, NotFoundError, QwenScopeError, printable

from .admit import Admission
from .cache import block_key
from .guard import BLOCK_KEYS, CORE_INIT, PROCESS_INPUTS, REFUSAL
from .protocol import FIELD, Ask
from .vllm_config import facts_of, settings_of, tokenizer_of

_LOCK = threading.Lock()
_CORE: dict[str, Any] = {}  # the config of this process's scheduler, for the tokenizer that follows phases


def admission_of(config: Any) -> Admission:
    """The admission of a server, made once from its `VllmConfig` and kept with it.

    Raises:
        NotFoundError: this server was started without the plugin's settings.
        QwenScopeError: as `Admission`.
    """
    with _LOCK:
        made = config.__dict__.get("_qwen_scope_admission")
        if made is None:
            settings = settings_of(config)
            if settings is None:
                raise NotFoundError("this server was started without qwen-scope; start it with: qwen-scope serve")
            made = config.__dict__["_qwen_scope_admission"] = Admission(settings, facts_of(config))
        return made


def wrap_front() -> None:
    """Admit every request that carries the plugin's field, whichever way it came."""
    _wrap_requests(
        lambda self, request, resumable: _admit(self.vllm_config, request, resumable),
        lambda self: watches(self.vllm_config),
    )


def refuse_front(why: str) -> None:
    """Refuse every request that carries the field, where the plugin can't do what it asks.

    Raises:
        ImportError, AttributeError: vLLM takes requests in elsewhere, so that they could not be refused.
    """

    def refuse(self: Any, request: Any, resumable: bool) -> None:
        raise MismatchError(why)

    _wrap_requests(refuse)


def _wrap_requests(
    admit: Callable[[Any, Any, bool], None], always: Callable[[Any], bool] = lambda processor: False
) -> None:
    """Have `admit` see each request with the field, or every one that generates where `always` says so, once vLLM has
    prepared it; its errors become vLLM's refusal."""
    refusal: Any = REFUSAL.find()

    def make(process: Any) -> Any:
        def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
            request = process(self, *args, **kwargs)
            params = request.sampling_params
            if params is not None and (FIELD in (params.extra_args or {}) or always(self)):
                try:
                    admit(self, request, kwargs.get("resumable", False))
                except QwenScopeError as error:
                    raise refusal(f"{FIELD}: {printable(str(error))}") from error
            return request

        return process_inputs

    PROCESS_INPUTS.wrap(make)


def _admit(config: Any, request: Any, resumable: bool) -> None:
    """Put the admitted text into a request that vLLM has prepared; its sampling parameters are its own."""
    params = request.sampling_params
    given = params.extra_args or {}
    ask = Ask.from_text(given[FIELD]) if FIELD in given else Ask()
    extra = {key: value for key, value in given.items() if key != FIELD}
    if watches(config):
        ask = admission_of(config).watched(ask)
    if not ask.empty:
        if resumable or request.prompt_token_ids is None:
            raise InputError("a session that is fed in pieces, or a prompt of embeddings, can't be steered or read")
        prompt = len(request.prompt_token_ids)
        admitted = admission_of(config).admit(ask, prompt, params.max_tokens, params.n)
        if stop := [watch for watch in admitted.watch if watch.then == "stop"]:
            admitted = replace(admitted, end=end_of(params, stop[0].name))
        extra[FIELD] = admitted.to_text()
        wheres = [watch.where for watch in admitted.watch] + ([admitted.read.where] if admitted.read else [])
        if any(where.prompt or where.spans or where.prompt_phases for where in wheres):
            params.skip_reading_prefix_cache = True  # what is cached is not computed, and so not read
    params.extra_args = extra or None


def watches(config: Any) -> bool:
    """Whether the server itself watches every request."""
    known = config.__dict__.get("_qwen_scope_watches")
    if known is None:
        made = config.__dict__.get("_qwen_scope_admission")
        settings = settings_of(config) if made is None else made.settings
        known = config.__dict__["_qwen_scope_watches"] = settings is not None and settings.watch is not None
    return known


@contextmanager
def unwatched(config: Any) -> Iterator[None]:
    """For a server that tests itself before its first request."""
    known = watches(config)
    config.__dict__["_qwen_scope_watches"] = False
    try:
        yield
    finally:
        config.__dict__["_qwen_scope_watches"] = known


# What may keep the end of an answer from being sampled, so that it could not be stopped.
_ENDLESS = (
    ("min_tokens", 0),
    ("structured_outputs", None),
    ("allowed_token_ids", None),
    ("bad_words", None),
    ("thinking_token_budget", None),
    ("trace_decode_token_ids", None),
)


def end_of(params: Any, watch: str) -> int:
    """The token that ends an answer.

    Raises:
        InputError: none does, or sampling parameters may forbid it.
    """
    for name, none in _ENDLESS:
        if (value := getattr(params, name, none)) != none and value != []:
            raise InputError(f"the watch {watch!r} stops answers, which {name} may keep from ending; leave one away")
    if params.eos_token_id is None:
        raise InputError(f"the watch {watch!r} stops answers, which ignore_eos keeps from ending; leave one away")
    return params.eos_token_id


def wrap_keys() -> None:
    """Let the prefix cache tell apart blocks that interventions touched."""

    def make_keys(keys: Any) -> Any:
        def generate_block_hash_extra_keys(
            request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int
        ) -> Any:
            found, following = keys(request, start_token_idx, end_token_idx, start_mm_idx)
            own = block_key(request, start_token_idx, end_token_idx, lambda: tokenizer_of(_CORE["config"]))
            return (found if own is None else (*(found or ()), own)), following

        return generate_block_hash_extra_keys

    def make_core(made: Any) -> Any:
        def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
            _CORE["config"] = vllm_config
            made(self, vllm_config, *args, **kwargs)

        return init

    BLOCK_KEYS.wrap(make_keys)
    CORE_INIT.wrap(make_core)
