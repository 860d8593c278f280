"""vLLM's model runner V2 on a CPU without triton-cpu: Triton's interpreter poses as its CPU backend. Tests only."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"

import triton.backends  # pyright: ignore[reportMissingImports]
from triton.backends.driver import DriverBase  # pyright: ignore[reportMissingImports]


class Driver(DriverBase):
    """Says that there is a device, and is never asked for more."""

    @staticmethod
    def is_active() -> bool:
        return True


triton.backends.backends["cpu"] = triton.backends.Backend(compiler=None, driver=Driver)  # pyright: ignore
