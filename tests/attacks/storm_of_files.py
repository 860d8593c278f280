"""A storm of hostile files, texts and options through the commands that read them.

python tests/attacks/storm_of_files.py --count 300

Every case runs in a child of one warm process, with limits on its time and memory, and ends in one class: `ok`,
`refused` (one sentence, exit code 2), `traceback` (or a sentence that owns up to a bug), `hang`, `half-written` or
`control codes`.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import tiny  # noqa: E402
import torch  # noqa: E402
from storm_cases import SAMPLE, World, case  # noqa: E402

from qwen_scope.cli import main as command  # noqa: E402

SECONDS, MEMORY = 60, 3 * 2**30
GOOD = ("ok", "refused")
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Outcome:
    number: int
    family: str
    words: list[str]
    end: str
    said: str
    seconds: float


def forked(work, folder: Path, seconds: float = SECONDS) -> tuple[int | None, str, str, float]:
    """What `work` returns in a child, what it wrote, and how long it took; None where it ran past its time."""
    begun = time.monotonic()
    sys.stdout.flush()
    if not (child := os.fork()):
        code = 99
        try:
            os.setpgid(0, 0)
            os.chdir(folder)
            for number, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(folder / f".{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
            sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="strict", closefd=False)
            sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
            sys.stdin = open(os.devnull)  # noqa: SIM115
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                try:
                    stream.flush()
                except (OSError, ValueError):
                    code = 98
            os._exit(code)
    code: int | None = None
    while time.monotonic() - begun < seconds:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            break
        time.sleep(0.01)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    out, err = ((folder / f".{name}").read_text("utf-8", "surrogateescape") for name in ("stdout", "stderr"))
    return code, out, err, time.monotonic() - begun


def build(folder: Path) -> World:
    """The world of the cases. In a child: threads that the libraries start there are not forked again."""
    world = World(folder)

    def work() -> int:
        import shutil

        shutil.copytree(tiny.folder(), folder, dirs_exist_ok=True)
        (folder / "c.jsonl").write_bytes(SAMPLE * 3)
        for side, text in (("a", "the station\n\n"), ("b", "guten Morgen\n\n")):
            (folder / f"{side}.txt").write_text(text * 12)
        codes = [
            command(["extract", str(folder / "c.jsonl"), *world.options, "-o", str(world.store)]),
            command(
                [
                    "steer",
                    "hi",
                    *world.options,
                    "--layer",
                    "0",
                    "--feature",
                    "1",
                    "--amount",
                    "1",
                    "--max-new-tokens",
                    "1",
                    "--save-recipe",
                    str(world.recipe),
                ]
            ),
            command(
                ["classify", "fit", str(folder / "a.txt"), str(folder / "b.txt"), *world.options, "-r", str(world.rule)]
            ),
        ]
        return max(codes)

    (folder / "log").mkdir()
    code, _, err, _ = forked(work, folder / "log", 300)
    if code != 0:
        raise SystemExit(f"the world can't be made: {err}")
    return world


def run_case(number: int, seed: int, world: World, folder: Path) -> Outcome:
    """One case, judged."""
    here = folder / f"{number}"
    here.mkdir()
    family, words, whole = case(number, seed, world, here)
    code, out, err, seconds = forked(lambda: command(words), here)
    left = [path for path in here.rglob("*") if path.name.startswith(".unfinished") or path.name == ".lock"]
    if code is None:
        end = "hang"
    elif code not in (0, 2) or "Traceback" in out + err or "this is a bug" in err:
        end = "traceback"
    elif CONTROL.search(out + err):
        end = "control codes"
    elif left or (whole and code == 2 and any(here.glob("out*"))):
        end = "half-written"
        err += f" LEFT {[str(path.relative_to(here)) for path in left or here.glob('out*')]}"
    elif code == 2 and not one_sentence(err):
        end = "traceback"
    else:
        end = "ok" if code == 0 else "refused"
    return Outcome(number, family, words, end, err.strip() or out[-300:], seconds)


def one_sentence(err: str) -> bool:
    """Whether a refusal is a usage message, or one line of ours after lines of ours."""
    lines = [line for line in err.splitlines() if line.strip()]
    return bool(lines) and (lines[0].startswith("Usage:") or lines[-1].startswith("qwen-scope: "))


def warm() -> None:
    """Import what the commands import, so that it is paid once; nothing is computed, so no thread is started."""
    import duckdb  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import transformers

    import qwen_scope.cli.app
    from qwen_scope import features, sae, scope, store, train

    for room in (features, sae, scope, store, train):
        for name in dir(room):
            getattr(room, name)
    assert transformers.AutoModelForCausalLM
    assert transformers.AutoTokenizer
    assert qwen_scope.cli.app.app
    torch.set_num_threads(1)


def storm(numbers: list[int], seed: int, verbose: bool = False, every: bool = False) -> list[Outcome]:
    """The outcomes of the cases of these numbers."""
    warm()
    found = []
    with tempfile.TemporaryDirectory(prefix="storm-") as folder:
        (Path(folder) / "world").mkdir()
        world = build(Path(folder) / "world")
        for number in numbers:
            found.append(run_case(number, seed, world, Path(folder)))
            if verbose and (every or found[-1].end not in GOOD):
                one = found[-1]
                print(f"{one.number} {one.family} {one.end} {one.seconds:.1f}s {one.words!r:.300}")
                print(f"    {one.said[-1200:]}\n")
    return found


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--count", type=int, default=300)
    asked.add_argument("--first", type=int, default=0)
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--all", action="store_true", help="print every case")
    asked.add_argument("--only", type=int, nargs="*", help="only the cases of these numbers")
    given = asked.parse_args()
    found = storm(given.only or list(range(given.first, given.first + given.count)), given.seed, True, given.all)
    families = sorted({one.family for one in found})
    ends = ("ok", "refused", "traceback", "hang", "half-written", "control codes")
    print(f"{'':12}" + "".join(f"{end:>15}" for end in ends))
    for family in [*families, "all"]:
        counts = Counter(one.end for one in found if family in (one.family, "all"))
        print(f"{family:12}" + "".join(f"{counts[end]:15}" for end in ends))
    print(f"{len(found)} cases, the longest {max(one.seconds for one in found):.1f} s")
    return int(any(one.end not in GOOD for one in found))


if __name__ == "__main__":
    sys.exit(main())
