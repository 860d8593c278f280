"""However a run ends, one sentence and an exit code come out: never a traceback, never silence."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from qwen_scope.cli import main, output
from qwen_scope.errors import InputError, NotFoundError, QwenScopeWarning, absent, foreign, need

SRC = Path(__file__).parents[2] / "src"
ENV = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}


def fails(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make the command `catalog` raise."""

    def raise_it(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(output, "print_json", raise_it)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InputError("not this"), 2, "not this"),
        (InputError("a \x1b[31mred\nname"), 2, "a \\x1b[31mred\\nname"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), 2, "/x/y: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "No space left on device"),
        (OSError(errno.EMFILE, "Too many open files", "f"), 2, "f: Too many open files"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "n"), 2, "n: File name too long"),
        (MemoryError(), 2, "not enough memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 20 GiB"), 2, "not enough memory: CUDA out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), 2, "not enough memory"),
        (RecursionError("maximum recursion depth exceeded"), 2, "nested too deeply"),
        (ModuleNotFoundError("No module named 'gradio'", name="gradio.themes"), 2, "needs the package gradio"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (EOFError(), 2, "a file that was given ends too early: EOFError"),
        (SystemExit("a library's last words"), 1, "a library's last words"),
        (ZeroDivisionError("division by zero"), 70, "ZeroDivisionError: division by zero; this is a bug"),
        (AssertionError(), 70, "AssertionError: AssertionError; this is a bug"),
        (ModuleNotFoundError("No module named 'qwen_scope.x'", name="qwen_scope.x"), 70, "this is a bug"),
    ],
)
def test_every_end_is_a_sentence_and_a_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, said: str
) -> None:
    fails(monkeypatch, error)
    assert main(["catalog", "--json"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.strip().count("\n") == 0


def test_a_bug_shows_where_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    fails(monkeypatch, ZeroDivisionError("division by zero"))
    monkeypatch.setenv("QWEN_SCOPE_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main(["catalog", "--json"])


def test_a_wrong_option_is_told_with_the_usage_and_without_control_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["catalog", "--no\x1b[2Jsuch"]) == 2
    err = capsys.readouterr().err
    assert "Usage: " in err
    assert "No such option" in err
    assert "\x1b" not in err


def test_our_warnings_are_a_line_and_those_of_libraries_are_left_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def warn(data: object) -> None:
        warnings.warn("a torn\x1b line", QwenScopeWarning, stacklevel=2)
        warnings.warn("use the new way", DeprecationWarning, stacklevel=2)
        warnings.warn("you should probably train this model", UserWarning, stacklevel=2)

    monkeypatch.setattr(output, "print_json", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["catalog", "--json"]) == 0
    assert capsys.readouterr().err == "qwen-scope: a torn\\x1b line\n"


@pytest.mark.parametrize("package", ["pyarrow", "duckdb", "sklearn", "matplotlib", "datasets", "gradio", "trl", "peft"])
def test_a_missing_package_is_named_with_the_line_to_type(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    error = ModuleNotFoundError(f"No module named {package!r}", name=package)
    fails(monkeypatch, error)
    assert main(["catalog", "--json"]) == 2
    name = "scikit-learn" if package == "sklearn" else package
    err = capsys.readouterr().err
    assert f"needs the package {name}; install it with: " in err
    assert "-m pip install" in err
    assert name in err.partition("pip install")[2]
    with pytest.raises(NotFoundError, match="pip install"), foreign("the table can't be read", NotFoundError):
        raise error


def test_several_missing_packages_are_one_line() -> None:
    assert absent("this", "trl", "peft").startswith("this needs the packages trl, peft; install them with: ")
    assert absent("it", "bitsandbytes").endswith("-m pip install bitsandbytes")
    assert absent("it", "yaml").startswith("it needs the package pyyaml; ")
    need("nothing", "json", "torch")
    with pytest.raises(NotFoundError, match=r"no_such_thing; install it with: .* -m pip install no_such_thing"):
        need("it", "json", "no_such_thing")


def command(script: str, **options: object) -> subprocess.Popen[bytes]:
    """A process that runs Python lines, then the command `catalog`."""
    return subprocess.Popen(
        [sys.executable, "-c", script], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )  # type: ignore[call-overload]


RUN = "import sys; from qwen_scope.cli import main; sys.exit(main())"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "said"),
    [("SIGINT", 130, b"qwen-scope: interrupted\n"), ("SIGHUP", 129, b""), ("SIGTERM", 143, b"")],
)
@pytest.mark.parametrize("where", ["import", "work", "library"])
def test_a_signal_ends_the_run_in_words(tmp_path: Path, where: str, number: str, code: int, said: bytes) -> None:
    """In the import of the commands, in our work, and where a library turns the interrupt into an error of its own."""
    begun, cleaned = tmp_path / "begun", tmp_path / "cleaned"
    wait = f"""
import sys, time
from pathlib import Path
def work(*a, **b):
    try:
        Path({str(begun)!r}).touch()
        time.sleep(60)
    finally:
        Path({str(cleaned)!r}).touch()
def library(*a, **b):
    try:
        work()
    except KeyboardInterrupt:
        raise RuntimeError("query failed")
class Finder:
    def find_spec(self, name, path, target=None):
        if name == "qwen_scope.cli.app" and {where!r} == "import":
            work()
sys.meta_path.insert(0, Finder())
sys.argv = ["qwen-scope", "catalog", "--json"]
from qwen_scope.cli import main
if {where!r} != "import":
    from qwen_scope.cli import output
    output.print_json = {{"work": work, "library": library}}[{where!r}]
sys.exit(main())
"""
    process = command(wait)
    limit = time.monotonic() + 30
    while not begun.exists() and time.monotonic() < limit:
        time.sleep(0.02)
    process.send_signal(getattr(signal, number))
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (code, b"", said)
    assert cleaned.exists()


@pytest.mark.parametrize(
    ("redirect", "code", "said"),
    [
        (">&-", 0, ""),
        ("<&- >&- 2>&-", 0, ""),
        ("2>&-", 0, "qwen-scope"),
        (">/dev/full", 2, "No space left on device"),
        ("| true", None, ""),
    ],
)
def test_streams_that_are_closed_full_or_gone(redirect: str, code: int | None, said: str) -> None:
    line = f"{sys.executable} -m qwen_scope.cli catalog {redirect}"
    done = subprocess.run(["bash", "-c", line], env=ENV, capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    if code is not None:
        assert done.returncode == code
    assert said in done.stdout + done.stderr


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "utf-8"])
def test_a_terminal_that_lacks_letters_shows_escapes_and_json_stays_json(
    monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    for end in ([], ["--json"]):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
        assert main(["features", "Grüße 你好 🙂 \x81", "--layer", "2", *end]) == 0
        if end:
            assert json.loads(written.getvalue().decode(encoding))["text"] == "Grüße 你好 🙂 \x81"
