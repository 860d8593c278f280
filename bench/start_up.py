"""How long `qwen-scope --help` and `qwen-scope features` on the lab take, beside importing what the latter imports.

python bench/start_up.py [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from side_by_side import PAGE, ROOT, Way, alternate, markdown, write

FEATURES = ("features", "The capital of France is Paris")
PROGRAM = "import sys; from qwen_scope.cli import main; sys.exit(main())"
# Run once: the modules of other packages that the command leaves imported, in the order of their import.
LIST = f"""
import json, sys
from qwen_scope.cli import main
main({list(FEATURES)!r})
with open(sys.argv[1], "w") as file:
    json.dump([name for name in sys.modules if not name.startswith(("qwen_scope", "__main__", "__mp_main__"))], file)
"""
IMPORT = """
import contextlib, importlib, json, sys, warnings
warnings.simplefilter("ignore")
with open(sys.argv[1]) as file:
    names = json.load(file)
for name in names:
    with contextlib.suppress(Exception):
        importlib.import_module(name)
"""
HELP_AT_MOST, BEYOND_IMPORTS_AT_MOST = 0.2, 0.5


def process(code: str, *words: str) -> Way:
    """A fresh interpreter, with bytecode kept from one run to the next, as where the package is installed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)

    def way() -> None:
        subprocess.run(
            [sys.executable, "-c", code, *words], env=environment, check=True, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip

    return way


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=PAGE)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        names = str(Path(folder) / "modules.json")
        process(LIST, names)()
        modules = len(json.loads(Path(names).read_text(encoding="utf-8")))
        help_, features = "qwen-scope --help", f"qwen-scope {FEATURES[0]} {FEATURES[1]!r}"
        imports = f"importing the {modules:,} modules of other packages that it imports"
        times = alternate(
            {help_: process(PROGRAM, "--help"), features: process(PROGRAM, *FEATURES), imports: process(IMPORT, names)},
            args.rounds,
        )
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    beyond = statistics.median(a - b for a, b in zip(times[features], times[imports], strict=True))
    verdicts = {
        help_: judged(median[help_], HELP_AT_MOST),
        features: f"{beyond:.2f} s beyond the imports, " + judged(beyond, BEYOND_IMPORTS_AT_MOST),
    }
    rows = [(name, median[name], min(times[name]), max(times[name]), verdicts.get(name, "")) for name in times]
    words = f"Whole processes, {args.rounds} of each in turn, files in the page cache."
    write("start_up.py", [words, "", markdown(("", "median s", "min", "max", ""), rows)], args.out)


def judged(seconds: float, most: float) -> str:
    return f"wanted at most {most:g} s" + ("" if seconds <= most else ": **misses**")


if __name__ == "__main__":
    main()
