"""Shapes in public signatures are checked while the tests run; no test may reach the network."""

from __future__ import annotations

import gc
import os
import signal
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Verdicts that tests make or find are not the user's.
os.environ["QWEN_SCOPE_STATE"] = tempfile.mkdtemp(prefix="qwen-scope-state-")
if not Path("/dev/nvidia0").exists():
    # Without a GPU Triton's kernels run in its interpreter; it asks when it is first imported, by whomever.
    os.environ.setdefault("TRITON_INTERPRET", "1")
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    # The workers share the processor: each, and what it starts, takes its part of the cores.
    cores = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores)))
# What a shell starts in the background ignores interrupts, and so would the commands that the tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
sys.path.insert(0, str(Path(__file__).parent))  # for shapes, tiny, families
# What is imported stays; looking through it every 700 new objects, while it still grows, finds nothing.
COLLECTED = gc.get_threshold()
gc.set_threshold(100_000, *COLLECTED[1:])

import shapes  # noqa: E402

# Not the lab: it has no tensors, and checking every call of its grammar would take most of the suite's time. Not the
# explorer: Gradio asks whether a handler is a generator function, which a checked one no longer says.
ROOMS = (
    "analysis",
    "circuits",
    "cli",
    "features",
    "foundry",
    "model",
    "posttrain",
    "report",
    "sae",
    "scope",
    "score",
    "serve",
    "stats",
    "steer",
    "store",
    "train",
)
# Not what counts the steps of a template: it is called for each, and most of the time of tests of chats was that.
TEXT = [path.stem for path in (Path(__file__).parents[1] / "src/qwen_scope/text").glob("*.py") if path.stem != "steps"]
shapes.install([f"qwen_scope.{name}" for name in (*ROOMS, *(f"text.{module}" for module in TEXT))])


def pytest_collection_finish() -> None:
    """What is imported by now stays: Trainer collects garbage in every run, and would walk all of it each time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECTED)
