"""Where requests enter vLLM, and where its engine names blocks: admission, and the prefix cache's key."""

from __future__ import annotations

import threading
from collections.abc import Callable
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
    _wrap_requests(lambda self, request, resumable: _admit(self.vllm_config, request, resumable))


def refuse_front(why: str) -> None:
    """Refuse every request that carries the field, where the plugin can't do what it asks.

    Raises:
        ImportError, AttributeError: vLLM takes requests in elsewhere, so that they could not be refused.
    """

    def refuse(self: Any, request: Any, resumable: bool) -> None:
        raise MismatchError(why)

    _wrap_requests(refuse)


def _wrap_requests(admit: Callable[[Any, Any, bool], None]) -> None:
    """Have `admit` see each request with the field, once vLLM has prepared it; its errors become vLLM's refusal."""
    refusal: Any = REFUSAL.find()

    def make(process: Any) -> Any:
        def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
            request = process(self, *args, **kwargs)
            if FIELD in (getattr(request.sampling_params, "extra_args", None) or {}):
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
    ask = Ask.from_text(params.extra_args[FIELD])
    extra = {key: value for key, value in params.extra_args.items() if key != FIELD}
    if not ask.empty:
        if resumable or request.prompt_token_ids is None:
            raise InputError("a session that is fed in pieces, or a prompt of embeddings, can't be steered or read")
        prompt = len(request.prompt_token_ids)
        admitted = admission_of(config).admit(ask, prompt, params.max_tokens)
        extra[FIELD] = admitted.to_text()
        where = None if admitted.read is None else admitted.read.where
        if where is not None and (where.prompt or where.spans or where.prompt_phases):
            params.skip_reading_prefix_cache = True  # what is cached is not computed, and so not read
    params.extra_args = extra or None


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
