"""The Hub over a loopback server: exactly the files that are needed, the cache, offline mode, and what can go wrong.

huggingface_hub reads its environment when it is imported, so every load here is a process of its own.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sae_toys import toy

from qwen_scope.sae import save_sae

REPO = "Qwen/SAE-Res-Qwen3-0.1B-Base-W1K-L0_5"  # like a released one, but not in the catalog
LISTED = "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"
COMMIT = {"main": "1" * 40, "v2": "2" * 40}


class Hub:
    """As much of the Hub as huggingface_hub asks for: a file list, and files by revision."""

    def __init__(self, files: dict[str, dict[str, bytes]]) -> None:
        self.files, self.asked = files, []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def do_GET(self) -> None:
                path = self.path.partition("?")[0].strip("/")
                hub.asked.append((self.command, path))
                api = path.startswith("api/models/")
                repo, _, rest = (path.removeprefix("api/models/") + "/").partition("/tree/" if api else "/resolve/")
                revision, _, name = rest.strip("/").partition("/")
                files = hub.files.get(repo)
                commit = COMMIT.get(revision, revision if revision in COMMIT.values() else "")
                if files is None or not commit:
                    return self.answer(404, X_Error_Code="RevisionNotFound" if files else "RepoNotFound")
                if api:
                    tree = [{"type": "file", "path": n, "size": len(d), "oid": "0" * 40} for n, d in files.items()]
                    return self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
                if name not in files:
                    return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
                etag = f'"{hashlib.sha1(files[name]).hexdigest()}"'
                return self.answer(200, files[name], ETag=etag, X_Repo_Commit=commit, Accept_Ranges="bytes")

            do_HEAD = do_GET

            def log_message(self, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def fetched(self) -> list[str]:
        """The files whose content was sent since the last call."""
        found = [path.split("/", 4)[4] for verb, path in self.asked if verb == "GET" and "/resolve/" in path]
        self.asked.clear()
        return found


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = save_sae([toy(layer=layer) for layer in (0, 1, 2)], tmp_path_factory.mktemp("repo") / "sae")
    return {path.name: path.read_bytes() for path in folder.iterdir()} | {"README.md": b"#"}


@pytest.fixture
def hub(released: dict[str, bytes]) -> Iterator[Hub]:
    served = Hub({REPO: released, LISTED: {n: d for n, d in released.items() if n != "config.json"}})
    yield served
    served.server.shutdown()
    served.server.server_close()


def load(home: Path, url: str, call: str, offline: bool = False) -> str:
    """What `call` gives, or the kind and message of its error, in a new process."""
    code = (
        "import sys, time\n"
        "time.sleep = lambda seconds: None\n"  # the client waits between its tries
        "from qwen_scope.errors import QwenScopeError\n"
        "from qwen_scope.sae import layers_of, load_sae\n"
        "try:\n"
        f"    sys.stdout.write(str({call}))\n"
        "except QwenScopeError as error:\n"
        "    kind = next(c for c in type(error).__mro__ if c.__module__ == 'qwen_scope.errors')\n"
        "    sys.stdout.write(f'{kind.__name__}: {error}')\n"
    )
    env = {k: v for k, v in os.environ.items() if "proxy" not in k.lower() and not k.startswith("HF_")}
    env |= {"HF_HOME": str(home), "HF_ENDPOINT": url, "HF_HUB_OFFLINE": str(int(offline))}
    env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "\n" not in done.stdout
    return done.stdout


@pytest.mark.slow
def test_exactly_the_config_and_one_layer_are_fetched_and_then_cached(hub: Hub, tmp_path: Path) -> None:
    call = f"load_sae({REPO!r}, 1).identity"
    first = load(tmp_path, hub.url, call)
    assert first == str(toy(layer=1).identity)
    assert sorted(hub.fetched()) == ["config.json", "layer1.sae.pt"]
    assert load(tmp_path, hub.url, call) == first
    assert hub.fetched() == [], "the second load is served from the cache"
    assert load(tmp_path, hub.url, call, offline=True) == first
    assert hub.asked == [], "offline nobody is asked"
    other = load(tmp_path, hub.url, f"load_sae({REPO!r}, 2).identity", offline=True)
    assert other == f"NotFoundError: the cached part of {REPO} has no SAE for layer 2; it has layer 1"
    assert load(tmp_path, hub.url, f"layers_of({REPO!r})") == "[0, 1, 2]"
    assert hub.fetched() == [], "a list of layers needs no file"


@pytest.mark.slow
def test_a_group_of_the_catalog_needs_no_list(hub: Hub, tmp_path: Path) -> None:
    """The files served are a toy's, which the catalog notices; there is no config, so the name says k."""
    said = load(tmp_path, hub.url, "load_sae('qwen-scope-3-1.7b-base-w32k-l50', 2)")
    assert said == (
        f"MismatchError: {LISTED} should hold SAEs of 32768 x 2048 according to the catalog, but layer 2 is 64 x 16"
    )
    assert not any("api/" in path for _, path in hub.asked)
    assert [name for name in hub.fetched() if name != "config.json"] == ["layer2.sae.pt"]


@pytest.mark.slow
def test_revisions_and_another_cache(hub: Hub, tmp_path: Path) -> None:
    cache = tmp_path / "elsewhere"
    call = f"load_sae({REPO!r}, 0, revision='v2', cache_dir={str(cache)!r}).identity"
    assert load(tmp_path, hub.url, call) == str(toy(layer=0).identity)
    assert list(cache.glob("models--*/snapshots/" + "2" * 40))
    assert load(tmp_path, hub.url, call, offline=True) == str(toy(layer=0).identity)
    said = load(tmp_path, hub.url, f"load_sae({REPO!r}, 0, revision='v9')")
    assert said == f"NotFoundError: {REPO} has no revision 'v9'"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        ("load_sae('Qwen/SAE-Res-Nothing-W1K-L0_5', 0)", "the Hub has no repository Qwen/SAE-Res-Nothing-W1K-L0_5, or"),
        (f"load_sae({REPO!r}, 7)", f"{REPO} has no SAE for layer 7; it has layers 0 to 2"),
        (f"load_sae({LISTED!r}, 9)", f"{LISTED} has no file layer9.sae.pt"),
        ("load_sae('a/b..c', 0)", "'a/b..c' is not a repository id of the form owner/name"),
    ],
)
def test_what_the_hub_does_not_have(hub: Hub, tmp_path: Path, call: str, sentence: str) -> None:
    assert sentence in load(tmp_path, hub.url, call)


@pytest.mark.slow
@pytest.mark.parametrize(("repo", "what"), [(REPO, "the file list of"), (LISTED, "config.json of")])
def test_offline_without_a_cache(tmp_path: Path, repo: str, what: str) -> None:
    said = load(tmp_path, "http://127.0.0.1:9", f"load_sae({repo!r}, 1)", offline=True)
    assert said == f"NotFoundError: {what} {repo} is not in the local cache and HF_HUB_OFFLINE is set"


@pytest.mark.slow
def test_a_hub_that_nobody_answers_for(tmp_path: Path) -> None:
    said = load(tmp_path, "http://127.0.0.1:9", f"load_sae({LISTED!r}, 1)")
    assert said == f"NotFoundError: config.json of {LISTED} is not in the local cache and the Hub can't be reached"
