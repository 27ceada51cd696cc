"""A training under way, kept on disk so that one that is killed goes on to the same bytes: weights, moments, log and
points so far, in a folder beside the adapter. Demands trainings that give and take their state; leaves steps to loop.py."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from leakfast.errors import ModelError, StoreError
from leakfast.storage.disk import atomic_write, explained, file_hash, free_name, hash_of
from leakfast.storage.layout import point_folder
from leakfast.train.recipe import settings_of
from leakfast.version import __version__

if TYPE_CHECKING:
    from leakfast.models.loading import Loaded
    from leakfast.train.collate import Example
    from leakfast.train.loop import Training
    from leakfast.train.recipe import Recipe

log = logging.getLogger("leakfast.train")

STATE = "state.json"
EVERY_S, COST_MOST = 60.0, 0.01
Points = dict[float, tuple[int, dict[str, torch.Tensor]]]  # share of training → step, weights


def due(waited_s: float, took_s: float) -> bool:
    """Whether the state is written now: a minute after the last time, and not before the last writing (`took_s`) is less
    than a hundredth of the time since. By time and not by steps, whose length differs a thousandfold between models: so a
    kill costs about a minute, and writing under 1 %, on each. The adapter's bytes do not depend on which steps are kept."""
    return waited_s >= max(EVERY_S, took_s / COST_MOST)


def beside(out_dir: str | Path) -> Path:
    """The folder of an adapter's training under way."""
    out = Path(out_dir)
    return out.with_name(f".{out.name}.unfinished")


def key_of(
    loaded: Loaded,
    trained: Sequence[tuple[Recipe, Sequence[Example]]],
    shares: Sequence[float] = (),
    *,
    packed: bool,
) -> str:
    """SHA-256 (hex) of what the bytes of these adapters follow from: base, rows as they are read, settings, seeds, points
    that are kept, and the versions that compute. Not whether activations are made again, which changes nothing."""
    about = []
    for recipe, examples in trained:
        settings = {k: v for k, v in settings_of(recipe.train).items() if k != "gradient_checkpointing"}
        about.append((settings, recipe.seed, [vars(one) for one in examples], *recipe.origin))
    base = (loaded.fingerprint, loaded.dtype, loaded.device.type, packed)
    return hash_of(base, about, list(shares), torch.__version__, __version__)


@contextmanager
def unfinished(
    folder: Path, key: str, trainings: Sequence[Training], points: Points | None = None
) -> Iterator[Unfinished]:
    """The state of trainings that begin in the block, taken from `folder` where one of this key is there; gone after the
    block, and after a ModelError, to which it would lead again."""
    state = Unfinished(folder, key, trainings, {} if points is None else points)
    state.take()
    try:
        yield state
    except ModelError:
        state.remove()
        raise
    state.remove()


class Unfinished:
    """One state of several trainings that go step by step together, or of one. points: those kept so far, filled and
    read in place.

    state.json names the tensors' file with its SHA-256, and is written last: what it names is whole."""

    def __init__(self, folder: Path, key: str, trainings: Sequence[Training], points: Points) -> None:
        self.folder, self.key, self.trainings, self.points = folder, key, trainings, points
        self._files: dict[float, list[Any]] = {}  # share → step, file, hash of a point that is written
        self._last, self._took_s = time.monotonic(), 0.0

    def keep(self) -> None:
        """Writes the state where that is due (see `due`), between steps only. A disk that takes none stops no training: it
        is told of, and the state of before stays."""
        began = time.monotonic()
        if not any(t.history for t in self.trainings) or not due(began - self._last, self._took_s):
            return
        try:
            self._write()
        except StoreError as error:
            log.warning("train: the state of %s could not be kept: %s", self._name, error)
        self._last = time.monotonic()
        self._took_s = self._last - began

    def take(self) -> None:
        """The trainings as they were kept. A state that is damaged, or of other trainings, is moved aside and told of."""
        if not (self.folder / STATE).is_file():
            return
        try:
            told = json.loads((self.folder / STATE).read_text(encoding="utf-8"))
            if told.pop("check") != hash_of(told):
                raise ValueError(f"{STATE} does not match its check")
            if told["of"] != self.key:
                self._set_aside("it is of other rows, settings, or another model or version")
                return
            tensors = self._read(told["tensors"])
            points = {float(s): (step, self._read(file)) for s, (step, file) in told["points"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._set_aside(f"it is damaged ({error})")
            return
        for k, (training, words) in enumerate(zip(self.trainings, told["trainings"], strict=True)):
            mine = {n.removeprefix(f"{k}."): t for n, t in tensors.items() if n.startswith(f"{k}.")}
            training.take(mine, words)
        self.points.update(points)
        self._files = {float(share): found for share, found in told["points"].items()}
        torch.set_rng_state(tensors["generator"])
        if "generator cuda" in tensors:
            torch.cuda.set_rng_state(tensors["generator cuda"], self._device())
        steps = max(len(t.history) for t in self.trainings), max(t.total for t in self.trainings)
        log.info("train: %s goes on at step %d of %d", self._name, *steps)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _name(self) -> str:
        return self.folder.name.removeprefix(".").removesuffix(".unfinished")

    def _device(self) -> torch.device:
        return self.trainings[0].weights[0].device

    def _write(self) -> None:
        tensors, words = {"generator": torch.get_rng_state()}, []
        if self._device().type == "cuda":
            tensors["generator cuda"] = torch.cuda.get_rng_state(self._device())
        for k, training in enumerate(self.trainings):
            its, said = training.state()
            tensors |= {f"{k}.{name}": tensor for name, tensor in its.items()}
            words.append(said)
        for share, (step, weights) in self.points.items():
            if share not in self._files:
                self._files[share] = [step, self._stored(f"{point_folder(share)}.safetensors", weights)]
        step = max(len(t.history) for t in self.trainings)
        file = self._stored(f"step-{step}.safetensors", tensors)
        told = {"of": self.key, "tensors": file, "trainings": words, "points": self._files}
        told = json.loads(json.dumps(told))
        told["check"] = hash_of(told)
        atomic_write(self.folder / STATE, json.dumps(told).encode())
        named = {STATE, file[0], *(found[1][0] for found in self._files.values())}
        with explained(self.folder):
            for path in self.folder.iterdir():
                if path.name not in named:
                    path.unlink()

    def _stored(self, name: str, tensors: dict[str, torch.Tensor]) -> list[str]:
        """The tensors' file: its name and SHA-256."""
        from safetensors.torch import save_file

        held = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        atomic_write(self.folder / name, lambda path: save_file(held, str(path)))
        return [name, file_hash(self.folder / name)]

    def _read(self, file: Sequence[str]) -> dict[str, torch.Tensor]:
        """What `_stored` wrote. Raises ValueError, OSError where it is not that."""
        from safetensors.torch import load_file

        name, sha256 = file
        if file_hash(self.folder / name) != sha256:
            raise ValueError(f"{name} does not match its hash")
        return load_file(self.folder / name)

    def _set_aside(self, why: str) -> None:
        target = free_name(self.folder.with_name(f"{self.folder.name}.aside"))
        with explained(target):
            self.folder.rename(target)
        told = (self._name, self.folder.name, why, target.name)
        log.warning("train: %s begins anew, not from %s: %s; that is moved to %s", *told)
