"""A scoreboard's figures restated with plain arithmetic, its controls, and a run that was stopped."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from qwen_scope import load_sae, save_sae
from qwen_scope.cli import main
from qwen_scope.errors import InputError, MismatchError, NotFoundError
from qwen_scope.model import HookPoint, load_model
from qwen_scope.score import ARMS, FIGURES, Scoreboard, ScoreRun, control, cost, score, scoreboard_html
from qwen_scope.text import Corpus, CorpusOptions, Counted, TokenRows
from qwen_scope.train import TrainConfig, train

POINT = HookPoint(0)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("score") / "c.jsonl"
    rows = [{"text": f"{text} {i}" * 3} for i in range(24) for text in tiny.TEXTS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def asked(texts: Path, out: Path, **other: Any) -> ScoreRun:
    model, sae = (str(tiny.folder() / name) for name in ("model", "sae"))
    sizes: dict[str, Any] = {"tokens": 128, "train_tokens": 256, "batch": 64, "context_length": 16, "batch_size": 4}
    given: dict[str, Any] = {"layers": (0,), "hold_out": 4, "device": "cpu"}
    return ScoreRun(sae, str(texts), out, model, **sizes | given | other)


@pytest.fixture(scope="module")
def board(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Scoreboard:
    return score(asked(texts, tmp_path_factory.mktemp("board")))


def held_out(texts: Path) -> list[torch.Tensor]:
    corpus = Corpus.of(str(texts), CorpusOptions(), hold_out=4, held_out=True, shuffle=0, longest=8 * 16)
    loaded = load_model(str(tiny.folder() / "model"), device="cpu")
    return list(TokenRows(corpus, loaded.tokenizer, context_length=16, batch_size=4))[:2]


def restated(sae: Any, texts: Path) -> dict[str, float]:
    """Every figure over all tokens: dense arithmetic in float64, and a hook of our own."""
    model = load_model(str(tiny.folder() / "model"), device="cpu").model
    ids = torch.cat(held_out(texts))
    seen: list[torch.Tensor] = []

    def through(change: Any) -> torch.Tensor:
        hook = model.model.layers[0].register_forward_hook(lambda _, __, out: change(out))
        with torch.no_grad():
            logits = model(input_ids=ids).logits.double().log_softmax(-1)
        hook.remove()
        return logits

    def coded(h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pre = h.reshape(-1, h.shape[-1]) @ sae.W_enc.float().T + sae.b_enc
        kept = torch.zeros_like(pre).scatter(1, pre.topk(sae.k).indices, 1.0) * pre.clamp(min=0)
        return kept, (kept @ sae.W_dec.float().T + sae.b_dec).reshape(h.shape)

    clean = through(lambda h: (seen.append(h), h)[1])
    spliced, zeroed = through(lambda h: coded(h)[1]), through(torch.zeros_like)
    acts, x_hat = coded(seen[0])
    x, x_hat = seen[0].reshape(-1, 32).double(), x_hat.reshape(-1, 32).double()
    error, spread = (x - x_hat).square().sum(1), (x - x.mean(0)).square().sum(1)

    def loss(logits: torch.Tensor) -> float:
        return float(-logits[:, :-1].gather(-1, ids[:, 1:, None]).mean())

    def kl(logits: torch.Tensor) -> float:
        return float((clean.exp() * (clean - logits)).sum(-1).mean())

    return {
        "explained_variance": 1 - float(error.sum() / spread.sum()),
        "explained_variance_per_token": float((1 - error / spread).mean()),
        "cosine": float(torch.cosine_similarity(x, x_hat).mean()),
        "l0": float((acts > 0).sum(1).double().mean()),
        "dead": float((~(acts > 0).any(0)).double().mean()),
        "ce_spliced": loss(spliced),
        "ce_recovered": (loss(zeroed) - loss(spliced)) / (loss(zeroed) - loss(clean)),
        "kl": kl(spliced),
        "kl_recovered": 1 - kl(spliced) / kl(zeroed),
    }


@pytest.mark.parametrize("arm", ARMS)
def test_every_figure_is_what_plain_arithmetic_gives(arm: str, board: Scoreboard, texts: Path) -> None:
    place = tiny.folder() / "sae" if arm == "trained" else board.run.out / "controls" / arm.replace(" ", "-") / "layer0"
    expected = restated(load_sae(place, 0), texts)
    assert set(expected) == set(FIGURES)
    assert board.cells[0][arm]["with sinks"] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_a_gain_counts_towards_the_better(board: Scoreboard) -> None:
    own, other = (board.cells[0][arm]["with sinks"] for arm in ("trained", "frozen decoder"))
    assert board.gain(0, "frozen decoder", "with sinks", "cosine") == pytest.approx(own["cosine"] - other["cosine"])
    assert board.gain(0, "frozen decoder", "with sinks", "kl") == pytest.approx(other["kl"] - own["kl"])
    plain = json.loads(json.dumps(board.to_json()))
    assert plain["gains"]["0"]["frozen decoder"]["with sinks"]["l0"] is None
    # The tiny SAEs are random: every control that learnt something does better, and the table says so.
    assert (0, "frozen encoder", "with sinks", "explained_variance") in board.not_better()
    assert {"layer": 0, "control": "frozen encoder", "sinks": "with sinks", "figure": "cosine"} in plain["not_better"]


def test_the_page_stands_alone(board: Scoreboard) -> None:
    text = scoreboard_html(board)
    assert "<script" not in text
    for said in ("without sinks", "frozen decoder", "kl_recovered", "A control does as well or better"):
        assert said in text


@pytest.mark.parametrize("frozen", [("W_dec",), ("W_enc", "b_enc"), ("W_enc", "W_dec", "b_enc", "b_dec"), ()])
def test_what_is_frozen_stays_and_the_rest_learns(frozen: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 32) * torch.linspace(0.2, 2, 32) + 0.3
    batches = [{"layers.0.resid_post": x}] * 12
    config = TrainConfig(d_sae=96, k=6, tokens=256, batch=256, pre_bias=False, scale_input=False, frozen=frozen)
    drawn = train(replace(config, frozen=("W_enc", "W_dec", "b_enc", "b_dec")), batches)["layers.0.resid_post"]
    made = train(replace(config, tokens=256 * 12), batches)["layers.0.resid_post"]
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        same = torch.allclose(getattr(made, name), getattr(drawn, name), atol=1e-6)
        assert same is (name in frozen), name


def test_a_run_that_is_not_frozen_writes_the_config_that_it_wrote() -> None:
    config = TrainConfig(d_sae=8, k=2, tokens=64, batch=8)
    assert "frozen" not in config.to_json()
    assert replace(config, frozen=("W_dec",)).to_json()["frozen"] == ["W_dec"]
    with pytest.raises(InputError, match="what can be frozen is W_enc, W_dec, b_enc, b_dec, not 'W'"):
        replace(config, frozen=("W",))


def test_a_stopped_run_goes_on_and_does_nothing_twice(
    texts: Path, board: Scoreboard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = asked(texts, tmp_path / "out")
    assert cost(run).done == 0
    assert cost(run).trained == 2 * 256 + 64  # random directions are fitted by one batch
    module = sys.modules["qwen_scope.score.scoreboard"]
    whole, seen = module._figures, []

    def stops(*given: Any) -> Any:
        seen.append(given)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return whole(*given)

    monkeypatch.setattr(module, "_figures", stops)
    with pytest.raises(KeyboardInterrupt):
        score(run)
    left = cost(run)
    assert (left.cells, left.done, left.trained) == (4, 1, 256 + 64)
    monkeypatch.setattr(module, "_figures", whole)
    assert score(run).cells == board.cells
    monkeypatch.setattr(module, "load_model", lambda *_, **__: pytest.fail("nothing is left to measure"))
    assert score(run).cells == board.cells
    with pytest.raises(MismatchError, match="holds a scoreboard with tokens 128, not 256"):
        score(replace(run, tokens=256))


def test_text_is_of_every_source_from_the_first_rows_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, word in (("a", "north"), ("b", "south")):
        rows = [{"text": f"{word} {i} " * 8} for i in range(200)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    module, read = sys.modules["qwen_scope.score.scoreboard"], []
    measure, make = module.evaluate_saes, module.control
    monkeypatch.setattr(
        module, "evaluate_saes", lambda m, s, rows, **o: (read.append(rows), measure(m, s, rows, **o))[1]
    )
    monkeypatch.setattr(
        module,
        "control",
        lambda a, s, k, m, rows, *o, **n: (read.append(rows.take(256)), make(a, s, k, m, rows, *o, **n))[1],
    )
    score(asked(folder, tmp_path / "out"))
    tokenizer = load_model(str(tiny.folder() / "model"), device="cpu").tokenizer
    assert len(read) == 2 * len(ARMS) + len(ARMS) - 1
    for rows in read:
        text = "".join(tokenizer.batch_decode(torch.cat(rows)))
        assert "north" in text
        assert "south" in text


@pytest.mark.parametrize("order", [None, "shuffled", "shuffled, texts cut at 1024 characters"])
def test_a_folder_that_was_measured_in_another_order_is_refused(texts: Path, tmp_path: Path, order: str | None) -> None:
    run = asked(texts, tmp_path / "out")
    before = {name: value for name, value in run.to_json().items() if name != "order"}
    before |= {} if order is None else {"order": order}
    run.out.mkdir()
    (run.out / "score.json").write_text(json.dumps(before))
    now = f"shuffled, texts cut at {8 * run.context_length} characters"
    with pytest.raises(MismatchError, match=f"with order {order!r}, not {now!r}; name another"):
        score(run)


def test_a_refused_pair_leaves_no_scoreboard_behind(texts: Path, tmp_path: Path) -> None:
    save_sae(tiny.random_sae(0, d_model=16), tmp_path / "narrow")
    with pytest.raises(MismatchError, match="reads residuals of 16 dimensions, the model's have 32"):
        score(replace(asked(texts, tmp_path / "out"), sae=str(tmp_path / "narrow")))
    assert not (tmp_path / "out" / "score.json").exists()


def test_without_controls(texts: Path, tmp_path: Path) -> None:
    found = score(asked(texts, tmp_path, controls=False))
    assert list(found.cells[0]) == ["trained"]
    assert not (tmp_path / "controls").exists()
    assert found.not_better() == []


def test_the_cost_is_what_goes_through_the_model(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens at the first block and at the head, counted while it runs."""
    seen = {"first": 0, "head": 0}
    module = sys.modules["qwen_scope.score.scoreboard"]
    load = module.load_model

    def counting(*args: Any, **kwargs: Any) -> Any:
        loaded = load(*args, **kwargs)
        for name, part in (("first", loaded.model.model.layers[0]), ("head", loaded.model.lm_head)):
            part.register_forward_hook(
                lambda _, given, __, name=name: seen.update({name: seen[name] + given[0].shape[:2].numel()})
            )
        return loaded

    monkeypatch.setattr(module, "load_model", counting)
    run = asked(texts, tmp_path / "out", suites=("steering",), train_tokens=300)
    told = cost(run)
    found = score(run)
    assert (told.cells, told.read, told.measured) == (4, 4 * 4 * 128, 4 * 6 * 128)
    assert told.trained == 2 * 256 + 64  # whole batches
    assert [cost(replace(run, tokens=n, out=tmp_path / "x")).measured for n in (2, 100)] == [4 * 6 * 64] * 2
    assert found.unmeasured["steering"]  # too little text, so nothing of it was read
    assert seen["head"] == told.measured
    # Beside that, which tokens count was measured twice, and each control's buffer took up to three batches more.
    more = seen["first"] - told.measured - told.read - told.trained
    assert 2 * 128 <= more <= 2 * 128 + 3 * 3 * 64
    assert cost(run).measured == cost(run).trained == 0


def test_time_is_told_for_every_stage(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = cost(asked(texts, tmp_path / "out"), timed=True)
    assert found.minutes is not None
    assert set(found.minutes) == {"reconstruction", "controls", "absorption", "steering"}
    assert all(minutes > 0 for minutes in found.minutes.values())
    assert found.minutes["reconstruction"] < 1
    alone = cost(asked(texts, tmp_path / "out", controls=False, suites=("absorption",)), timed=True).minutes
    assert alone is not None
    assert set(alone) == {"reconstruction", "absorption"}
    model, sae = (str(tiny.folder() / name) for name in ("model", "sae"))
    words = ["score", sae, str(texts), "--model", model, "-o", str(tmp_path / "o"), "--layers", "0", "--hold-out", "4"]
    words += ["--context-length", "16", "--batch-size", "4", "--train-tokens", "64", "--batch", "64", "--device", "cpu"]
    assert main([*words, "--dry-run"]) == 0
    assert "minutes" not in (said := capsys.readouterr().out)
    assert "steering" in said
    assert main([*words, "--time"]) == 0
    assert "minutes as fast as now" in capsys.readouterr().out
    assert not (tmp_path / "o").exists()


def test_a_control_has_a_name() -> None:
    sae, loaded = tiny.random_sae(), load_model(str(tiny.folder() / "model"), device="cpu")
    rows = TokenRows(Corpus([{"text": "x"}], name="x"), loaded.tokenizer, context_length=16, batch_size=4)
    with pytest.raises(InputError, match="a control is one of frozen decoder"):
        control("none", sae, 4, loaded.model, rows, POINT, Counted(), tokens=64, batch=64, budget=10**6)


def test_the_command(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, sae = (str(tiny.folder() / name) for name in ("model", "sae"))
    words = ["score", sae, str(texts), "--model", model, "-o", str(tmp_path / "o"), "--layers", "0", "--tokens", "128"]
    words += ["--context-length", "16", "--batch-size", "4", "--train-tokens", "64", "--batch", "64", "--device", "cpu"]
    assert main([*words, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cells"] == 4
    assert not (tmp_path / "o").exists()
    assert main([*words, "--html", str(tmp_path / "s.html"), "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["layers"]["0"]) == set(ARMS)
    assert main(words) == 0
    assert "Layer 0, without sinks" in capsys.readouterr().out
    for more, says in (
        (["--layers", "1"], "has no layer 1; it has layers 0, 2"),
        (["--train-tokens", "8"], "train_tokens=8 is less than one batch of 64"),
        (["--tokens", "256"], "name another folder with --out"),
        (["--suites", "tppp"], "there is no suite 'tppp'; did you mean 'tpp'"),
        (["--suites", "tpp"], "tpp reads labelled texts; name them with --probes or --columns"),
        (["--columns", "nothing", "-o", str(tmp_path / "n")], "no document that was read has a column 'nothing'"),
        (["--columns", "a", "--probes", "x.whl"], "give one of the two"),
    ):
        assert main([*words, *more]) == 2
        assert says in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "n").exists()
    with pytest.raises(NotFoundError, match="has no layer 7"):
        cost(asked(texts, tmp_path / "p", layers=(7,)))
