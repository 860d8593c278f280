"""A run on several sources: mixed, resumed to the same, and measured again by `eval` on the same documents."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qwen_scope.cli import main
from qwen_scope.errors import FormatError
from qwen_scope.text import Corpus
from qwen_scope.train import EvalRun, TrainConfig, TrainRun, run_eval, run_train
from qwen_scope.train.run import corpus_of

from .conftest import sentences
from .test_checkpoint import Stop, stop_after


@pytest.fixture
def run(model_folder: Path, tmp_path: Path) -> TrainRun:
    places = []
    for name, n in (("many", 600), ("few", 200)):
        places.append(tmp_path / f"{name}.jsonl")
        lines = (json.dumps({"text": f"{name[0]} {text}"}) for text in sentences(n, seed=n))
        places[-1].write_text("\n".join(lines))
    return TrainRun(
        data=tuple(map(str, places)), model=str(model_folder), out=tmp_path / "run", group="g", layers=(1,),
        train=TrainConfig(d_sae=64, k=4, tokens=20 * 128, batch=128), context_length=16, batch_size=8, budget=2**19,
        checkpoint_every=5, eval_tokens=512, hold_out=10,
    )  # fmt: skip


def test_documents_of_training_and_measuring_are_of_all_sources(run: TrainRun) -> None:
    learnt, kept = (list(corpus_of(run, held_out=held_out)) for held_out in (False, True))
    assert len({(one.source, one.row) for one in learnt + kept}) == len(learnt) + len(kept) == 800
    assert {(one.source, one.row) for one in kept} == {
        *(("many.jsonl", row) for row in range(1, 601, 10)),
        *(("few.jsonl", row) for row in range(1, 201, 10)),
    }
    assert 30 <= sum(one.source == "few.jsonl" for one in learnt[:200]) <= 70  # a quarter of the rows
    assert 5 <= sum(one.source == "few.jsonl" for one in kept[:40]) <= 15
    other = corpus_of(replace(run, train=replace(run.train, seed=1)))
    assert [one.row for one in other] != [one.row for one in learnt]
    in_order = list(corpus_of(replace(run, shuffle=False)))
    assert [one.source for one in in_order] == ["many.jsonl"] * 540 + ["few.jsonl"] * 180
    assert isinstance(corpus_of(run), Corpus)


@pytest.mark.slow
def test_a_run_is_resumed_and_measured_again_on_the_same_documents(run: TrainRun, tmp_path: Path) -> None:
    whole = run_train(run)
    broken = replace(run, out=tmp_path / "broken")
    with pytest.raises(Stop):
        run_train(broken, on_step=stop_after(7))
    with pytest.raises(FormatError, match="kept while it was read shuffled, and here it is read in order"):
        run_train(replace(broken, resume=True, shuffle=False))
    again = run_train(replace(broken, resume=True))
    name = "layers.1.resid_post"
    assert again.saes[name].W_enc.equal(whole.saes[name].W_enc)
    found = run_eval(EvalRun(data=run.data, model=run.model, sae=str(whole.folder)))
    assert found.held_out == 10
    (quality,) = found.quality.values()
    assert quality.reconstruction.fvu == pytest.approx(whole.quality[name].reconstruction.fvu, rel=1e-6)


def test_the_command_takes_several_and_names_the_one_that_is_not_there(run: TrainRun, tmp_path: Path, capsys) -> None:
    shape = ["--d-sae", "64", "--k", "4", "--tokens", "2560", "--batch", "128", "--context-length", "16"]
    words = ["--model", run.model, *shape, "-o", str(tmp_path / "x")]
    assert main(["train", run.data[0], str(tmp_path / "gone.jsonl"), *words]) == 2
    assert "gone.jsonl" in capsys.readouterr().err
    assert main(["train", run.data[0], run.data[0], *words]) == 2
    assert "name each source of documents once" in capsys.readouterr().err
    assert not list(tmp_path.glob("x/SAE*"))
