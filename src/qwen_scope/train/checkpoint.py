"""A run on disk: everything it needs to go on as if it had never stopped.

A checkpoint is a folder `step-00000500` with one safetensors file per rank and `manifest.json`, which is written last
and moved into place, so its existence means that the checkpoint is whole. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen_scope.errors import (
    FormatError,
    InputError,
    MismatchError,
    NotFoundError,
    QwenScopeWarning,
    check_count,
    foreign,
)
from qwen_scope.files import Fields, digest_of, read_object, write_text
from qwen_scope.text import Counted

from .config import Plan, TrainConfig, hook_of
from .parallel import Ranks
from .step import Layer, adam
from .weights import Weights

FORMAT = "qwen-scope-train/2"
OLDER = ("qwen-scope-train/1",)
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8})")


@dataclass(eq=False)
class RunState:
    """Everything that changes during a run.

    Attributes:
        step: steps done.
        layers: per hook point the weights, the optimiser and the dead counters.
        cursor: where the residuals go on, or None where their source can't say; then it is advanced by `step` batches.
        rng: torch's generators, `cpu` and, where there is one, `cuda`.
        seconds: of training.
        counted: which tokens count, the same from the first step to the last.
    """

    step: int = 0
    layers: dict[str, Layer] = field(default_factory=dict)
    cursor: dict[str, Any] | None = None
    rng: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    counted: Counted = field(default_factory=Counted.everything)


@dataclass(frozen=True)
class Checkpoints:
    """Where and how often a run is saved, and whether it goes on from there.

    Attributes:
        folder: holds the checkpoints of this run and nothing else.
        every: steps between two checkpoints; the last step is saved in any case.
        keep: how many of the latest stay.
        resume: go on from the latest checkpoint, or start where there is none. Without it a folder that holds a
            checkpoint is refused.
    """

    folder: Path
    every: int = 1000
    keep: int = 2
    resume: bool = False

    def __post_init__(self) -> None:
        check_count("every", self.every)
        check_count("keep", self.keep)

    def prepare(self) -> None:
        """Make the folder and try to write into it.

        Raises:
            InputError: it can't be written to, or it holds a run that the caller did not ask to resume.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / f".probe-{os.getpid()}"
            probe.write_bytes(b"x")
            probe.unlink()
        except OSError as error:
            raise InputError(f"{self.folder} can't be written to: {error.strerror}") from error
        if (last := self.latest()) and not self.resume:
            raise InputError(f"{self.folder} holds a run at {last.name}; resume it, or name another folder")

    def check_space(self, needed: int) -> None:
        """Raise InputError if `keep + 1` checkpoints of `needed` bytes don't fit on the disk."""
        free = shutil.disk_usage(self.folder).free
        if free < needed * (self.keep + 1):
            raise InputError(
                f"{self.folder} has {free / 1e9:.1f} GB free; {self.keep + 1} checkpoints take"
                f" {needed * (self.keep + 1) / 1e9:.1f} GB"
            )

    def complete(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        found = [p for p in self.folder.glob("step-*") if _NAME.fullmatch(p.name) and (p / MANIFEST).is_file()]
        return sorted(found)

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        return done[-1] if (done := self.complete()) else None

    def prune(self) -> None:
        """Remove all but the latest `keep`, and what a killed run left incomplete. The manifest goes first."""
        whole = self.complete()
        for old in whole[: -self.keep]:
            (old / MANIFEST).unlink()
        for path in self.folder.glob("step-*"):
            if _NAME.fullmatch(path.name) and not (path / MANIFEST).exists():
                shutil.rmtree(path)


def save(state: RunState, plan: Plan, where: Checkpoints, ranks: Ranks) -> Path:
    """Write one checkpoint, by all ranks together; the older ones stay until it is whole.

    Raises:
        InputError: the disk refuses; the last complete checkpoint is untouched.
    """
    place = where.folder / f"step-{state.step:08d}"
    last = where.latest()
    try:
        if ranks.first:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
        ranks.barrier()
        write_rank(state, place, ranks)
        ranks.barrier()
        if ranks.first:
            write_manifest(state, plan, place, ranks)
            where.prune()
        ranks.barrier()
    except (OSError, SafetensorError) as error:
        shutil.rmtree(place, ignore_errors=True)
        good = f"the last good checkpoint is {last}" if last else "there is no earlier checkpoint"
        raise InputError(
            f"the checkpoint of step {state.step} can't be written to {where.folder}: {error}; {good}"
        ) from error
    return place


def write_rank(state: RunState, place: Path, ranks: Ranks) -> None:
    """This rank's tensors, and what it has to say in the manifest."""
    tensors = {f"rng/{name}": tensor for name, tensor in state.rng.items()}
    # In data-parallel training all ranks hold the same layers.
    if ranks.mode != "data" or ranks.first:
        for name, layer in state.layers.items():
            tensors |= {f"{name}/{key}": tensor for key, tensor in tensors_of(layer).items()}
    path = place / f"rank{ranks.rank}.safetensors"
    save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, path)
    fsync(path)
    layers = {name: numbers_of(layer) for name, layer in state.layers.items()}
    note = {"layers": layers, "cursor": state.cursor, "bytes": path.stat().st_size, "sha256": digest_of(path)}
    write_text(place / f"rank{ranks.rank}.json", json.dumps(note))


def write_manifest(state: RunState, plan: Plan, place: Path, ranks: Ranks) -> None:
    """Gather what the ranks noted; from here on the checkpoint counts."""
    notes = []
    for rank in range(ranks.world):
        note = place / f"rank{rank}.json"
        notes.append(json.loads(note.read_text(encoding="utf-8")))
        note.unlink()
    manifest = {
        "format": FORMAT,
        "step": state.step,
        "seconds": state.seconds,
        "config": plan.to_json(),
        "counted": state.counted.to_json(),
        "mode": ranks.mode,
        "world": ranks.world,
        "ranks": notes,
    }
    write_text(place / MANIFEST, json.dumps(manifest, indent=1))


def load(
    plan: Plan | TrainConfig, where: Checkpoints, ranks: Ranks, device: torch.device | str | None = None,
    counted: Counted = Counted.everything(),  # noqa: B008 - frozen
) -> RunState:  # fmt: skip
    """The newest checkpoint of a run whose files are all whole; newer ones are said and removed.

    Raises:
        NotFoundError: there is none.
        MismatchError: it was written by a run with another config, on other tokens, or divided among other processes.
        FormatError: there are some, and each is damaged; what is said is about the newest.
    """
    plan = plan if isinstance(plan, Plan) else Plan(plan)
    place, manifest = newest(where)
    check_same_run(manifest, plan, counted, ranks, place)
    path, note = place / f"rank{ranks.rank}.safetensors", manifest["ranks"][ranks.rank]
    tensors = read_tensors(path)
    source = tensors
    if ranks.mode == "data" and not ranks.first:
        source = read_tensors(place / "rank0.safetensors")
    with foreign(f"{place / MANIFEST} does not describe {path.name}"):
        layers = {
            name: layer_from(plan.of(name), hook_of(name), numbers, under(source, name), device)
            for name, numbers in note["layers"].items()
        }
    ranks.barrier()
    for later in where.complete() if ranks.first else ():
        if later.name > place.name:
            (later / MANIFEST).unlink()
            shutil.rmtree(later)
    return RunState(manifest["step"], layers, note["cursor"], under(tensors, "rng"), manifest["seconds"], counted)


def newest(where: Checkpoints) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint whose files are those that its manifest describes, and the manifest.

    Raises:
        NotFoundError, FormatError: as `load`.
    """
    problems: list[tuple[Path, FormatError]] = []
    for place in reversed(where.complete()):
        try:
            manifest = read_manifest(place)
            for rank, note in enumerate(manifest["ranks"]):
                check_file(place / f"rank{rank}.safetensors", note)
        except FormatError as error:
            problems.append((place, error))
            continue
        for damaged, error in problems:
            warnings.warn(f"{damaged.name} is passed over: {error}", QwenScopeWarning, 3)
        return place, manifest
    if problems:
        raise problems[0][1]
    raise NotFoundError(f"{where.folder} holds no complete checkpoint")


def read_manifest(place: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        FormatError: it is not one of this format, or a value in it can't be.
    """
    path = place / MANIFEST
    data = read_object(path)
    if data.get("format") in OLDER:
        raise FormatError(f"{path} was written by an earlier version; finish the run with that one")
    if data.get("format") != FORMAT:
        raise FormatError(f"{path} is not a manifest of the format {FORMAT}")
    known = ("format", "step", "seconds", "config", "counted", "mode", "world", "ranks")
    read = Fields({"seconds": 0.0, **data}, str(path), known)
    found = {"step": read.count("step"), "seconds": read.number("seconds", 0), "config": read.object("config")}
    found["counted"] = Counted.from_json(read.object("counted"), f"'counted' of {path}")
    found |= {"mode": read.text("mode"), "world": read.count("world", 1), "ranks": []}
    for note in read.items("ranks"):
        one = Fields(note, f"a rank of {path}", ("layers", "cursor", "bytes", "sha256"))
        note = {"layers": one.object("layers"), "cursor": one.maybe(one.object, "cursor")}
        found["ranks"].append(note | {"bytes": one.count("bytes"), "sha256": one.text("sha256")})
    if len(found["ranks"]) != found["world"]:
        raise FormatError(f"{path} is of {found['world']} processes and describes the files of {len(found['ranks'])}")
    return found


def check_same_run(manifest: Mapping[str, Any], plan: Plan, counted: Counted, ranks: Ranks, place: Path) -> None:
    """Raise MismatchError unless the checkpoint was written by a run like this one, naming what differs."""
    mine, theirs = plan.to_json(), manifest["config"]
    differ = [
        f"{name} {theirs.get(name)!r} there and {mine.get(name)!r} here"
        for name in sorted({*mine, *theirs})
        if mine.get(name) != theirs.get(name)
    ]
    if manifest["counted"] != counted:
        said = manifest["counted"].difference(counted, ("that run", "this one"))
        differ.append(said or "its thresholds for sinks were measured on another sample")
    if (manifest["mode"], manifest["world"]) != (ranks.mode, ranks.world):
        differ.append(f"{manifest['world']} processes ({manifest['mode']}) there and {ranks.world} ({ranks.mode}) here")
    if differ:
        raise MismatchError(f"{place} is a checkpoint of another run: {'; '.join(differ)}")


def check_file(path: Path, note: Mapping[str, Any]) -> None:
    """Refuse a file that is not the one the manifest means.

    Raises:
        FormatError: it is another, or can't be read.
    """
    with foreign(f"{path} can't be read"):
        same = path.stat().st_size == note["bytes"] and digest_of(path) == note["sha256"]
    if not same:
        raise FormatError(f"{path} is not the file that its manifest describes")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one rank."""
    with foreign(f"{path} can't be read"):
        # Copies lie in memory as new tensors do: where a row starts decides last digits on some CPUs.
        return {name: tensor.clone() for name, tensor in load_file(path).items()}


def tensors_of(layer: Layer) -> dict[str, Tensor]:
    """Every tensor of a layer: weights, dead counters, optimiser."""
    found = {**layer.weights.tensors(), "silent": layer.silent}
    for name, parameter in layer.weights.parameters().items():
        for key, value in layer.optimiser.state.get(parameter, {}).items():
            found[f"adam.{key}/{name}"] = value
    return found


def numbers_of(layer: Layer) -> dict[str, Any]:
    """Every number of a layer that is not a tensor."""
    w = layer.weights
    return {
        "scale": w.scale, "pre_bias": w.pre_bias, "first": w.first, "trained": sorted(w.parameters()),
        "tokens": layer.tokens, "dropped": layer.dropped,
    }  # fmt: skip


def layer_from(
    config: TrainConfig, name: str, numbers: Mapping[str, Any], tensors: Mapping[str, Tensor],
    device: torch.device | str | None,
) -> Layer:  # fmt: skip
    """The layer that `tensors_of` and `numbers_of` describe."""
    here = {key: tensor.to(device) if device is not None else tensor for key, tensor in tensors.items()}
    for key in numbers["trained"]:
        here[key].requires_grad_()
    weights = Weights(
        here["W_enc"], here["W_dec"], here["b_enc"], here["b_dec"], scale=numbers["scale"],
        pre_bias=numbers["pre_bias"], norms=here["norms"], first=numbers["first"], extra=under(here, "extra", "."),
    )  # fmt: skip
    layer = Layer(
        name,
        weights,
        adam(config, weights),
        here["silent"],
        numbers["tokens"],
        numbers["dropped"],
    )
    for key, parameter in weights.parameters().items():
        # Adam's own count of steps stays on the CPU.
        layer.optimiser.state[parameter] = {
            part: here[f"adam.{part}/{key}"] for part in ("step", "exp_avg", "exp_avg_sq")
        }
    return layer


def under(tensors: Mapping[str, Tensor], prefix: str, separator: str = "/") -> dict[str, Tensor]:
    """The entries whose name starts with a prefix, without it."""
    start = prefix + separator
    return {key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)}


def fsync(path: Path) -> None:
    """Wait until the file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def rng_now() -> dict[str, Tensor]:
    """The state of torch's generators."""
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else states


def restore_rng(states: Mapping[str, Tensor]) -> None:
    """Set torch's generators."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
