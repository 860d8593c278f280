"""SAEs, stores and recipes go to the Hub and come back, over a loopback server that speaks what huggingface_hub asks.

huggingface_hub reads its environment when it is imported, so each push is a process of its own.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import lab_store
import pytest

from qwen_scope import FeatureStore
from qwen_scope.errors import InputError
from qwen_scope.files import card_text, push_folder

COMMIT = "1" * 40
LARGE = 4096
"""From this size on a file goes to the large files' storage, apart from its commit."""


class Hub:
    """Repositories in memory: made, written by commits (small files inline, large ones apart), listed and read."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.large: dict[str, bytes] = {}
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self, status: int, data: object = b"", **headers: str) -> None:
                body = data if isinstance(data, bytes) else json.dumps(data).encode()
                self.send_response(status)
                if not isinstance(data, bytes):
                    headers["Content_Type"] = "application/json"
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"] or 0))
                path = self.path.partition("?")[0].strip("/")
                if self.headers.get("Authorization") != "Bearer good":
                    return self.answer(401, {"error": "Invalid username or password."})
                if path == "api/repos/create":
                    asked = json.loads(body)
                    name = f"{asked.get('organization', 'me')}/{asked['name']}"
                    kind = "datasets/" if asked.get("type") == "dataset" else ""
                    hub.private[kind + name] = bool(asked.get("private")) or asked.get("visibility") == "private"
                    hub.repos.setdefault(kind + name, {})
                    return self.answer(200, {"url": f"{hub.url}/{kind}{name}", "name": name, "id": name})
                if path == "api/validate-yaml":
                    return self.answer(200, {"errors": [], "warnings": []})
                if path.endswith("/info/lfs/objects/batch"):
                    objects = [
                        {**one, "actions": {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}}}
                        for one in json.loads(body)["objects"]
                    ]
                    return self.answer(200, {"transfer": "basic", "objects": objects})
                if "/preupload/" in path:
                    modes = [
                        {"path": one["path"], "uploadMode": "lfs" if one["size"] >= LARGE else "regular"}
                        for one in json.loads(body)["files"]
                    ]
                    return self.answer(200, {"files": [{**one, "shouldIgnore": False} for one in modes]})
                if "/commit/" in path:
                    repo = path.removeprefix("api/").removeprefix("models/").partition("/commit/")[0]
                    for line in body.splitlines():
                        value = json.loads(line)
                        one = value["value"]
                        if value["key"] == "file":
                            hub.repos[repo][one["path"]] = base64.b64decode(one["content"])
                        elif value["key"] == "lfsFile":
                            hub.repos[repo][one["path"]] = hub.large[one["oid"]]
                    url = f"{hub.url}/{repo}/commit/{COMMIT}"
                    return self.answer(200, {"success": True, "commitOid": COMMIT, "commitUrl": url})
                return self.answer(404, {"error": path})

            def do_PUT(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                assert hashlib.sha256(content).hexdigest() == self.path.rpartition("/")[2]
                hub.large[self.path.rpartition("/")[2]] = content
                self.answer(200)

            def do_GET(self) -> None:
                path = self.path.partition("?")[0].strip("/")
                api = path.startswith("api/models/")
                repo, _, rest = path.removeprefix("api/models/").partition("/tree/" if api else "/resolve/")
                files, name = hub.repos.get(repo), rest.partition("/")[2]
                if api and files is not None:
                    tree = [{"type": "file", "path": n, "size": len(d), "oid": "0" * 40} for n, d in files.items()]
                    return self.answer(200, tree)
                if files is None or name not in files:
                    return self.answer(404, X_Error_Code="EntryNotFound" if files else "RepoNotFound")
                etag = f'"{hashlib.sha1(files[name]).hexdigest()}"'
                return self.answer(200, files[name], ETag=etag, X_Repo_Commit=COMMIT)

            do_HEAD = do_GET

            def log_message(self, format: str, *args: object) -> None: ...

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def hub() -> Iterator[Hub]:
    served = Hub()
    yield served
    served.server.shutdown()
    served.server.server_close()


def run(hub: Hub, home: Path, code: str, token: str = "good") -> str:
    """What a program prints that has the server as its Hub."""
    env = {k: v for k, v in os.environ.items() if "proxy" not in k.lower() and not k.startswith("HF_")}
    env |= {"HF_HOME": str(home), "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": token}
    env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


@pytest.mark.slow
def test_saes_a_store_and_a_recipe_come_back(hub: Hub, tmp_path: Path) -> None:
    code = f"""
from qwen_scope import FeatureStore, Intervention, load_sae
from qwen_scope.sae import push_saes
from qwen_scope.steer import Recipe
from qwen_scope.model import HookPoint
both = [load_sae("lab", layer) for layer in (2, 4)]
print(push_saes(both, "me/saes", private=True))
assert [load_sae("me/saes", layer).identity for layer in (2, 4)] == [one.identity for one in both]
print(FeatureStore({str(lab_store.folder())!r}).push_to_hub("me/store"))
more = Intervention.add(layer=4, feature=283, amount=2.0, unit="raw").bound(both[1])
print(Recipe("German", "qwen3", (more,), both[1].identity.group, "by hand").push_to_hub("me/german"))
"""
    said = run(hub, tmp_path, code).splitlines()
    assert [one.endswith(f"/commit/{COMMIT}") for one in said] == [True] * 3
    assert hub.private == {"me/saes": True, "datasets/me/store": False, "me/german": False}
    saes = hub.repos["me/saes"]
    assert {"README.md", "config.json", "layer2.sae.pt", "layer4.sae.pt"} <= saes.keys()
    card = saes["README.md"].decode()
    assert card.startswith("---\nlibrary_name: qwen-scope\n")
    assert "load_sae('me/saes', layer=2)" in card
    assert "| 4 | layers.4.resid_post | topk | 2048 | 40 |" in card
    assert hub.large, "weights go to the storage of large files"
    back = tmp_path / "back"
    for name, content in hub.repos["datasets/me/store"].items():
        (back / name).parent.mkdir(parents=True, exist_ok=True)
        (back / name).write_bytes(content)
    with FeatureStore(back) as store:
        store.verify()
    assert "feature store" in (back / "README.md").read_text(encoding="utf-8")
    recipe = hub.repos["me/german"]
    assert b"feature: 283" in recipe["recipe.yaml"]
    assert "| 4 | 283 | add | 2 raw |" in recipe["README.md"].decode()


@pytest.mark.slow
def test_no_right_to_write(hub: Hub, tmp_path: Path) -> None:
    code = """
from qwen_scope.errors import InputError
from qwen_scope import load_sae
from qwen_scope.sae import push_saes
try:
    push_saes(load_sae("lab", 4), "me/saes")
except InputError as error:
    print(error)
"""
    said = run(hub, tmp_path, code, token="bad")
    assert said.startswith("me/saes can't be written: ")
    assert said.endswith("log in with: hf auth login")
    assert not hub.repos


@pytest.mark.parametrize("name", ["saes", "a/b/c", "/x", "x/"])
def test_what_is_no_repository(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a repository of the Hub is OWNER/NAME, not"):
        push_folder(tmp_path, name, "model", "x")


def test_a_card_names_the_base_model_where_it_is_one_of_the_hub() -> None:
    assert "base_model: Qwen/Qwen3-8B-Base\n" in card_text("t", ["x"], [], "Qwen/Qwen3-8B-Base")
    for model in ("/home/me/model", "./a/b", "lab", None):
        assert "base_model" not in card_text("t", ["x"], [], model)
