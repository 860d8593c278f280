"""The entry point `vllm.general_plugins`: runs in every process of vLLM, and may run twice in one."""

from __future__ import annotations

import logging
import os

from qwen_scope.errors import QwenScopeError

from . import families, guard, seam_front, seam_worker

NAME = "qwen_scope"
"""Of the plugin, as `VLLM_PLUGINS` lists it."""


def register() -> None:
    """Put the plugin into this process of vLLM.

    A server that was started for it names it in `VLLM_PLUGINS`, and does not start where vLLM is not as expected.
    Elsewhere it stays out: vLLM runs as if it were not installed, and refuses the field of its requests.

    Raises:
        MismatchError: an unknown version of vLLM, or another form of a place that the plugin changes.
    """
    try:
        guard.check()
    except QwenScopeError as error:
        if NAME in os.environ.get("VLLM_PLUGINS", "").split(","):
            raise
        logging.getLogger(__name__).warning("qwen-scope is not at work: %s", error)
        seam_front.refuse_front(str(error))
        return
    families.register()
    seam_front.wrap_front()
    seam_front.wrap_keys()
    seam_worker.wrap_split()
    seam_worker.wrap_v1()
    seam_worker.wrap_v2()
