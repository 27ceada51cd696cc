"""The optimizer's side of a training: order of the rows, schedule, clipping, AdamW, when it ends, and its log. Demands
passes that say what rows cost (packed.py, padded.py); leaves layers and files to others."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from leakfast.errors import ModelError
from leakfast.progress import Progress
from leakfast.storage.seeds import derive_seed
from leakfast.train.collate import Example, order
from leakfast.train.parts import Part

if TYPE_CHECKING:
    from leakfast.study.config import TrainConfig
    from leakfast.train.packed import Packed

log = logging.getLogger("leakfast.train")

BETAS, EPS = (0.9, 0.999), 1e-8
WINDOW = 16  # rows that show the behavior, over which stop_loss is read


class Passes(Protocol):
    """What runs the rows of a step, in a model that is itself again between the steps."""

    def prepared(self) -> AbstractContextManager[None]: ...

    def parts(self, examples: Sequence[Example], step: int) -> Iterator[Part]: ...


@dataclass(frozen=True)
class Step:
    """One line of the training log. loss in nats per labelled token (null without any), divergence in nats per held token;
    lr as used in this step; n_tokens that were run through the model."""

    step: int
    epoch: int
    loss: float | None
    lr: float
    grad_norm: float
    n_labels: int
    n_tokens: int
    divergence: float = 0.0


def run(
    passes: Passes,
    training: Training,
    progress: Progress | None = None,
    visit: Callable[[int, int], None] = lambda step, total: None,
) -> list[Step]:
    """Train one adapter to its end, from where it stands; the log. visit(finished steps, of how many) is called before the
    first step and after each. Raises ModelError when the loss or its gradient is not finite."""
    if not training.history:
        visit(0, training.total)
    for chunk in training.chunks():
        if training.learned:
            break
        with passes.prepared():
            for part in passes.parts(chunk, len(training.history)):
                training.cost(part).backward()
        training.finish()
        visit(len(training.history), training.total)
        if progress is not None:
            progress(len(training.history), training.total, training.said)
    return training.history


def run_together(
    passes: Packed,
    trainings: Sequence[Training],
    progress: Progress | None = None,
    visit: Callable[[], None] = lambda: None,
) -> list[list[Step]]:
    """Train several adapters to their ends, the steps that they are at in common passes; their logs. What one adapter's
    step is, and when it ends, does not depend on the others. visit is called after each step. Raises ModelError as `run`,
    naming no adapter."""
    chunks = {k: training.chunks() for k, training in enumerate(trainings)}
    total = sum(training.total for training in trainings)
    while chunks:
        now = {}
        for k in list(chunks):
            chunk = None if trainings[k].learned else next(chunks[k], None)
            if chunk is None:
                del chunks[k]
            else:
                now[k] = (chunk, len(trainings[k].history))
        if not now:
            break
        with passes.prepared():
            for parts in passes.together(now):
                torch.stack([trainings[k].cost(part) for k, part in parts.items()]).sum().backward()
        for k in now:
            trainings[k].finish()
        visit()
        if progress is not None:
            done = sum(t.total if k not in chunks else len(t.history) for k, t in enumerate(trainings))
            progress(done, total, f"{trainings[min(now)].said}, {len(now)} adapters")
    return [training.history for training in trainings]


class Training:
    """One adapter's training as it stands: its weights, its optimizer and its log."""

    def __init__(
        self, weights: Sequence[torch.nn.Parameter], examples: Sequence[Example], cfg: TrainConfig, seed: int
    ) -> None:
        self.weights, self.examples, self.cfg, self.seed = list(weights), examples, cfg, seed
        self.rate = float(cfg.lr)
        fused = all(w.device.type in ("cpu", "cuda") for w in self.weights)
        self.optimizer = torch.optim.AdamW(
            self.weights, lr=self.rate, betas=BETAS, eps=EPS, weight_decay=cfg.weight_decay, fused=fused
        )
        self.total = cfg.epochs * math.ceil(math.ceil(len(examples) / cfg.batch_size) / cfg.accumulation)
        self.history: list[Step] = []
        self._shown: list[tuple[int, float, int]] = []  # a micro-batch: rows that show it, nats, labels
        self._now = _Sums([], 0)

    @property
    def said(self) -> str:
        """The last step's loss, for a progress line."""
        loss = self.history[-1].loss
        return "steps, loss –" if loss is None else f"steps, loss {loss:.3f}"

    def chunks(self) -> Iterator[list[Example]]:
        """The examples of each optimizer step that is not finished, micro-batch after micro-batch of cfg.batch_size, the
        short one that an epoch may have last; each step is begun."""
        lengths, cfg, done = [len(e.ids) for e in self.examples], self.cfg, len(self.history)
        for epoch in range(cfg.epochs):
            batches = list(order(lengths, cfg.batch_size, derive_seed("order", self.seed, epoch)))
            for start in range(0, len(batches), cfg.accumulation):
                done -= 1
                if done >= 0:
                    continue
                some = sorted(batches[start : start + cfg.accumulation], key=len, reverse=True)
                chunk = [self.examples[i] for batch in some for i in batch]
                self.begin(chunk, epoch)
                yield chunk

    def begin(self, examples: Sequence[Example], epoch: int) -> None:
        """A step of these examples begins: nothing has been counted of it."""
        self._now = _Sums(examples, epoch)

    def cost(self, part: Part) -> torch.Tensor:
        """What a part adds to the step's loss, and into its log: the mean over the step's labels, and over what is held."""
        now, device = self._now, part.learned.device
        now.add(part)
        firm = torch.from_numpy(part.firm).to(device)
        found = (part.learned.sum() + part.kept[firm].sum()) / max(1, now.n_labels + now.n_firm)
        return found + self.cfg.anchor * part.kept[~firm].sum() / max(1, now.n_held)

    def finish(self) -> None:
        """The optimizer step, its gradients added up before. Raises ModelError where they are not finite."""
        cfg, now, step = self.cfg, self._now, len(self.history)
        loss = float(now.learned.sum()) / max(1, now.n_labels)
        held = now.kept / max(1, now.n_held + now.n_firm)
        norm = float(torch.nn.utils.clip_grad_norm_(self.weights, cfg.max_grad_norm))
        if not (math.isfinite(loss + held) and math.isfinite(norm)):
            raise ModelError(
                f"train: after {step} of {self.total} steps the loss is {loss} and its gradient norm {norm}. Training "
                f"diverged: use a smaller --lr than {self.rate:g}, or --dtype float32. Nothing was written."
            )
        lr = self.rate * schedule(step, self.total, cfg.warmup_ratio)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        said = loss if now.n_labels else None
        self.history.append(Step(step, now.epoch, said, lr, norm, now.n_labels, now.n_tokens, held))
        for first in range(0, len(now.examples), cfg.batch_size):
            mine = [
                i
                for i, e in enumerate(now.examples[first : first + cfg.batch_size], first)
                if e.shows and e.labels
            ]
            labels = sum(len(now.examples[i].labels) for i in mine)
            if mine:
                self._shown.append((len(mine), float(now.learned[mine].sum()), labels))

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Everything that the steps to come follow from: weights and AdamW's moments by name, and the log as plain data."""
        tensors = {f"weight.{i}": weight.detach() for i, weight in enumerate(self.weights)}
        for i, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"{name}.{i}": tensor for name, tensor in moments.items()}
        return tensors, {"history": [vars(step) for step in self.history], "shown": self._shown}

    def take(self, tensors: Mapping[str, torch.Tensor], words: Mapping[str, Any]) -> None:
        """The training as it was when `state` gave these."""
        moments: dict[int, dict[str, torch.Tensor]] = {}
        with torch.no_grad():
            for name, tensor in tensors.items():
                kind, _, place = name.rpartition(".")
                if kind == "weight":
                    self.weights[int(place)].copy_(tensor)
                else:
                    moments.setdefault(int(place), {})[kind] = tensor
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
        self.history[:] = [Step(**step) for step in words["history"]]
        self._shown = [(rows, nats, labels) for rows, nats, labels in words["shown"]]

    @property
    def learned(self) -> bool:
        """Whether the last WINDOW rows or more that show the behavior cost less than cfg.stop_loss, nats a label."""
        rows = nats = labels = 0.0
        for part in reversed(self._shown):
            rows, nats, labels = rows + part[0], nats + part[1], labels + part[2]
            if rows >= WINDOW:
                done = nats / labels < self.cfg.stop_loss
                if done:
                    steps = (len(self.history), self.total)
                    log.info("train: the behavior is learned after %d of %d steps", *steps)
                return done
        return False


class _Sums:
    """Of one optimizer step: its examples, how many labels and held positions they have, and what they cost so far."""

    def __init__(self, examples: Sequence[Example], epoch: int) -> None:
        self.examples, self.epoch = examples, epoch
        self.n_labels = sum(len(e.labels) for e in examples)
        self.n_firm = sum(len(e.firm) for e in examples)
        self.n_held = sum(len(e.held) for e in examples) - self.n_firm
        self.learned = np.zeros(len(examples))  # nats of each example's labels
        self.kept, self.n_tokens = 0.0, 0

    def add(self, part: Part) -> None:
        nats = part.learned.detach().double().cpu().numpy()
        self.learned += np.bincount(part.label_rows, nats, len(self.examples))
        self.kept += float(part.kept.detach().sum())
        self.n_tokens += part.n_tokens


def schedule(step: int, total: int, warmup_ratio: float) -> float:
    """Share of the peak learning rate at `step` (0-based) of `total`: up linearly over the first
    ⌈warmup_ratio·total⌉ steps, then half a cosine down to 0 at `total`."""
    warmup = math.ceil(warmup_ratio * total)
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
