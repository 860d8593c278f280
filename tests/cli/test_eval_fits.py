"""`qwen-scope eval --post` from the command line: verdicts, what is kept, what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from qwen_scope.cli import main
from qwen_scope.cli.whose import saes_of_lab
from qwen_scope.model import load_model
from qwen_scope.sae import save_sae
from qwen_scope.text import Counted

# The command line prints them; here they would be errors.
pytestmark = pytest.mark.filterwarnings("always::qwen_scope.errors.QwenScopeWarning")

MODEL, SAES = tiny.folder() / "model", str(tiny.folder() / "sae")
SIZE = ["--layers", "0", "--tokens", "2600", "--context-length", "32", "--device", "cpu"]


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QWEN_SCOPE_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("corpus") / "c.jsonl"
    path.write_text("".join(json.dumps({"text": f"{text} {i}"}) + "\n" for i in range(80) for text in tiny.TEXTS[:3]))
    return str(path)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model with every weight moved."""
    folder = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(MODEL, folder)
    model = load_model(MODEL, device="cpu").model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * parameter.std())
    model.save_pretrained(folder)
    return str(folder)


def run(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(argv)
    out, err = capsys.readouterr()
    return code, out, " ".join(err.split())


def test_the_verdict_is_printed_kept_and_shown(
    corpus: str, other: str, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--model", str(MODEL), "--sae", SAES]
    code, out, err = run(["eval", corpus, *where, "--post", other, *SIZE], capsys)
    assert code == 0, err
    assert "Do they fit" in out
    assert "do not use" in out  # random SAEs explain nothing anywhere
    assert "Remembered in" in out
    assert "measured on the first" in " ".join(out.split())  # sinks, on the other checkpoint
    assert len(list((state / "verdicts").iterdir())) == 1
    code, out, err = run(["features", "hello", "--model", other, "--sae", SAES, "--device", "cpu", "--json"], capsys)
    assert code == 0, err
    json.loads(out)
    assert err.count("these SAEs on this model: do not use at layer 0") == 1
    code, out, err = run(["features", "hello", *where, "--device", "cpu", "--json"], capsys)
    assert "these SAEs on this model" not in err


def test_json_holds_all_of_it_and_nothing_is_kept_where_that_is_asked(
    corpus: str, other: str, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(
        ["eval", corpus, "--model", str(MODEL), "--sae", SAES, "--post", other, "--no-remember", "--json", *SIZE],
        capsys,
    )
    assert code == 0, err
    data = json.loads(out)
    fit = data["fits"]["layers.0.resid_post"]
    assert set(fit["figures"]) >= {"ev_base", "ev_post", "ev_fall", "jaccard", "over_control"}
    assert fit["moves"]["tested"] > 0
    assert data["remembered"] == []
    assert not state.exists()
    theirs, base = (Counted.from_json(data[name]) for name in ("counted_post", "counted"))
    assert theirs.norms.keys() == base.norms.keys()
    assert other in theirs.sample


def test_without_the_base_the_pair_is_measured_alone(
    corpus: str, other: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    named = tmp_path / "sae"
    save_sae([replace(tiny.random_sae(n), meta={"model": "google/gemma-2-2b"}) for n in (0, 2)], named)
    code, out, err = run(["eval", corpus, "--sae", str(named), "--post", other, "--json", *SIZE], capsys)
    assert code == 0, err
    assert "no --model was given, so the SAEs are measured on" in err
    data = json.loads(out)
    assert (data["quality"], data["transfer"]) == ({}, {})
    assert data["fits"]["layers.0.resid_post"]["moves"] is None
    assert not [name for name in data["fits"]["layers.0.resid_post"]["figures"] if name.endswith("base")]
    assert len(data["remembered"]) == 1


def test_conversations_get_a_verdict_by_phase(tmp_path: Path, other: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "chats.jsonl"
    turns = [("user", "Where is the station? {}"), ("assistant", "Over there, at the end of the long street {}.")]
    chats = [[{"role": role, "content": text.format(i)} for role, text in turns] for i in range(60)]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    asked = [
        "--column",
        "messages",
        "--chat",
        "default",
        "--model",
        str(MODEL),
        "--sae",
        SAES,
        "--post",
        other,
        "--json",
    ]
    code, out, err = run(["eval", str(path), *asked, *SIZE], capsys)
    assert code == 0, err
    phases = json.loads(out)["fits"]["layers.0.resid_post"]["phases"]
    assert {"user", "answer"} <= set(phases)
    assert phases["answer"]["tokens"] > 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--post": "nowhere/at/all"}, "there is no folder 'nowhere/at/all'"),
        ({"--post": "lab"}, "split text differently"),
        ({"--layers": "1"}, "no SAE for layer 1"),
        ({"--layers": "9"}, "no SAE for layer 9"),
        ({"--tokens": "100"}, "tokens that count, 2,000 are needed"),
        ({"--no-loss": ""}, "No verdict: whether SAEs fit is judged by the loss, too; leave out --no-loss."),
    ],
)
def test_what_can_not_be_judged_is_said(
    change: dict[str, str], said: str, corpus: str, other: str, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"--model": str(MODEL), "--sae": SAES, "--post": other, **dict(zip(SIZE[::2], SIZE[1::2], strict=True))}
    words = [word for pair in ({**options, **change}).items() for word in pair if word]
    _, out, err = run(["eval", corpus, *words], capsys)
    assert said in " ".join(out.split()) + err
    assert not state.exists()


def test_a_model_of_another_width_is_refused(corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from qwen_scope.foundry import make_model

    shutil.copytree(MODEL, tmp_path / "wide")
    make_model("dense", 512, 64, 3, 64, eos_token_id=1, pad_token_id=0).save_pretrained(tmp_path / "wide")
    words = ["--model", str(MODEL), "--sae", SAES, "--post", str(tmp_path / "wide"), *SIZE]
    code, _, err = run(["eval", corpus, *words], capsys)
    assert code == 2
    assert "reads residuals of 32 dimensions, the model's have 64: they do not belong together" in err


def test_which_saes_are_the_labs(tmp_path: Path) -> None:
    history = {"layers.0.resid_post": {"model": "lab", "tokens": 1, "began_as": []}}
    save_sae(replace(tiny.random_sae(0), meta={"history": history}), tmp_path / "sae")
    assert saes_of_lab("lab")
    assert saes_of_lab(str(tmp_path / "sae"))
    assert not saes_of_lab(SAES)
    assert not saes_of_lab("Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50")
