"""Every command that opens SAEs on a model says the verdict that is remembered of the pair, in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import typer

from qwen_scope import Intervention, load_scope
from qwen_scope.cli import main
from qwen_scope.cli.app import app
from qwen_scope.model import load_model, weights_fingerprint
from qwen_scope.sae import load_sae
from qwen_scope.scope import FITS, LOSSES, Verdict, remember
from qwen_scope.steer import Recipe
from qwen_scope.store import FeatureStore

MODEL, SAES = str(tiny.folder() / "model"), str(tiny.folder() / "sae")
SAID = "these SAEs on this model: fits with losses at layer 2; fits at layer 0"
SHORT = "--max-new-tokens 2 --json"
RL = "--unchecked --max-new-tokens 4 --prompts 2 --micro 4 --steps 1 --json"
SFT = "--epochs 1 --max-length 48 --json --table T --accumulate 1 --batch 4 --warmup 0"

# What each command needs beside --model and --sae; words in capitals are files that `files` writes.
TABLE = {
    "features": "features hello --json",
    "compare": "compare hello,friend where-is-it --layers 0 --json",
    "find": "find --positive EAST --negative WEST --layers 0 --json",
    "why": "why where-is-it --json",
    "show": "show --feature 0/3 --json",
    "card": "card STORE FIRES -n 2 --json",
    "score": "score SAES LONG -o OUT --layers 0 --tokens 192 --train-tokens 128 --batch 64 --context-length 16 --json",
    "extract": "extract WEST --layers 0 -o OUT --json",
    "export": "export RECIPE --to control-vector -o OUT.gguf --json",
    "steer": f"steer hello --feature 0/3 --amount 0 {SHORT}",
    "sweep": f"sweep PROMPTS --feature 0/3 --amounts 0.5 --regex [aeiou] {SHORT}",
    "validate": "validate PROMPTS --feature 0/3 --amount 0.5 --regex [aeiou] --positive EAST --negative WEST"
    f" --unrelated WEST {SHORT}",
    "lens fit": "lens fit WEST -o OUT.pt --prompts 1 --length 24 --layers 0 --json",
    "classify fit": "classify fit EAST WEST -r OUT.json --top 1 --json",
    "classify predict": "classify predict RULE WEST",
    "classify distil": "classify distil RULE BOTH -s OUT.json --truth east --json",
    "classify transfer": "classify transfer BOTH --positive east=1 --json",
    "eval": "eval WEST --layers 0 --tokens 256 --context-length 16 --no-loss --json",
    "train": "train WEST -o OUT --group g --layers 0 --tokens 512 --batch 256 --d-sae 96 --k 6 --context-length 16"
    " --eval-tokens 0 --json",
    "posttrain prepare": "posttrain prepare GROUPS --target loud -o OUT.json --json",
    "posttrain sft": f"posttrain sft CHATS -o OUT {SFT}",
    "posttrain repetition": "posttrain repetition CHATS -o OUT.json --looping LOOPS -n 5 --least 8"
    " --max-new-tokens 16 --json",
    "posttrain rl": f"posttrain rl CHATS -o OUT --recipe RECIPE {RL}",
    "synthesize": "synthesize WEST --store STORE -f FIRES -o OUT --dry-run --json",
}
SLOW = ("score", "classify transfer", "posttrain sft", "posttrain rl", "validate", "why", "lens fit", "synthesize")
# explore shows it on its page (tests/explorer/test_explorer_pair.py); serve asks `tell_of` (test_verdicts.py), as vLLM
# has the model.
ELSEWHERE = ("explore", "serve")


@pytest.fixture(scope="module", autouse=True)
def state(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWEN_SCOPE_STATE", str(tmp_path_factory.mktemp("state")))
        weights = weights_fingerprint(load_model(MODEL, device="cpu").model)
        assert weights is not None
        words = {0: FITS, 2: LOSSES}
        for layer, word in words.items():
            mine = load_sae(SAES, layer).identity.fingerprint
            remember(Verdict(word, mine, weights, words, "some/base", 12345, 67, "corpus.jsonl", "2026-11-28"))
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, state: None) -> dict[str, str]:
    """What commands read, by the words that stand for it."""
    folder = tmp_path_factory.mktemp("files")

    def lines(name: str, rows: list[dict[str, Any]]) -> str:
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return str(path)

    east = [{"text": f"车站在哪里 {i}", "east": "1", "language": "zh"} for i in range(20)]
    west = [{"text": f"hello friend, where is number {i}", "east": "0", "language": "en"} for i in range(20)]
    other = [{**row, "language": name} for row, name in zip([*east, *west], ["zh", "en"] * 20, strict=True)]
    asked = [{"prompt": f"Where is {i}?", "completion": f" over there {i}", "group": "calm"} for i in range(8)]
    chats = [{**row, "answer": str(i)} for i, row in enumerate(asked)]
    long = [{"text": f"{row['text']}, {i}. " * 8} for i in range(10) for row in west]
    loops = [{"text": word * 20} for word in ("车站", "在", "here", "is ", "e ", "a", "o", "1")]
    groups = [{"text": row["text"], "group": "loud" if row["east"] == "1" else "calm"} for row in [*east, *west]]
    scope = load_scope(MODEL, SAES, device="cpu")
    recipe = Recipe.of("r", scope.model, [Intervention.add(layer=2, feature=3, amount=1.0)], scope.saes)
    recipe.save(folder / "recipe.json")
    (folder / "prompts.txt").write_text("".join(f"The weather {i}\n" for i in range(20)))
    found = {
        "EAST": lines("east", east), "WEST": lines("west", west), "BOTH": lines("both", other),
        "CHATS": lines("chats", chats), "LOOPS": lines("loops", loops), "LONG": lines("long", long),
        "GROUPS": lines("groups", groups),
        "RECIPE": str(folder / "recipe.json"),
        "PROMPTS": str(folder / "prompts.txt"), "RULE": str(folder / "rule.json"), "T": str(folder / "table.json"),
        "STORE": str(folder / "store"),
    }  # fmt: skip
    for words in (
        f"extract {found['WEST']} --layers 0 -o {found['STORE']}",
        f"classify fit {found['EAST']} {found['WEST']} -r {found['RULE']} --top 1",
        f"posttrain prepare {found['GROUPS']} --target loud -o {found['T']}",
    ):
        assert main([*words.split(), "--model", MODEL, "--sae", SAES, "--device", "cpu"]) == 0
    with FeatureStore(found["STORE"]) as store:
        most = store.stats(0).sort_by([("tokens", "descending")])["feature"][0].as_py()
    return {**found, "FIRES": f"0/{most}"}


def marked(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own
@pytest.mark.parametrize("name", [marked(name) for name in TABLE])
def test_it_is_said_once(name: str, files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put = {**files, "SAES": SAES, "OUT": str(tmp_path / "out")}
    argv = [put.get(word, put["OUT"] + word[3:] if word.startswith("OUT.") else word) for word in TABLE[name].split()]
    saes = [] if name == "score" else ["--start-from" if name == "train" else "--sae", SAES]
    where = [*saes, "--model", MODEL, "--device", "cpu"]
    capsys.readouterr()
    code = main([*argv, *where])
    out, err = capsys.readouterr()
    assert code == 0, err
    for line in out.splitlines() if name == "classify predict" else [out]:
        json.loads(line)
    assert " ".join(err.split()).count(SAID) == 1, err


def leaves(command: Any, path: str = "") -> dict[str, set[str]]:
    """The options of every command by its name."""
    below = getattr(command, "commands", None)
    if not below:
        return {path: {str(one.name) for one in command.params}}
    return {k: v for name, one in below.items() for k, v in leaves(one, f"{path} {name}".strip()).items()}


def test_no_command_is_left_out() -> None:
    opens = {
        name for name, options in leaves(typer.main.get_command(app)).items()
        if "model" in options and options & {"sae", "start_from"}
    }  # fmt: skip
    assert opens == {*TABLE, *ELSEWHERE}
