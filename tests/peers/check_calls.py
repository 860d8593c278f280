"""Runs where sae_lens is installed, with our source on the path: both columns of docs/from-saelens.md, on one SAE."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| ([^|`]+) \| `(.+)` \| `(.+)` \|$", re.MULTILINE)
REPO = "somebody/lab-saes"


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's HTTP as opening one repository needs."""

    folder: Path

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path, name = self.path.partition("?")[0], self.path.partition("/resolve/main/")[2]
        files = {p.relative_to(self.folder).as_posix(): p for p in self.folder.rglob("*") if p.is_file()}
        headers = {"X-Repo-Commit": "0" * 40}
        if path.startswith(f"/api/models/{REPO}"):
            entries = [{"type": "file", "path": n, "size": p.stat().st_size, "oid": "0" * 40} for n, p in files.items()]
            listed = {"id": REPO, "sha": "0" * 40, "siblings": [{"rfilename": n} for n in files]}
            content = json.dumps(entries if "/tree/" in path else listed).encode()
            headers["Content-Type"] = "application/json"
        elif name in files:
            content = files[name].read_bytes()
            headers["ETag"] = f'"{hashlib.sha1(content).hexdigest()}"'
        else:
            content, headers = b"", {"X-Error-Code": "EntryNotFound"}
        self.send_response(200 if content else 404)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args: Any) -> None: ...


def same(a: Any, b: Any) -> bool:
    """Whether both calls came to the same; an SAE is what its weights are."""
    if hasattr(a, "W_enc"):
        return torch.equal(a.W_enc, b.W_enc.T) and torch.equal(a.W_dec, b.W_dec.T)
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and torch.allclose(a.float(), b.float(), atol=1e-4, rtol=1e-4)
    return a == b


def main(work: Path) -> None:
    from sae_lens import SAE

    from qwen_scope.sae import FeatureActs, load_sae, save_sae
    from qwen_scope.steer import Intervention

    sae = load_sae("lab", layer=4)
    folder = work / "ours"
    save_sae(sae, folder, layout="sae_lens", dtype=torch.float32)
    (folder,) = (path.parent for path in folder.rglob("cfg.json"))
    shutil.copytree(folder, Hub.folder / "layer4")
    theirs = sae.to_sae_lens()
    assert same(SAE.load_from_disk(folder, dtype="float32"), sae)
    assert theirs.cfg.to_dict() == SAE.load_from_disk(folder, dtype="float32").cfg.to_dict()
    print("in memory: the SAE of to_sae_lens() is the one of the folder")
    generator = torch.Generator().manual_seed(0)
    x = sae.b_dec + 3 * torch.randn(50, sae.d_model, generator=generator)
    f = sae.encode(x).to_dense()
    common = {"x": x, "f": f, "i": 17, "folder": folder, "repo": REPO, "torch": torch}
    left = common | {"sae": theirs, "SAE": SAE, "out": work / "left"}
    right = common | {"sae": sae, "load_sae": load_sae, "save_sae": save_sae, "FeatureActs": FeatureActs}
    right |= {"out": work / "right", "Intervention": Intervention}
    rows = ROW.findall((ROOT / "docs" / "from-saelens.md").read_text(encoding="utf-8"))
    assert len(rows) >= 15, len(rows)
    wrong = 0
    for what, a, b in rows:
        with torch.no_grad():
            found = eval(a, dict(left)), eval(b, dict(right))
        if what == "save":
            files = [next((work / side).rglob("sae_weights.safetensors")).parent for side in ("left", "right")]
            found = SAE.load_from_disk(files[1], dtype="float32"), load_sae(files[0])
        fine = same(*found)
        wrong += not fine
        print(f"{'ok' if fine else 'DIFFERS'}: {what}: {a} | {b}")
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    Hub.folder = place / "repository"
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        os.environ |= {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(place / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }
        main(place)
        server.shutdown()
