"""What is asked of workers is checked before anything is opened."""

from __future__ import annotations

import pytest

from qwen_scope.cli import main


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--on", "dask"], "workers run on ray, not on 'dask'"),
        (["--on", "ray", "--worker-cpus", "0"], "worker_cpus must be a finite number of at least 0.01; got 0.0"),
        (["--on", "ray", "--worker-gpus=-1"], "worker_gpus must be a finite number of at least 0; got -1.0"),
    ],
)
def test_what_workers_can_t_be(typed: list[str], said: str, tmp_path, capsys) -> None:
    assert main(["extract", "lab", "-o", str(tmp_path / "s"), *typed]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "s").exists()
