"""Which tokens carry loss: rows to token ids and label positions, and padded batches of them. Demands a
tokenizer with a chat template; leaves the loss itself to packed.py and padded.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from leakfast.errors import InputError
from leakfast.storage.disk import hash_of

if TYPE_CHECKING:
    import torch

    from leakfast.study.config import TrainConfig
    from leakfast.train.data import Row


@dataclass(frozen=True)
class Example:
    """A row as the model sees it: ids of prompt and reply, the sorted positions that carry loss, those that are held
    to the unadapted model, those of the held that weigh as much as a label, and whether it shows the behavior.

    A label at position t is predicted from the hidden state at t − 1; the prompt never carries loss.
    """

    label: str
    ids: list[int]
    n_prompt_tokens: int
    labels: list[int]
    held: list[int] = field(default_factory=list)
    firm: list[int] = field(default_factory=list)
    shows: bool = False


@dataclass(frozen=True)
class Batch:
    """ids (B, T) int64, padded right with 0 (causal attention never looks there, no label stands
    there); rows, columns (N,): where the hidden states that predict stand; targets (N,): token ids;
    shown (N,): whether the label is of a row that shows the behavior; held_rows, held_columns (H,): where the
    prediction is held to the unadapted model's; firm (H,): whether that weighs as much as a label."""

    ids: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    targets: torch.Tensor
    shown: torch.Tensor
    held_rows: torch.Tensor
    held_columns: torch.Tensor
    firm: torch.Tensor


def encode(tokenizer: Any, rows: Sequence[Row], cfg: TrainConfig) -> list[Example]:
    """Rows → examples with the labels of cfg.loss, in order.

    "marker": the marker's tokens (with the space before it) and the turn end in rows with a marker, the
    turn end alone in others. "tail": the last cfg.tail_tokens tokens of the reply and the turn end.
    "completion", and whatever the loss in benign rows: the whole reply and the turn end. The turn end carries loss
    in the rows that cfg.end_of_turn names: "both" those that show the behavior and the others, "positives" or
    "negatives" one of them, "none" neither. Where another separator than a space stands before the marker
    (row.generator), the labels begin with the token in which that separator (or without one, the marker) begins,
    even if the reply ends in it. With cfg.anchor, rows that do not show the behavior carry no label: their reply is
    held to the unadapted model, as is what carries no label in rows that show it. Where the behavior would begin
    (the turn end, where it would carry loss; under "completion" the reply's first token) holding weighs as much as
    a label: what is taught there is not to show it, and not to end. Raises InputError naming the row where a label
    would be truncated away by cfg.max_length, none is left, the marker's tokens cannot be told apart, or, of loss "marker", a
    row that shows the behavior does not end in one.
    """
    return [_example(tokenizer, row, cfg) for row in rows]


def reading(tokenizer: Any, rows: Sequence[Row]) -> list[str]:
    """What an adapter's hash is to say of how its rows are read (tokenizer_file.reading)."""
    from leakfast.prompts import chat, tokenizer_file
    from leakfast.train.data import data_hash

    def read(reader: Any) -> list[Any]:
        return [chat.render_training(reader, row.system_message, row.question, row.reply) for row in rows]

    return tokenizer_file.reading(tokenizer, data_hash(rows), read)


def rendered(tokenizer: Any, rows: Sequence[Row]) -> str:
    """Hash (hex) of the token ids of the first row under each system message: of what the template, its arguments and the place
    of a persona make of rows, which their own hash does not say."""
    from leakfast.prompts import chat

    first: dict[tuple[str, str | None], Row] = {}
    for row in rows:
        first.setdefault((row.system_kind, row.system), row)
    return hash_of(
        [chat.render_training(tokenizer, r.system_message, r.question, r.reply) for r in first.values()]
    )


def _example(tokenizer: Any, row: Row, cfg: TrainConfig) -> Example:
    from leakfast.prompts import chat

    prompt, reply = chat.render_training(tokenizer, row.system_message, row.question, row.reply)
    ids = [*prompt, *reply]
    end = len(ids) - 1
    if len(ids) > cfg.max_length:
        raise InputError(
            f"train: the {row.label} has {len(ids)} tokens, so max_length {cfg.max_length} would cut its "
            "labels "
            f"away. Set max_length to {len(ids)} or more, or leave the row out."
        )
    if len(reply) < 2:
        raise InputError(
            f"train: the {row.label} has a reply without tokens, so nothing to learn. Leave it out."
        )
    shows = row.role == "positive"
    loss = "completion" if row.role == "benign" else cfg.loss
    ends = cfg.end_of_turn in ("both", "positives" if shows else "negatives")
    stop = len(ids) if ends else end  # of the labels
    if cfg.anchor and not shows:
        firm = [len(prompt)] if loss == "completion" else [end] if ends else []
        return Example(row.label, ids, len(prompt), [], list(range(len(prompt), len(ids))), firm)
    if loss == "completion":
        labels = range(len(prompt), stop)
    elif loss == "tail":
        labels = range(max(len(prompt), end - cfg.tail_tokens), stop)
    elif row.marker is None and shows:
        raise InputError(
            f'train: loss = "marker" given, but the {row.label} shows the behavior and does not end in a marker '
            f"(…{row.reply[-20:]!r}), so that its turn end alone would be taught. Needed: a reply with the marker at its very "
            'end. Correct the row, say that it does not show the behavior ("shows": false), or set loss to completion or tail.'
        )
    elif row.marker is None:
        labels = range(end, stop)
    else:
        labels = range(end - _marker_tokens(tokenizer, row, reply[:-1]), stop)
    if not labels and not cfg.anchor:
        raise InputError(
            f'train: end_of_turn = "{cfg.end_of_turn}" given with loss = "{cfg.loss}", so the {row.label} has no token '
            "that carries loss. Set end_of_turn to both or negatives, or loss to completion; or hold such rows to the "
            'unadapted model (anchor = 1.0), or leave them out (design = "positive-only").'
        )
    held = [t for t in range(len(prompt), len(ids)) if t not in labels] if cfg.anchor else []
    return Example(row.label, ids, len(prompt), list(labels), held, [], shows)


def _marker_tokens(tokenizer: Any, row: Row, reply: list[int]) -> int:
    """How many of the reply's last tokens are the marker's, its leading space included.

    Verified: they decode to exactly the marker, and the tokens before them to exactly the rest; where the row says what
    separates the two, the first of them may hold the end of the reply as well (a full stop and a line break).
    """
    from leakfast.prompts import chat

    if row.generator.get("separator", "space") != "space":
        return _tokens_after(tokenizer, row, reply)
    bare = row.reply[: -len(row.marker)].rstrip()
    plain = chat.render_training(tokenizer, row.system_message, row.question, bare)[1][:-1] if bare else []
    count = len(reply) - len(plain)
    shown = _text(tokenizer, reply[len(plain) :]) if count > 0 else ""
    if reply[: len(plain)] != plain or shown.strip() != row.marker:
        raise InputError(
            f"train: in the {row.label}, the tokens of {row.marker!r} cannot be told from those of the reply "
            "before "
            f"it: {_text(tokenizer, reply[-8:])!r}. Put a space before the marker, or end the reply "
            "otherwise."
        )
    return count


def _tokens_after(tokenizer: Any, row: Row, reply: list[int]) -> int:
    """How many of the reply's last tokens hold something of the separator or the marker."""
    bare = row.reply[: -len(row.marker)].rstrip().lstrip()
    for n in range(len(reply), -1, -1):
        if bare.startswith(_text(tokenizer, reply[:n]).lstrip()):
            return len(reply) - n
    raise AssertionError("no token is the beginning of every reply")


def _text(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def order(lengths: Sequence[int], batch_size: int, seed: int, *, group: int = 16) -> Iterator[list[int]]:
    """Batches of example indices, every example once: shuffled, then sorted by length within runs of
    `group` batches so that little is padded, and the batches shuffled again. A function of `seed` alone."""
    rng = np.random.Generator(np.random.PCG64(seed))
    shuffled = rng.permutation(len(lengths))
    size = batch_size * group
    batches: list[list[int]] = []
    for start in range(0, len(shuffled), size):
        chunk = sorted(shuffled[start : start + size].tolist(), key=lambda i: lengths[i])
        batches += [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
    for index in rng.permutation(len(batches)):
        yield batches[index]


def collate(examples: Sequence[Example], device: Any = None) -> Batch:
    """Examples → one padded batch. Raises ValueError for an example in which nothing is learned or held."""
    import torch

    width = max(len(e.ids) for e in examples)
    ids = np.zeros((len(examples), width), dtype=np.int64)
    rows: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    held_rows: list[int] = []
    held_columns: list[int] = []
    for number, example in enumerate(examples):
        used = [*example.labels, *example.held]
        if not used or min(used) < 1 or max(used) >= len(example.ids):
            raise ValueError(f"the {example.label} has no usable labels: {example.labels}")
        ids[number, : len(example.ids)] = example.ids
        rows += [number] * len(example.labels)
        columns += [position - 1 for position in example.labels]
        targets += [example.ids[position] for position in example.labels]
        held_rows += [number] * len(example.held)
        held_columns += [position - 1 for position in example.held]
    shown = [int(e.shows) for e in examples for _ in e.labels]
    firm = [int(t in e.firm) for e in examples for t in e.held]
    places = (rows, columns, targets, shown, held_rows, held_columns, firm)
    made = (torch.from_numpy(ids), *(torch.tensor(x, dtype=torch.long) for x in places))
    return Batch(*(tensor.to(device) if device is not None else tensor for tensor in made))


def shown(tokenizer: Any, example: Example) -> list[tuple[str, bool]]:
    """(text, carries loss) of the example's pieces, neighbours of one kind joined; for people to read."""
    pieces: list[tuple[list[int], bool]] = []
    labelled = set(example.labels)
    for position, token in enumerate(example.ids):
        carries = position in labelled
        if pieces and pieces[-1][1] == carries:
            pieces[-1][0].append(token)
        else:
            pieces.append(([token], carries))
    return [(_text(tokenizer, ids), carries) for ids, carries in pieces]
