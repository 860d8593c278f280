"""The files that release and serve the package name what is there: workflow, Dockerfiles, citation; none runs here."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from typed import context

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
DOCKERFILES = [ROOT / "Dockerfile", ROOT / "space" / "Dockerfile"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_holds_together(path: Path) -> None:
    """Jobs that exist, scripts that exist, steps that either use or run, actions with a version, few rights."""
    flow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert flow["permissions"] == {"contents": "read"}
    jobs = flow["jobs"]
    for job in jobs.values():
        needs = job.get("needs", [])
        assert ({needs} if isinstance(needs, str) else set(needs)) <= jobs.keys()
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step), step
            if "uses" in step:
                assert re.fullmatch(r"[\w-]+/[\w/-]+@(v\d+|release/v\d+)", step["uses"])
            for script in re.findall(r"bash (\S+\.sh)", step.get("run", "")):
                assert (ROOT / script).is_file(), script


def test_only_the_publishing_job_may_ask_for_a_token() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8"))["jobs"]
    assert [name for name, job in jobs.items() if "id-token" in job.get("permissions", {})] == ["publish"]
    assert jobs["publish"]["environment"] == "pypi"
    assert any("gh-action-pypi-publish" in step.get("uses", "") for step in jobs["publish"]["steps"])


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_a_dockerfile_names_what_is_there(path: Path) -> None:
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    for extras in re.findall(r"(?:'\.|qwen-scope\}?)\[([\w,]+)\]", text):
        assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()
    assert "constraints.txt" not in text or (ROOT / "constraints.txt").is_file()
    for line in text.splitlines():
        if line.startswith("ENTRYPOINT "):
            context(shlex.join(json.loads(line.removeprefix("ENTRYPOINT "))))
        elif line.startswith("CMD "):  # with the variables that the file sets
            line = line.removeprefix("CMD ").removeprefix("exec ")
            typed = re.sub(r"\$\{\w+:\+[^}]*\}", "", line).replace('"$MODEL"', "lab")
            context(typed)
    at = [i for i, line in enumerate(text.splitlines()) if line.startswith(("FROM", "USER", "ENTRYPOINT", "CMD"))]
    words = [text.splitlines()[i].split()[0] for i in at]
    assert words[0] == "FROM"
    assert "USER" in words, "it does not run as root"
    assert words[-1] in ("ENTRYPOINT", "CMD")


def test_the_sdist_holds_what_the_repository_holds() -> None:
    """All but what belongs to a place that builds it; the rest goes in by itself."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    held = {line.split("/")[0] for line in listed.splitlines()} - {
        ".ci",
        ".gitignore",
        "README.md",
        "LICENSE",
        "pyproject.toml",
    }
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included = set(data["tool"]["hatch"]["build"]["targets"]["sdist"]["include"])
    assert sorted(held - included) == []
    assert all((ROOT / name).exists() for name in included)


def test_the_citation_is_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == PROJECT["version"]
    assert {"cff-version", "title", "authors", "message"} <= cited.keys()
