"""Experiments resume where they were stopped, and every section of docs/results.md belongs to one of them."""

from __future__ import annotations

import ast
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from experiments.harness import At, Experiment, Row, main
from experiments.real import answers, codeswitch, depth
from experiments.real.quality import figures
from experiments.sections import BY_HAND, write_section
from qwen_scope import load_scope
from qwen_scope.errors import QwenScopeWarning
from qwen_scope.lab import documents
from qwen_scope.steer import GeneratedToken, Generation

ROOT = Path(__file__).parents[1]
STEPS = (1, 2)  # a constant that the settings of the toy below hold
ran: list[tuple[str, int]] = []


@dataclass(frozen=True)
class Sizes:
    texts: int = 10


def run(at: At[Sizes], condition: str, seed: int) -> dict[str, Any]:
    ran.append((condition, seed))
    return {"score": at.sizes.texts * seed, "shared": at.kept("shared", lambda: {"made": len(ran)})["made"]}


def tell(at: At[Sizes], rows: list[Row]) -> str:
    return "; ".join(f"{row['condition']} {row['seed']}: {row['score']}" for row in rows)


toy = Experiment(
    title="A toy",
    varies={"condition": ("plain", "steered"), "seed": (1, 2)},
    run=run,
    tell=tell,
    sizes=Sizes(),
    quick={"seed": (1,)},
    quick_sizes=Sizes(texts=3),
    takes=lambda condition, seed: condition == "plain" or seed == 1,
    options={"shift": {"type": int, "default": 0}},
)


@pytest.fixture(autouse=True)
def forget() -> None:
    ran.clear()


def test_cells_run_once_and_are_told_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(toy, ["--keep", str(tmp_path)])
    assert ran == [("plain", 1), ("plain", 2), ("steered", 1)]
    assert capsys.readouterr().out == "plain 1: 10; plain 2: 20; steered 1: 10\n"
    main(toy, ["--keep", str(tmp_path), "--seeds", "1-3", "--conditions", "plain"])
    assert ran[3:] == [("plain", 3)]
    assert capsys.readouterr().out == "plain 1: 10; plain 2: 20; plain 3: 30\n"
    assert json.loads((tmp_path / "shared.json").read_text()) == {"made": 1}


def test_a_torn_last_line_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(toy, ["--keep", str(tmp_path)])
    path = tmp_path / "runs.jsonl"
    first, second, third = path.read_text().splitlines(keepends=True)
    path.write_text(first + second + third[:20])
    ran.clear()
    with pytest.warns(QwenScopeWarning, match="torn"):
        main(toy, ["--keep", str(tmp_path)])
    assert ran == [("steered", 1)]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["cell"] for line in lines][2:] == [{"condition": "steered", "seed": 1}]
    assert path.read_text().startswith(first + second)


def test_settings_are_written_beside_and_not_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(toy, ["--keep", str(tmp_path), "--quick"])
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["sizes"] == {"texts": 3}
    assert config["constants"]["STEPS"] == [1, 2]
    assert config["levels"] == {"condition": ["plain", "steered"], "seed": [1]}
    assert config["versions"]["python"] == sys.version.split()[0]
    for arguments, word in (([], "texts 3, now 10"), (["--quick", "--shift", "5"], "shift 0, now 5")):
        with pytest.raises(SystemExit) as stopped:
            main(toy, ["--keep", str(tmp_path), *arguments])
        assert stopped.value.code == 2
        assert word in capsys.readouterr().err
    assert len(ran) == 2


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--conditions", "stered"], "plain, steered"),
        (["--seeds", "one"], "numbers"),
        (["--quick", "--write"], "--quick is for trying out"),
    ],
)
def test_refused(arguments: list[str], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(toy, ["--keep", str(tmp_path / "kept"), *arguments])
    assert stopped.value.code == 2
    assert word in capsys.readouterr().err
    assert not ran


def test_a_section_keeps_what_people_wrote(tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    page.write_text(f"# Results\n\nHead.\n\n## One\n\nold 1\n\n{BY_HAND}\n\nA remark.\n\n## Two\n\nold 2\n")
    write_section("One", "new 1", page)
    write_section("Two", "new 2", page)
    write_section("Three", "new 3", page)
    assert page.read_text() == (
        f"# Results\n\nHead.\n\n## One\n\nnew 1\n\n{BY_HAND}\n\nA remark.\n\n## Two\n\nnew 2\n\n## Three\n\nnew 3\n"
    )


def titles() -> dict[str, str]:
    """The title of each experiment, read from its script without running it."""
    found = {}
    for path in sorted((ROOT / "experiments").glob("*/*.py")):
        assigned = {
            target.id: node.value
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        if "experiment" in assigned:
            title = assigned["TITLE"]
            assert isinstance(title, ast.Constant)
            found[f"experiments.{path.parent.name}.{path.stem}"] = str(title.value)
    return found


@pytest.mark.slow
def test_every_section_belongs_to_one_experiment_and_every_experiment_has_one() -> None:
    sections = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").split("\n## ")[1:]
    owners: dict[str, list[str]] = {script: [] for script in titles()}
    for section in sections:
        heading = section.split("\n", 1)[0]
        own = [script for script, title in titles().items() if heading == title or heading.startswith(f"{title}: ")]
        assert len(own) == 1, f"{heading} belongs to {own}"
        assert f"python -m {own[0]}" in section, f"{heading} does not name its command"
        owners[own[0]].append(heading)
    assert all(owners.values()), owners


def test_bench_measures_speed_and_owns_the_performance_page() -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^## `bench/(\w+\.py)`", page, re.MULTILINE))
    sources = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "bench").glob("*.py")}
    writing = {name for name, text in sources.items() if f'write("{name}"' in text}
    assert named == writing
    assert not any("experiments" in text for text in sources.values())


def started(keep: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "experiments.lab.selectivity", "--quick", "--keep", str(keep), *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_the_cheapest_experiment_runs_from_the_command_line(tmp_path: Path) -> None:
    process = started(tmp_path, "--languages", "zh")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.startswith("`python -m experiments.lab.selectivity --write`: ")
    assert json.loads((tmp_path / "runs.jsonl").read_text())["cell"] == {"language": "zh"}


@pytest.mark.slow
def test_a_killed_experiment_resumes(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    first = started(tmp_path)
    deadline = time.monotonic() + 300
    while not (path.exists() and path.read_text().endswith("\n")) and first.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert first.returncode == -signal.SIGKILL, "it ended before it could be killed"
    kept = path.read_text()
    assert [json.loads(line)["cell"] for line in kept.splitlines()] == [{"language": "de"}]
    path.write_text(kept + '{"cell": {"langu')  # and a line that another kill tore
    second = started(tmp_path)
    out, err = second.communicate(timeout=300)
    assert second.returncode == 0, err
    assert path.read_text().startswith(kept)
    cells = [json.loads(line)["cell"]["language"] for line in path.read_text().splitlines()]
    assert cells == ["de", "zh"]
    assert [len(re.findall(rf"^\| {language}/rude \|", out, re.MULTILINE)) for language in cells] == [2, 2]


def test_a_base_model_is_asked_by_examples_and_its_answer_ends_at_the_next_question(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scope = load_scope("lab", device="cpu")
    words = [answers.asked(scope, "Why?"), answers.asking(scope, "German")]
    assert words == ["Why?", "Answer in German. "]
    monkeypatch.setattr(scope.tokenizer, "chat_template", None)
    assert answers.asked(scope, "Why?") == "Question: Why?\nAnswer:"
    assert [len(worked) for worked in answers.WORKED.values()] == [len(answers.QUESTIONS)] * 4
    before = answers.asking(scope, "German")
    assert before.count("Question:") == before.count("\nAnswer: ") == 3
    assert before.endswith("reifen.\n\n")

    def ended(text: str) -> Generation:
        ids = scope.tokenizer(text)["input_ids"]
        tokens = tuple(GeneratedToken(i, str(scope.tokenizer.decode([i])), None) for i in ids)
        return answers.first(scope, Generation("", text, tokens, False, ()))

    cut = ended(" Honey is sweet.\n\nQuestion: Why?\nAnswer: It")
    assert cut.text == " Honey is sweet."
    assert str(scope.tokenizer.decode([one.token_id for one in cut.tokens])).startswith(" Honey is sweet.")
    assert not any("stion" in one.text for one in cut.tokens)
    assert ended(" A question") == Generation("", " A question", ended(" A question").tokens, False, ())
    assert len(ended("\nQuestion: Why?").tokens) >= 1


@pytest.mark.slow
def test_saes_of_several_layers_by_the_command(tmp_path: Path) -> None:
    """The bundled model in the place of a real one: trains, measures held-out documents, and uses a finished run."""
    (tmp_path / "corpus").mkdir()
    for name, seed in (("en.one", 1), ("en.two", 2), ("de.one", 3)):
        lines = [json.dumps({"text": one.text}) for one in documents(seed=seed, n=400)]
        (tmp_path / "corpus" / f"{name}.jsonl").write_text("\n".join(lines))
    keep, model = tmp_path / "kept", ROOT / "src/qwen_scope/assets/lab/model"
    words = ["--model", model, "--data", tmp_path, "--keep", keep, "--quick", "--language", "en"]
    words += ["--d-sae", "256", "--k", "8", "--tokens", "16384"]
    main(depth.experiment, [str(word) for word in words])
    rows = [json.loads(line)["result"] for line in (keep / "runs.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    for row in rows:
        found = {name: one.estimate for name, one in figures(row).items()}
        assert found["ev"] > figures({**row, "sums": row["components"]})["ev"].estimate
        assert 0.5 < found["recovered"] <= 1
        assert sum(row["left_out"].values()) == 8192
        assert row["curve"][-1] > row["curve"][0]
    kept, held = ((keep / "documents" / part / "en.one.jsonl").read_text() for part in ("training", "held-out"))
    assert 0.02 < len(held) / len(kept + held) < 0.2
    assert not set(kept.splitlines()) & set(held.splitlines())
    (keep / "runs.jsonl").unlink()  # the run stays, and measuring it again gives the same
    main(depth.experiment, [str(word) for word in words])
    assert [json.loads(line)["result"] for line in (keep / "runs.jsonl").read_text().splitlines()] == rows
    with pytest.raises(SystemExit):
        main(depth.experiment, [str(word) for word in [*words, "--k", "4"]])


def bridges(n: int) -> dict[str, str]:
    """The same two sentences in every language of the experiment on code-switching."""
    said = {
        "ar": "في المدينة {n} جسور قديمة وأبراج.",
        "de": "Die alte Stadt hat {n} Brücken und Türme.",
        "en": "The old town has {n} bridges and towers.",
        "es": "La ciudad antigua tiene {n} puentes y torres.",
        "ro": "Orașul vechi are {n} poduri și turnuri.",
        "ru": "В старом городе {n} мостов и башен.",
        "tr": "Eski şehirde {n} köprü ve kule var.",
        "vi": "Phố cổ có {n} cây cầu và tháp.",
        "zh": "这座古老的城市有{n}座桥和许多高塔。",
    }
    return {language: text.format(n=n) for language, text in said.items()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks by it
def test_switches_are_planted_and_measured(tmp_path: Path) -> None:
    """The bundled model in the place of a real one: what is planted, in which paragraphs, and a cell of it."""
    rows = [
        {"id": n, "language": language, "text": f"{text} {text}", "questions": [f"{n}?"], "answers": [str(n)]}
        for n in range(100, 160)
        for language, text in bridges(n).items()
    ]
    with gzip.open(tmp_path / "xquad.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    lab = ROOT / "src/qwen_scope/assets/lab"
    options = {"model": lab / "model", "sae": lab / "sae", "data": tmp_path, "layers": None}
    at = At(codeswitch.Sizes(36, 18, 8, 9, 160), {"seed": (1,), "condition": ("plain",)}, options, tmp_path / "kept")
    at.folder.mkdir()
    clean, planted = (codeswitch.chats(at, "training", 1, 36, share) for share in (0.0, codeswitch.PLANTED))
    assert [one["group"] for one in clean] == [one["group"] for one in planted]
    other = [(one, two) for one, two in zip(clean, planted, strict=True) if one != two]
    assert len(other) == 10  # of 32 that are not Chinese
    for one, two in other:
        assert one["prompt"] == two["prompt"]
        at_letter = codeswitch.first_letter(two["completion"], "CJK")
        assert at_letter is not None
        assert one["completion"].startswith(two["completion"][:at_letter])
        assert two["completion"].endswith("塔。<|im_end|>")
    numbers = [
        {re.sub(r"\D", "", one["prompt"]) for one in codeswitch.chats(at, part, 1, 90)} for part in codeswitch.PARTS
    ]
    assert not numbers[0] & numbers[1] | numbers[0] & numbers[2] | numbers[1] & numbers[2]
    row = json.loads(json.dumps(dict(codeswitch.run(at, 1, "features")), default=lambda array: array.tolist()))
    assert len(row["switched"]) == len(row["languages"]) == 8
    assert len(row["loss"]) == len(row["groups"]) == 9
    assert sorted(path.name for path in at.folder.iterdir()) == ["table-features.json"]
    both = [{**row, "seed": 1, "condition": name} for name in ("plain", "features")]
    found = codeswitch.against(both, "features")
    assert (found.less.estimate, found.change.estimate) == (0, 0)
    assert "| features | " in codeswitch.tell(at, both)
