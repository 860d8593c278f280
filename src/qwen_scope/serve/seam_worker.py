"""Where a worker of vLLM learns whose token is where: model runner V1 and V2, and what the server asks of workers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from .blocks import SET_FEATURES
from .guard import CHOOSE_V2, PREPARE_V1, SPLIT
from .protocol import text_of
from .rows import Step
from .vllm_config import check_runnable, settings_of, tokenizer_of
from .worker import Shape, Wanted, WorkerState, state_of


def make_state(model: Any, config: Any) -> WorkerState | None:
    """The state of a model that is being built, its blocks changed; None where the server has no settings of ours.

    Raises:
        QwenScopeError: what cannot be served.
    """
    settings = settings_of(config)
    if settings is None:
        return None
    check_runnable(config)
    scheduler, count = config.scheduler_config, config.model_config.hf_text_config.num_hidden_layers
    state = WorkerState(
        settings,
        Shape(count, config.model_config.get_hidden_size(), scheduler.max_num_seqs, scheduler.max_num_batched_tokens),
        config.model_config.dtype,
        next(p for p in model.parameters() if p.device.type != "meta").device,
        functools.partial(tokenizer_of, config),
    )
    state.install(model)
    return state


def wrap_split() -> None:
    """Let graphs that are compiled in pieces be split where features are set: that code has to run at every step."""

    def make(split: Any) -> Any:
        def set_splitting_ops_for_v1(self: Any, *args: Any, **kwargs: Any) -> None:
            split(self, *args, **kwargs)
            if self.splitting_ops and SET_FEATURES not in self.splitting_ops:
                self.splitting_ops.append(SET_FEATURES)

        return set_splitting_ops_for_v1

    SPLIT.wrap(make)


def wrap_v1() -> None:
    """Tell the state of each step before its forward pass, in model runner V1."""

    def make(prepare: Any) -> Any:
        def _prepare_inputs(self: Any, scheduler_output: Any, num_scheduled_tokens: np.ndarray) -> Any:
            made = prepare(self, scheduler_output, num_scheduled_tokens)
            state = state_of(self.get_model())
            if state is not None:
                _begin_v1(self, state, num_scheduled_tokens)
            return made

        return _prepare_inputs

    PREPARE_V1.wrap(make)


def _begin_v1(runner: Any, state: WorkerState, counts: np.ndarray) -> None:
    batch, known = runner.input_batch, runner.__dict__.setdefault("_qwen_scope_wanted", {})
    for gone in known.keys() - runner.requests.keys():  # an empty step may have told of their end
        state.forget(known.pop(gone))
        state.watching.forget(gone)
    count = batch.num_reqs
    names = batch.req_ids[:count]
    for name in names:
        if name not in known:
            known[name] = state.wanted(text_of(runner.requests[name].sampling_params))

    def tokens(i: int, first: int, end: int) -> Sequence[int]:
        return batch.token_ids_cpu[i, first:end].tolist()

    step = Step(
        np.asarray(counts[:count], np.int64),
        batch.num_computed_tokens_cpu[:count].astype(np.int64),
        batch.num_prompt_tokens[:count].astype(np.int64),
    )
    state.begin(step, [known[name] for name in names], names, tokens)


def wrap_v2() -> None:
    """The same in model runner V2, through the state object that it keeps for its model."""

    def make(choose: Any) -> Any:
        def resolve_model_state_cls(vllm_config: Any, model: Any) -> type:
            kind = choose(vllm_config, model)
            return kind if state_of(model) is None else _told(kind)

        return resolve_model_state_cls

    CHOOSE_V2.wrap(make)


@functools.cache
def _told(kind: Any) -> type:
    """A subclass of the model's own kind of state that tells ours; hybrid models have a kind of their own."""

    class Told(kind):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            state = state_of(self.model)
            assert state is not None, "only a served model gets this class"
            self.qwen_scope: WorkerState = state
            self.qwen_scope_wanted: dict[str, Wanted | None] = {}

        def add_request(self, req_index: int, new_req_data: Any) -> None:
            super().add_request(req_index, new_req_data)
            self.qwen_scope_wanted[new_req_data.req_id] = self.qwen_scope.wanted(text_of(new_req_data.sampling_params))

        def remove_request(self, req_id: str) -> None:
            super().remove_request(req_id)
            self.qwen_scope.forget(self.qwen_scope_wanted.pop(req_id, None))

        def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
            count, places = input_batch.num_reqs, input_batch.idx_mapping_np

            def tokens(i: int, first: int, end: int) -> Sequence[int]:
                return req_states.all_token_ids.gpu[int(places[i]), first:end].tolist()

            step = Step(
                np.asarray(input_batch.num_scheduled_tokens[:count], np.int64),
                input_batch.num_computed_tokens_np[:count].astype(np.int64),
                req_states.prompt_len.np[places[:count]].astype(np.int64),
            )
            names = input_batch.req_ids[:count]
            self.qwen_scope.begin(step, [self.qwen_scope_wanted.get(name) for name in names], names, tokens)
            return super().prepare_inputs(input_batch, req_states)

        def postprocess_state(self, idx_mapping: Any, num_sampled: Any, *args: Any, **kwargs: Any) -> None:
            self.qwen_scope.end()
            super().postprocess_state(idx_mapping, num_sampled, *args, **kwargs)

    return Told


class WorkerExtension:
    """`--worker-extension-cls`: what a server asks of every worker through `collective_rpc`, in plain values."""

    def qwen_scope_take(self, ticket: str) -> dict[str, Any] | None:
        """What this worker read under a ticket."""
        state = state_of(self.model_runner.get_model())  # pyright: ignore[reportAttributeAccessIssue]
        return None if state is None else state.take(ticket)

    def qwen_scope_alarms(self, ticket: str) -> dict[str, Any] | None:
        """What watches raised under a ticket."""
        state = state_of(self.model_runner.get_model())  # pyright: ignore[reportAttributeAccessIssue]
        return None if state is None else state.watching.take(ticket)

    def qwen_scope_drop(self, ticket: str) -> None:
        """Nobody will fetch what is read, or raised, under a ticket."""
        state = state_of(self.model_runner.get_model())  # pyright: ignore[reportAttributeAccessIssue]
        if state is not None:
            state.drop(ticket)

    def qwen_scope_state(self) -> WorkerState | None:
        """The state itself, for an engine in the same process; it does not travel to another."""
        return state_of(self.model_runner.get_model())  # pyright: ignore[reportAttributeAccessIssue]

    def qwen_scope_status(self) -> dict[str, Any] | None:
        """What this worker holds; None where the plugin is not at work in it."""
        state = state_of(self.model_runner.get_model())  # pyright: ignore[reportAttributeAccessIssue]
        return None if state is None else state.status()
