"""Loading from folders and from a Hub that runs on this machine; every failure is one sentence."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from families import build

from qwen_scope.errors import FormatError, InputError, NotFoundError
from qwen_scope.model import HookPoint, capture, default_device, load_config, load_model, model_sizes

POINT = HookPoint(3)
IDS = torch.arange(10)[None]


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer):
    """A folder per family with weights and tokenizer."""

    def save(name):
        folder = tmp_path_factory.mktemp(name)
        build(name).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return {name: save(name) for name in ("qwen3", "qwen3_moe", "qwen3_5", "qwen3_5_moe", "gemma3")}


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "qwen3_5", "qwen3_5_moe", "gemma3"])
def test_a_folder_gives_the_same_residuals(saved, family, name):
    loaded = load_model(saved[name], device="cpu")
    assert loaded.name == str(saved[name])
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.tokenizer("the").input_ids == [252 - 1]
    expected = capture(family(name), IDS, [POINT])[POINT]
    torch.testing.assert_close(capture(loaded.model, IDS, [POINT])[POINT], expected)
    # what `model_sizes` counts is what was loaded
    assert model_sizes(load_config(saved[name])).parameters == loaded.model.num_parameters()


def test_dtype_and_device(saved):
    assert load_model(saved["qwen3"], dtype="bfloat16").model.dtype == torch.bfloat16
    assert load_model(saved["qwen3"]).model.dtype == torch.float32  # as saved
    assert load_model(saved["qwen3"]).model.device.type == default_device().type


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": "float8"}, "dtype is one of float32, bfloat16, float16, auto, not 'float8'"),
        ({"device": "gpu"}, "'gpu' is not a device"),
        ({"device": "cuda:99"} if not torch.cuda.is_available() else {"device": "mps"}, "is not available here"),
        ({"device": "cpu", "device_map": "auto"}, "exclude each other"),
        ({"quantization": "2bit"}, "quantization is one of 8bit, 4bit"),
    ],
)
def test_options_that_do_not_fit(saved, options, says):
    with pytest.raises(InputError, match=says):
        load_model(saved["qwen3"], **options)


def test_missing_packages_are_named(saved, monkeypatch):
    monkeypatch.setattr("qwen_scope.errors.find_spec", lambda name: None)
    with pytest.raises(NotFoundError, match="pip install 'accelerate>="):
        load_model(saved["qwen3"], device_map="auto")
    with pytest.raises(NotFoundError, match="pip install bitsandbytes 'accelerate>="):
        load_model(saved["qwen3"], quantization="4bit")


@pytest.mark.parametrize("source", ["/no/such/folder", "./nothing", "~/nothing-here", "a/b/c", "", "two words"])
def test_a_folder_that_is_not_there(source):
    with pytest.raises(NotFoundError, match=r"there is no folder|is neither a folder"):
        load_model(source)


def test_offline_and_not_cached_fails_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    begin = time.monotonic()
    with pytest.raises(NotFoundError, match=r"'nobody/nothing' is not in the local cache and offline mode is on"):
        load_model("nobody/nothing")
    assert time.monotonic() - begin < 10


def copy(folder, to):
    for file in Path(folder).iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(path):
    path.write_bytes(path.read_bytes()[:200])


def drop_tensor(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "error", "says"),
    [
        (lambda f: (f / "config.json").unlink(), FormatError, "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), FormatError, "config.json of .* can't be read"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), FormatError, "can't be read"),
        (lambda f: (f / "config.json").write_text("[]"), FormatError, "names no model_type"),
        (lambda f: edit_config(f, model_type="qwen9"), InputError, "architecture 'qwen9': transformers .* not know it"),
        (lambda f: edit_config(f, model_type="own", auto_map={}), InputError, "code of its own, which is not run"),
        (lambda f: edit_config(f, model_type="clip"), InputError, "'clip', which is not a decoder language model"),
        (lambda f: edit_config(f, num_hidden_layers=6), FormatError, "value that does not fit"),
        (
            lambda f: edit_config(f, num_hidden_layers=6, layer_types=["full_attention"] * 6),
            FormatError,
            "lack 22 tensors, such as 'model.layers.4",
        ),
        (lambda f: edit_config(f, hidden_size=64), FormatError, "do not have the shapes its config.json says"),
        (lambda f: edit_config(f, hidden_size="wide"), FormatError, "holds a value that does not fit"),
        (lambda f: (f / "model.safetensors").unlink(), NotFoundError, "weights of .* can't be loaded"),
        (lambda f: truncate(f / "model.safetensors"), FormatError, "weights of .* can't be loaded"),
        (drop_tensor, FormatError, "lack 1 tensors, such as 'model.layers.2.mlp.up_proj.weight'"),
        (lambda f: [p.unlink() for p in f.glob("tokenizer*")], NotFoundError, "has no tokenizer"),
        (
            lambda f: (f / "tokenizer.json").write_text("{"),
            NotFoundError,
            "has no tokenizer that transformers can load",
        ),
    ],
)
def test_damaged_folders(saved, tmp_path, damage, error, says):
    folder = copy(saved["qwen3"], tmp_path)
    damage(folder)
    with pytest.raises(error, match=says) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_a_file_is_not_a_folder(saved):
    with pytest.raises(NotFoundError, match="is a file; pass the folder"):
        load_model(saved["qwen3"] / "config.json")


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's HTTP as loading needs: one repository, one gated, nothing else."""

    folder: Path

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, *, body):
        repo, _, rest = self.path.lstrip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        if not rest:
            return self.refuse(404, "EntryNotFound")
        if repo == "lab/gated":
            return self.refuse(403, "GatedRepo")
        if repo == "lab/silent":
            self.close_connection = True
            return None
        if repo == "lab/broken":
            return self.refuse(400, "")
        if repo != "lab/tiny":
            return self.refuse(404, "RepoNotFound")
        if revision not in ("main", "0" * 40):
            return self.refuse(404, "RevisionNotFound")
        if not (self.folder / name).is_file():
            return self.refuse(404, "EntryNotFound")
        content = (self.folder / name).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def refuse(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass


ASK = """
import json, sys, time
import torch
from qwen_scope.errors import QwenScopeError
from qwen_scope.model import HookPoint, capture, load_model

torch.set_num_threads(1)
for source, revision in json.loads(sys.argv[1]):
    begin = time.monotonic()
    try:
        loaded = load_model(source, revision=revision, device="cpu")
        h = capture(loaded.model, torch.arange(10)[None], [HookPoint(3)])[HookPoint(3)]
        answer = ["loaded", float(h.abs().sum())]
    except QwenScopeError as error:
        answer = [type(error).__name__, str(error)]
    print(json.dumps([*answer, time.monotonic() - begin]), flush=True)
"""


def ask(home, endpoint, *sources):
    """What `load_model` answers in a process of its own, with this cache and this Hub: (outcome, words, seconds)."""
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    settings |= {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", "NO_PROXY": "*"}
    settings |= {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    command = [sys.executable, "-c", ASK, json.dumps(sources)]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_a_hub_and_its_cache(saved, family, tmp_path, monkeypatch):
    expected = pytest.approx(float(capture(family("qwen3"), IDS, [POINT])[POINT].abs().sum()), rel=1e-5)
    asked = {
        ("lab/tiny", None): ("loaded", ""),
        ("lab/tiny", "0" * 40): ("loaded", ""),
        ("lab/tiny", "v9"): ("NotFoundError", "'lab/tiny' has no revision 'v9'"),
        ("lab/none", None): ("NotFoundError", "neither a folder here nor a repository on the Hub"),
        ("lab/gated", None): ("NotFoundError", "is gated"),
        ("lab/broken", None): ("NotFoundError", "the Hub did not give 'lab/broken'"),
        ("lab/silent", None): ("NotFoundError", "the Hub can't be reached"),
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("TinyHub", (Hub,), {"folder": saved["qwen3"]}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        answers = ask(tmp_path, f"http://127.0.0.1:{server.server_port}", *asked)
    finally:
        server.shutdown()
        server.server_close()
    for (outcome, says), (got, words, seconds) in zip(asked.values(), answers, strict=True):
        assert got == outcome
        assert words == expected if got == "loaded" else says in words
        assert got == "loaded" or seconds < 15  # the client alone would try for half a minute

    # the Hub is gone and offline mode is on: what is cached loads
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    cached = load_model("lab/tiny", device="cpu").model
    assert float(capture(cached, IDS, [POINT])[POINT].abs().sum()) == expected
    with pytest.raises(NotFoundError, match="offline mode is on"):
        load_model("lab/other")
