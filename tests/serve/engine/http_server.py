"""`vllm serve` of the lab in a process of its own, as the tests over HTTP start it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

import qwen_scope
from qwen_scope.serve import FIELD, ServeSettings

LAB = Path(qwen_scope.__file__).parent / "assets" / "lab"
PATIENCE = 600.0
"""Seconds until a server answers, on a machine that is busy with other things."""


@dataclass(frozen=True)
class Kind:
    """What a server is started with.

    Attributes:
        watch: a file of watches of the server.
        plugin: whether qwen-scope is at work in it.
        probe: whether it tells what it holds (`memory_probe`).
        cached: products that oneDNN keeps compiled. It compiles one for every size of a step that it meets, and its own
            bound of 1,024 is not reached within thousands of requests: memory grows with every new size until then.
        settings: of the plugin, in place of the usual ones.
    """

    watch: Path | None = None
    plugin: bool = True
    probe: bool = False
    cached: int = 1024
    settings: Mapping[str, Any] = field(default_factory=dict)


USUAL = Kind()


def command(folder: Path, port: int, kind: Kind = USUAL) -> list[str]:
    """A server of every layer, with a folder for recipes and perhaps a file of watches."""
    chosen = {
        "sae": str(LAB / "sae"), "layers": tuple(range(6)), "feature_layers": (2, 4), "read_layers": (4, 5),
        "recipes": str(folder / "recipes"), "watch": None if kind.watch is None else str(kind.watch),
    }  # fmt: skip
    settings = ServeSettings(**chosen | dict(kind.settings))
    extension = "memory_probe.Extension" if kind.probe else "qwen_scope.serve.seam_worker.WorkerExtension"
    ours = [
        "--additional-config", json.dumps({FIELD: settings.to_json()}), "--worker-extension-cls", extension,
        "--middleware", "qwen_scope.serve.http.Middleware",
    ]  # fmt: skip
    return [
        str(Path(sys.executable).with_name("vllm")), "serve", str(LAB / "model"), "--served-model-name", "lab",
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "256",
        "--block-size", "32", "--max-num-seqs", "16", "--kv-cache-memory-bytes", str(16 * 2**20), "--enforce-eager",
        "--api-key", "reads", *(ours if kind.plugin else ()),
        *(["--middleware", "memory_probe.Middleware"] if kind.probe else ()),
    ]  # fmt: skip


@contextmanager
def process(
    folder: Path, env: Mapping[str, str] | None = None, kind: Kind = USUAL
) -> Iterator[tuple[subprocess.Popen[bytes], str, Path]]:
    """The server's process, its address and its log; it is ended at the end."""
    chosen = os.environ | {
        "VLLM_PLUGINS": "qwen_scope" if kind.plugin else "", "QWEN_SCOPE_RECIPE_KEY": "writes",
        "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        # glibc gives back what is freed, so that memory which grows is memory that is held
        "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072",
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(kind.cached),
    }  # fmt: skip
    chosen.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "log"
    with log.open("w") as out:
        started = subprocess.Popen(
            command(folder, port, kind), env=chosen | dict(env or {}), stdout=out, stderr=subprocess.STDOUT
        )
        try:
            yield started, f"http://127.0.0.1:{port}", log
        finally:
            started.terminate()
            try:
                started.wait(60)
            except subprocess.TimeoutExpired:
                started.kill()
                raise


@dataclass(frozen=True)
class Served:
    """A server that answers."""

    url: str
    pid: int


@contextmanager
def answering(folder: Path, kind: Kind = USUAL) -> Iterator[Served]:
    """A server, once it answers."""
    with process(folder, kind=kind) as (started, url, log):
        until = time.monotonic() + PATIENCE
        while not up(url):
            assert started.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.5)
        yield Served(url, started.pid)


def up(url: str) -> bool:
    """Whether a server answers."""
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False
