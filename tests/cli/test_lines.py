"""A long job whose output goes to a file says where it is, line by line."""

from __future__ import annotations

import re
import time

import pytest
import tiny

from qwen_scope.cli import lines, main, output


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0:00:00"), (0.4, "0:00:00"), (59.6, "0:01:00"), (3599, "0:59:59"), (3661, "1:01:01"), (360000, "100:00:00")],
)
def test_times_are_read_at_sight(seconds: float, said: str) -> None:
    assert lines.duration(seconds) == said


def test_a_line_says_stage_share_text_time_spent_and_time_to_go() -> None:
    clock = Clock()
    job = lines.Job(clock=clock)
    assert job.line() == "0:00:00 so far"
    job.report("training", 0.0, "loss 2.0")
    clock.now += 30
    job.report("training", 0.25, "loss 1.0")
    assert job.line() == "training  25%  loss 1.0  0:00:30 so far, about 0:01:30 to go"
    clock.now += 60
    assert job.line(done=True) == "training  100%  loss 1.0  done after 0:01:30"


def test_time_to_go_counts_from_where_a_stage_began() -> None:
    clock = Clock()
    job = lines.Job("opening the model", clock)
    clock.now += 40
    assert job.line() == "opening the model  0:00:40 so far"
    job.report("training", 0.5, "")  # resumed half-way
    assert job.line() == "training  50%  0:00:40 so far"
    clock.now += 10
    job.report("training", 0.6, "")
    assert job.line() == "training  60%  0:00:50 so far, about 0:00:40 to go"
    job.report("evaluating", 0.0, "")
    assert job.line() == "evaluating  0%  0:00:50 so far"


def test_a_line_stays_one_line_and_steers_no_terminal() -> None:
    job = lines.Job(clock=Clock())
    job.report("a\nb", 0.5, "\x1b[2J")
    assert job.line() == "a\\nb  50%  \\x1b[2J  0:00:00 so far"


def test_a_short_job_writes_nothing(capsys) -> None:
    with output.progress() as report, output.status("reading"):
        report("training", 0.5, "")
    assert capsys.readouterr().err == ""


def test_a_long_job_writes_lines_and_a_last_one(capsys, monkeypatch) -> None:
    monkeypatch.setattr(lines, "INTERVAL", 0.02)
    with output.progress() as report:
        report("training", 0.5, "loss 1")
        time.sleep(0.1)
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first == "training  50%  loss 1  0:00:00 so far"
    assert last == "training  100%  loss 1  done after 0:00:00"


def test_a_job_that_fails_does_not_say_that_it_is_done(capsys, monkeypatch) -> None:
    monkeypatch.setattr(lines, "INTERVAL", 0.02)

    def interrupted() -> None:
        with output.status("reading"):
            time.sleep(0.1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert set(capsys.readouterr().err.splitlines()) == {"reading  0:00:00 so far"}


def test_a_reader_that_has_gone_does_not_end_the_job(monkeypatch) -> None:
    class Gone:
        def isatty(self) -> bool:
            return False

        def write(self, text: str) -> None:
            raise BrokenPipeError

        flush = write

    monkeypatch.setattr(lines, "INTERVAL", 0.01)
    monkeypatch.setattr("sys.stderr", Gone())
    with output.progress() as report:
        report("training", 0.5, "")
        time.sleep(0.05)


@pytest.mark.parametrize(
    "words",
    [
        ["extract", "lab", "--sample", "6", "-o", "store"],
        ["eval", "lab", "--tokens", "2048"],
        [
            "train",
            "lab",
            "--d-sae=64",
            "--k=4",
            "--tokens=2048",
            "--batch=512",
            "--context-length=32",
            "--eval-tokens=0",
            "-orun",
        ],
        ["compare", "The station", "Guten Morgen"],
    ],
    ids=lambda words: words[0],
)
def test_commands_write_lines_where_standard_error_is_a_file(words: list, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lines, "INTERVAL", 0.005)
    sae = [] if words[0] == "train" else ["--sae", str(tiny.folder() / "sae")]
    assert main([*words, "--model", str(tiny.folder() / "model"), *sae]) == 0
    out, err = capsys.readouterr()
    assert "so far" not in out
    assert re.search(r"(?m)^[\w ]+(  \d+%)?.*  \d:\d\d:\d\d so far", err), err
