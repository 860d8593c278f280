"""`extract` on a Ray cluster of two workers on this machine: the store of a single process, whatever dies meanwhile.

`KILLS=10 python -m pytest tests/cluster/test_ray.py -k die` kills a worker at random ten times.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import loopback
import numpy as np
import pyarrow.compute as pc
import pytest
import stores
import tiny
from killing import killing, workers
from test_merge import same

from qwen_scope.analysis import Rule, RuleFeature
from qwen_scope.cli import main
from qwen_scope.cluster import RayRunner, WorkerOptions
from qwen_scope.errors import InputError, MismatchError
from qwen_scope.sae import Identity, TopK, save_sae
from qwen_scope.scope import ExtractOptions, Job, ScopeOptions
from qwen_scope.store import is_store
from qwen_scope.text import Corpus

ray = pytest.importorskip("ray")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # what Ray warns of itself is not ours

OPTIONS = ExtractOptions(row_tokens=7, window_tokens=90, batch_tokens=80, pool=("mean", "last"))
HALF = WorkerOptions("ray", workers=2, worker_cpus=0.5)


def asked(sae: Path | None = None) -> ScopeOptions:
    return ScopeOptions(model=str(tiny.folder() / "model"), sae=str(sae or tiny.folder() / "sae"), device="cpu")


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket of a server on this machine."""
    with loopback.s3() as found:
        yield found


@pytest.fixture(scope="module", autouse=True)
def cluster(bucket: str) -> Iterator[None]:
    """One cluster for all tests: it takes seconds to start. Its workers have the environment of its beginning."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    yield
    ray.shutdown()


def equal_although_killed(folder: Path, times: int) -> list[int]:
    """Extract here and on workers that are killed so often; the stores are the same."""
    rows = [*stores.ROWS * (3 + times), {"other": 1}]
    scope = asked().open()
    scope.extract(Corpus(rows), folder / "one", OPTIONS).close()
    with killing(times, folder / "ray" / "activations") as killed:
        scope.extract(Corpus(rows), folder / "ray", OPTIONS, runner=RayRunner(asked(), HALF)).close()
    same(folder / "ray", folder / "one")
    assert not (folder / "ray" / "work").exists()
    return killed


def test_workers_that_die_leave_the_store_of_one_process(tmp_path) -> None:
    times = int(os.environ.get("KILLS", "1"))
    killed = equal_although_killed(tmp_path, times)
    assert len(killed) == times
    assert not set(killed) & set(workers())


def test_workers_write_their_parts_to_a_bucket(bucket: str, tmp_path: Path) -> None:
    rows, scope = [*stores.ROWS, {"other": 1}], asked().open()
    scope.extract(Corpus(rows), tmp_path / "one", OPTIONS).close()
    scope.extract(Corpus(rows), f"{bucket}/s", OPTIONS, runner=RayRunner(asked(), HALF)).close()
    fsspec.filesystem("s3").get(f"{bucket}/s/", str(tmp_path / "there"), recursive=True)
    # From a bucket there is no way to a folder here.
    manifest = json.loads((tmp_path / "there" / "manifest.json").read_text())
    manifest["sources"] = json.loads((tmp_path / "one" / "manifest.json").read_text())["sources"]
    (tmp_path / "there" / "manifest.json").write_text(json.dumps(manifest))
    same(tmp_path / "there", tmp_path / "one")
    assert not (tmp_path / "there" / "work").exists()
    with pytest.raises(InputError, match="can't write to memory://s, which is in the memory of this process alone"):
        scope.extract(Corpus(rows), "memory://s", OPTIONS, runner=RayRunner(asked(), HALF))
    assert not fsspec.filesystem("memory").exists("/s")


def test_what_fires_on_documents_is_that_of_one_process(tmp_path: Path, capsys) -> None:
    """What `classify fit` and `predict` ask for, with pooled residuals; and `predict` itself."""
    rows, scope, how = [*stores.ROWS * 2, {"other": 1}], asked().open(), replace(OPTIONS, pool=())
    here = scope.firings(Corpus(rows), None, how)
    there = scope.firings(Corpus(rows), None, how, runner=RayRunner(asked(), HALF))
    assert (there.rows, there.texts, there.left_out) == (here.rows, here.texts, here.left_out)
    assert there.table.drop(["value"]).equals(here.table.drop(["value"]))
    np.testing.assert_allclose(there.table["value"], here.table["value"], rtol=1e-5)
    for layer, mean in here.residuals.items():
        np.testing.assert_allclose(there.residuals[layer], mean, rtol=1e-4, atol=1e-5)
    info, feature = here.layers[2], here.table.filter(pc.field("layer") == 2)["feature"][0].as_py()
    rule, corpus = tmp_path / "rule.json", tmp_path / "c.jsonl"
    Rule("r", (RuleFeature(2, feature, 0.0, 1.0, 1.0, info.fingerprint),), {}).save(rule)
    corpus.write_text("".join(json.dumps(row) + "\n" for row in stores.ROWS))
    command = [
        "classify",
        "predict",
        str(rule),
        str(corpus),
        "--model",
        str(tiny.folder() / "model"),
        "--device",
        "cpu",
    ]
    command += ["--sae", str(tiny.folder() / "sae")]
    said = []
    for more in ([], ["--on", "ray", "--workers", "2", "--worker-cpus", "0.5"]):
        assert main([*command, *more]) == 0
        said.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    one, other = ([(row["row"], row["label"], row["because"][:1] != []) for row in lines] for lines in said)
    assert one == other
    assert any(label for _, label, _ in one)
    np.testing.assert_allclose([row["score"] for row in said[1]], [row["score"] for row in said[0]], rtol=1e-5)


# The row after the others', counted from 1.
POISONED = len(stores.ROWS) + 1


class Poisoned(Job):
    """An extraction whose workers die over one text, as they do where a document needs more memory than there is."""

    def write(self, number: int, window: str, *rest: Any) -> dict[str, Any]:
        if any(document["row"] == POISONED for document in json.loads(window)["documents"]):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().write(number, window, *rest)


class Poisoning(RayRunner):
    def run(self, job: Job) -> Iterator[tuple[int, dict[str, Any]]]:
        return super().run(Poisoned(**vars(job)))


def test_a_document_that_kills_every_worker_ends_in_a_sentence(tmp_path: Path) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    rows, scope = [*stores.ROWS, {"text": "Poison."}, {"other": 1}], asked().open()
    said = (
        r"2 workers have died over .*documents from row \d+ of list to row \d+ of list; leave what is wrong there out"
    )
    with pytest.raises(InputError, match=said):
        scope.extract(Corpus(rows), tmp_path / "s", OPTIONS, runner=Poisoning(asked(), HALF, tries=2))
    assert not is_store(tmp_path / "s")
    # What was written is kept, and workers that do not die finish it.
    scope.extract(Corpus(rows), tmp_path / "s", OPTIONS, runner=RayRunner(asked(), HALF)).close()
    scope.extract(Corpus(rows), tmp_path / "one", OPTIONS).close()
    same(tmp_path / "s", tmp_path / "one")


def test_a_cluster_without_a_free_slot_ends_in_a_sentence(tmp_path) -> None:
    begun = time.monotonic()
    for options, said in (
        (WorkerOptions("ray", workers=9), r"no free slot for 9 workers of 1 CPU each \(free: 2 CPU\)"),
        (WorkerOptions("ray", worker_gpus=0.5), r"2 workers of 1 CPU and 0.5 GPU each \(free: 2 CPU, 0 GPU\)"),
    ):
        with pytest.raises(InputError, match=said):
            asked().open().extract(Corpus(stores.ROWS), tmp_path / "s", OPTIONS, runner=RayRunner(asked(), options))
        assert not (tmp_path / "s").exists()
    assert time.monotonic() - begun < 60


def test_what_a_worker_runs_into_is_its_sentence(tmp_path) -> None:
    """Workers find other SAEs than the driver under the name they are given."""
    other = tmp_path / "sae"
    for layer in (0, 2):
        made = tiny.random_sae(layer)
        weights = made.W_enc, made.W_dec, made.b_enc, made.b_dec
        save_sae(TopK(*weights, k=made.k, hook_point=made.hook_point, identity=Identity("SAE", layer, "f" * 64)), other)
    with pytest.raises(MismatchError, match="a worker found another SAE for layer 0"):
        asked().open().extract(Corpus(stores.ROWS), tmp_path / "s", OPTIONS, runner=RayRunner(asked(other), HALF))
    assert not (tmp_path / "s").exists()
