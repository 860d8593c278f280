"""What is asked of workers is checked before anything is opened."""

from __future__ import annotations

import socket

import pytest

from qwen_scope.cli import main
from qwen_scope.cluster import WorkerOptions
from qwen_scope.errors import InputError


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--on", "dask"], "workers run on ray or torchrun, not on 'dask'"),
        (["--on", "torchrun"], "--on torchrun needs processes that torchrun starts: torchrun --nproc-per-node N -m"),
        (["--on", "ray", "--worker-cpus", "0"], "worker_cpus must be a finite number of at least 0.01; got 0.0"),
        (["--on", "ray", "--worker-gpus=-1"], "worker_gpus must be a finite number of at least 0; got -1.0"),
    ],
)
def test_what_workers_can_t_be(typed: list[str], said: str, tmp_path, capsys) -> None:
    assert main(["extract", "lab", "-o", str(tmp_path / "s"), *typed]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("protocol", ["", "ray://"])
def test_an_address_where_nothing_listens_is_told_at_once(protocol: str) -> None:
    pytest.importorskip("ray")
    from qwen_scope.cluster.runner import cluster

    with socket.socket() as held:  # bound and not listening: nobody else takes the port meanwhile
        held.bind(("127.0.0.1", 0))
        address = f"{protocol}127.0.0.1:{held.getsockname()[1]}"
        said = f"no Ray cluster answers at {address}: Connection refused; start one with: ray start --head"
        with pytest.raises(InputError, match=said), cluster(WorkerOptions("ray", address=address)):
            pass
