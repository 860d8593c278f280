"""A storm of kills: commands are ended at random moments, run again to their end, and compared with an unbroken run.

    python tests/attacks/storm_of_kills.py --kills 60

Every process is forked from this one, which has imported everything once. A kill is SIGKILL in two of three cases, else
SIGTERM or SIGINT; it comes at a random time, or a moment after the command has changed its n-th file, so that saving is
hit as often as computing. A round is one or two kills, and the same command again until it is done.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

HANG = 300.0  # seconds
SIGNALS = (signal.SIGKILL,) * 4 + (signal.SIGTERM, signal.SIGINT)
# What may differ between two runs that did the same: times, and what is made from them.
VOLATILE = re.compile(
    r"id|made|run_id|resume|spent|seconds|runtime|time|.*_per_s(econd)?|.*_runtime|.*/s|versions|out|endpoint|peak.*"
)
PASSED_OVER = {"checkpoints", "cache", "work"}


@dataclass(frozen=True)
class Command:
    """One command of the storm.

    Attributes:
        words: its words for an output.   again: further words when it is run again, by what its output holds.
        start: called with the output before its first run.
    """

    name: str
    words: Callable[[Path], list[str]]
    again: Callable[[Path], tuple[str, ...]] = lambda out: ()
    start: Callable[[Path], Any] | None = None


@dataclass
class Tally:
    """What has come of one command."""

    kills: Counter[str] = field(default_factory=Counter)
    rounds: int = 0
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Judge(BaseHTTPRequestHandler):
    """Answers the questions of `label`, always the same way to the same question."""

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        system, user = (message["content"] for message in body["messages"])
        numbered = re.findall(r"^\d+\. (.*)$", user, re.MULTILINE)
        name = "NAME: number " + hashlib.sha256(user.encode()).hexdigest()[:4]
        content = name if "NAME:" in system else str([int("o" in text) for text in numbered])
        data = json.dumps({"choices": [{"message": {"content": content}}], "usage": {"total_tokens": 9}}).encode()
        time.sleep(0.01)
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def forked(work: Callable[[], int | None]) -> int:
    """Start work in a copy of this process; its number."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 99
    try:
        code = work() or 0
    except BaseException:  # the end of this process: nothing is above
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve_judge() -> tuple[int, str]:
    """A judge in a process of its own: its number and its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    pid = forked(lambda: server.serve_forever())
    server.socket.close()
    return pid, f"http://127.0.0.1:{server.server_address[1]}/v1"


def started(words: list[str], log: Path) -> int:
    """A command in a process of its own; what it says is added to the log."""

    def work() -> int:
        from qwen_scope.cli import main

        opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, 1)
        os.dup2(opened, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        return main(words)

    return forked(work)


def ended(pid: int) -> int | None:
    """How a process ended: its exit code, or minus the signal; None while it runs."""
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def seen(out: Path) -> frozenset[tuple[str, int]]:
    """The files of an output with their sizes."""
    found = []
    for folder, _, names in os.walk(out) if out.is_dir() else [(out.parent, (), [out.name])]:
        for name in names:
            try:
                found.append((f"{folder}/{name}", os.stat(f"{folder}/{name}").st_size))
            except FileNotFoundError:
                continue
    return frozenset(found)


def finished(pid: int, out: Path) -> tuple[int | None, float, int]:
    """Wait for the end: how it was (None for a hang), after how long, and how often a file changed on the way."""
    since, changes, last = time.monotonic(), 0, seen(out)
    while (code := ended(pid)) is None:
        if time.monotonic() - since > HANG:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None, HANG, changes
        now = seen(out)
        changes, last = changes + (now != last), now
        time.sleep(0.005)
    return code, time.monotonic() - since, changes


def struck(pid: int, out: Path, number: int, after: float, changes: int) -> int | None:
    """Send a signal after some seconds, or after some changes of files where those are not 0; how the process ended."""
    since, last = time.monotonic(), seen(out)
    while (code := ended(pid)) is None:
        if changes:
            now = seen(out)
            changes, last = changes - (now != last), now
            if not changes:
                time.sleep(random.uniform(0, 0.004))
                break
        elif time.monotonic() - since > after:
            break
        if time.monotonic() - since > HANG:
            break
        time.sleep(0.001)
    if code is not None:
        return code
    os.kill(pid, number)
    return finished(pid, out)[0]


def content(out: Path) -> dict[str, Any]:
    """What an output says: digests of binary files, data of text files without what depends on the clock."""
    if out.is_file():
        return {"": out.read_text()}
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if not path.is_file() or PASSED_OVER & set(path.relative_to(out).parts):
            continue
        if path.suffix in (".json", ".jsonl"):
            found[name] = [steady(json.loads(line)) for line in parts(path)]
        elif path.suffix == ".safetensors":
            found[name] = weights(path)
        elif path.suffix in (".parquet", ".pt"):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "there"
    return found


def weights(path: Path) -> tuple[Any, str]:
    """The header of a safetensors file, whose keys come in any order, and a digest of the numbers."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), hashlib.sha256(data[end:]).hexdigest()


def parts(path: Path) -> list[str]:
    """The lines of JSONL, or a whole file of JSON."""
    text = path.read_text(encoding="utf-8")
    return [line for line in text.split("\n") if line] if path.suffix == ".jsonl" else [text]


def steady(value: Any) -> Any:
    """Data without what may differ."""
    if isinstance(value, dict):
        return {key: steady(one) for key, one in value.items() if not VOLATILE.fullmatch(key)}
    if isinstance(value, list):
        return [steady(one) for one in value]
    return value


def differing(a: dict[str, Any], b: dict[str, Any]) -> str:
    """The first place where two contents part."""
    for name in sorted(set(a) | set(b)):
        if a.get(name) != b.get(name):
            return f"{name}: {str(a.get(name))[:150]} and {str(b.get(name))[:150]}"
    return ""


def storm(commands: list[Command], kills: int, seed: int, place: Path) -> dict[str, Tally]:
    """So many kills, the commands in turn."""
    dice, tallies = random.Random(seed), {one.name: Tally() for one in commands}
    whole: dict[str, tuple[dict[str, Any], float, int]] = {}
    for one in commands:
        out, log = place / one.name / "whole" / "out", place / one.name / "whole.log"
        begin(one, out)
        code, seconds, changes = finished(started(one.words(out), log), out)
        if code != 0:
            raise SystemExit(f"{one.name} ends with {code} when nobody disturbs it:\n{log.read_text()[-2000:]}")
        whole[one.name] = content(out), seconds, changes
    while sum(tally.kills.total() for tally in tallies.values()) < kills:
        one = min(commands, key=lambda c: tallies[c.name].kills.total())
        strike(one, whole[one.name], tallies[one.name], dice, place / one.name)
    return tallies


def begin(one: Command, out: Path) -> None:
    """Make the folder of an output, and what has to be in its place."""
    out.parent.mkdir(parents=True)
    if one.start is not None:
        one.start(out)


def strike(
    one: Command, whole: tuple[dict[str, Any], float, int], tally: Tally, dice: random.Random, place: Path
) -> None:
    """One round: a kill or two, the same command to its end, and a look at what there is."""
    before, seconds, changes = whole
    tally.rounds += 1
    out, log = place / str(tally.rounds) / "out", place / f"{tally.rounds}.log"
    begin(one, out)
    since, again, how = time.monotonic(), (), ""
    for _ in range(dice.choice((1, 1, 2))):
        number, at = dice.choice(SIGNALS), dice.uniform(0, seconds)
        while_writing = dice.randint(1, changes) if changes and dice.random() < 0.6 else 0
        code = struck(started([*one.words(out), *again], log), out, number, at, while_writing)
        again, how = one.again(out), f"{how}{number.name} after {while_writing or f'{at:.2f} s'}; "
        if code == 0:  # too late
            continue
        tally.kills[number.name] += 1
        if code is None:
            tally.problems.append(f"round {tally.rounds}: hangs after {how}")
        elif code not in (-number, 128 + number):
            tally.problems.append(f"round {tally.rounds}: {how}ended with {code}")
    code, _, _ = finished(started([*one.words(out), *again], log), out)
    said = log.read_text(encoding="utf-8", errors="replace")
    if code != 0:
        tally.problems.append(
            f"round {tally.rounds}: {how}then {'hangs' if code is None else f'exit {code}'}: {said[-300:]}"
        )
    elif differs := differing(before, content(out)):
        tally.problems.append(f"round {tally.rounds}: {how}then another result, {differs}")
    if "Traceback" in said:
        tally.problems.append(f"round {tally.rounds}: {how}a traceback: {said[said.index('Traceback') :][-600:]}")
    left = [p.name for p in out.parent.rglob("*") if p.name.startswith((".unfinished", ".lock"))]
    if left:
        tally.problems.append(f"round {tally.rounds}: {how}leaves {', '.join(left)}")
    tally.seconds += time.monotonic() - since
    if not tally.problems:
        shutil.rmtree(out.parent)


def prepare(place: Path) -> list[Command]:
    """Inputs, small enough for many runs, and the commands that read them."""
    import tiny

    from qwen_scope.analysis import Rule, RuleFeature
    from qwen_scope.cli import main
    from qwen_scope.sae import load_sae
    from qwen_scope.store import FeatureStore

    place.mkdir(parents=True, exist_ok=True)
    model, sae = str(tiny.folder() / "model"), str(tiny.folder() / "sae")
    where = ["--model", model, "--device", "cpu"]
    texts = [f"{text} {i}" for i in range(30) for text in tiny.TEXTS]
    rows = [{"text": t, "prompt": "hello ", "completion": t[:40], "group": "en"} for t in texts]
    for name, some in (("c.jsonl", rows), ("few.jsonl", rows[:40]), ("rows.jsonl", rows[:12])):
        (place / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some))
    (place / "rule.json").unlink(missing_ok=True)
    feature = RuleFeature(0, 3, 0.0, 1.0, 1.0, load_sae(sae, 0).identity.fingerprint)
    Rule("r", (feature,), {}).save(place / "rule.json")
    store = place / "store"

    def made() -> int:
        words = ["extract", str(place / "few.jsonl"), "-o", str(store), *where, "--sae", sae, "--layers", "0"]
        code = main(words)
        with FeatureStore(store) as opened:
            documents = opened.stats(0)["documents"].to_numpy()
        (place / "features").write_text(",".join(str(i) for i in documents.argsort()[-30::10]))
        return code

    pid = forked(made)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit("the store for label and synthesize can't be made")
    corpus, named = str(place / "c.jsonl"), [*where, "--sae", sae]
    small = [
        "--d-sae",
        "48",
        "--k",
        "4",
        "--tokens",
        "3072",
        "--batch",
        "256",
        "--context-length",
        "32",
        "--batch-size",
        "4",
    ]
    small += ["--eval-tokens", "0"]
    made_up = ["--want", "60", "--tries", "6", "--budget", "24", "--writer", "lab"]
    made_up += ["-f", (place / "features").read_text()]
    few = ["--batch", "2", "--accumulate", "1", "--max-steps", "6", "--warmup", "1", "--save-every", "2"]
    return [
        Command(
            "extract", lambda out: ["extract", corpus, "-o", str(out), *named, "--window", "1500", "--pool", "mean"]
        ),
        Command(
            "train",
            lambda out: ["train", corpus, "-o", str(out), *where, "--layers", "0", *small, "--checkpoint-every", "4"],
            again=lambda out: ("--resume",),
        ),
        Command("convert", lambda out: ["convert", "lab", "-o", str(out), "--dtype", "float32", "--layers", "0-3"]),
        Command(
            "label",
            lambda out: ["label", str(out), "-n", "12", "--examples", "4", "--tests", "4", "--concurrency", "2"],
            start=lambda out: shutil.copytree(store, out),
        ),
        Command(
            "predict", lambda out: ["classify", "predict", str(place / "rule.json"), corpus, "-o", str(out), *named]
        ),
        Command(
            "synthesize",
            lambda out: [
                "synthesize",
                str(place / "few.jsonl"),
                "--store",
                str(store),
                "-o",
                str(out),
                *made_up,
                *named,
            ],
        ),
        Command(
            "sft",
            lambda out: [
                "posttrain",
                "sft",
                str(place / "rows.jsonl"),
                "-o",
                str(out),
                "--method",
                "plain",
                *where,
                *few,
            ],
            # One that was killed before it had begun says that there is nothing to resume.
            again=lambda out: ("--resume",) if (out / "run.json").is_file() else (),
        ),
    ]


def imported() -> None:
    """Everything that the commands import, once for all of them."""
    import datasets  # noqa: F401
    import duckdb  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import torch
    import trl  # noqa: F401

    import qwen_scope.cli.app
    import qwen_scope.features.label
    import qwen_scope.posttrain.sft
    import qwen_scope.posttrain.synthesize
    import qwen_scope.store.store
    import qwen_scope.train.run  # noqa: F401

    torch.set_num_threads(1)


def run(kills: int, seed: int, place: Path, only: list[str] | None = None) -> dict[str, Tally]:
    """The whole storm in a folder."""
    imported()
    judge, url = serve_judge()
    os.environ |= {"OPENAI_BASE_URL": url, "OPENAI_MODEL": "judge"}
    try:
        commands = [one for one in prepare(place) if not only or one.name in only]
        return storm(commands, kills, seed, place)
    finally:
        os.kill(judge, signal.SIGKILL)
        os.waitpid(judge, 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="These commands alone.")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="storm-of-kills-") as folder:
        tallies = run(given.kills, given.seed, Path(folder), given.only)
    print(f"{'command':<12} {'rounds':>6} {'kills':>6} {'KILL/TERM/INT':>14} {'problems':>9} {'seconds':>8}")
    for name, tally in tallies.items():
        by = "/".join(str(tally.kills[number]) for number in ("SIGKILL", "SIGTERM", "SIGINT"))
        figures = f"{tally.rounds:>6} {tally.kills.total():>6} {by:>14} {len(tally.problems):>9} {tally.seconds:>8.0f}"
        print(f"{name:<12} {figures}")
    problems = [f"{name}, {problem}" for name, tally in tallies.items() for problem in tally.problems]
    print(
        "\n".join(problems) or "all results are those of the unbroken runs; no traceback, no hang, nothing left behind"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
