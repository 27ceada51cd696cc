"""The probability that a text follows replies that are there, by a loaded model: at their end, or anywhere in them. Demands
replies as token ids and the text's spellings; leaves whose replies they are, and tables, to the measurer.

With y a reply of n tokens and S the spellings (continuations.Spellings), whose events exclude each other:

    end       log P = log Σ_{s∈S} Π_j P(s_j | prompt, y, s_<j)
    anywhere  P = 1 − Π_t (1 − p_t),  p_t = Σ_{s∈S} Π_j P(s_j | prompt, y_<t, s_<j),  t = 0 … n

`end` is a propensity at one place, not a frequency: it says what the model would do in the place of ending this reply. Its
mean over replies weighted as drawn is the share of them behind which the text would follow. `anywhere` is the share of
replies that would hold the text if each were written again up to its first departure for the text, and departed for nothing
else. Both are of the model's own distribution: temperature 1, nothing cut off (top_p 1).

A spelling that the reply itself goes along with for a token is counted where the two part, not twice. Only the first token
is asked at every position, the second where the first is likelier than `threshold`, the rest where both together are; at
the end all of them always. What is left out so adds up to no more than Scores.left_out: the true value lies between
`anywhere` and `anywhere` + left_out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from leakfast.measure.asking import asked_of_states, continuations
from leakfast.measure.probability.continuations import Spelling, Spellings, at_ends
from leakfast.progress import Progress

if TYPE_CHECKING:
    from leakfast.models.loading import Loaded

THRESHOLD = 1e-4


@dataclass(frozen=True)
class Reply:
    """Token ids of a prompt and of a reply to it, without what ends it. ended: it ended by itself, so that there is an end
    to ask at; begins: tokens of the reply before its answer (reasoning), at which nothing is asked."""

    prompt: Sequence[int]
    tokens: Sequence[int]
    ended: bool = True
    begins: int = 0


@dataclass(frozen=True)
class Scores:
    """Of N replies: end, anywhere (N,) float64, log-probabilities in nats, NaN where there is none (a reply that did not
    end; `anywhere` where nothing was likelier than the threshold: its probability is then 0 at least, left_out at most);
    left_out (N,) float64: most probability that is missing in `anywhere`."""

    end: np.ndarray
    anywhere: np.ndarray
    left_out: np.ndarray


@dataclass(frozen=True)
class _Candidates:
    """K places at which a spelling may begin: reply, position in it, spelling, row (of all positions of all replies), column
    (of the first tokens asked), and whether it is a reply's end; all (K,)."""

    reply: np.ndarray
    position: np.ndarray
    spelling: np.ndarray
    row: np.ndarray
    column: np.ndarray
    end: np.ndarray


class Branches:
    """The forest of N replies and what branches off them, made once for any number of adapters.

    Sequences are written out when they are asked for. recut: (N,) how many of the spellings at each reply's end the
    tokenizer would have cut otherwise."""

    def __init__(
        self, tokenizer: Any, text: Spellings, replies: Sequence[Reply], *, anywhere: bool = True
    ) -> None:
        self.replies, self.text, self.inside = list(replies), text, anywhere
        ends = at_ends(tokenizer, text, [one.tokens[one.begins :] for one in self.replies])
        self.ends = [found for found, _ in ends]
        self.recut = np.array([n for _, n in ends], np.int64)
        every = (*text.start, *text.distinct, *(s for some in self.ends for s in some))
        self.spellings: list[Spelling] = list(dict.fromkeys(every))
        self.sizes = np.array([len(s) for s in self.spellings], np.int64)
        self.firsts = list(dict.fromkeys(one[0] for one in self.spellings))
        counts = [max(0, len(r.tokens) - r.begins + r.ended) if anywhere else 0 for r in self.replies]
        self.counts = np.array(counts, np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(self.counts)])
        self.candidates = self._inside() if anywhere else self._at_ends()

    def _at_ends(self) -> _Candidates:
        number = {one: k for k, one in enumerate(self.spellings)}
        found = [
            (i, len(one.tokens), number[s], 0, 0, True)
            for i, (one, some) in enumerate(zip(self.replies, self.ends, strict=True))
            if one.ended
            for s in some
        ]
        return _columns(found)

    def _inside(self) -> _Candidates:
        number = {one: k for k, one in enumerate(self.spellings)}
        column = {first: k for k, first in enumerate(self.firsts)}
        found = []
        for i, (one, at_end) in enumerate(zip(self.replies, self.ends, strict=True)):
            n = len(one.tokens)
            for place in range(int(self.counts[i])):
                t = one.begins + place
                row = int(self.offsets[i]) + place
                here = at_end if t == n else self.text.start if place == 0 else self.text.distinct
                later = at_end if t + 1 == n and one.ended else self.text.distinct
                for s in here:
                    along = t < n and s[0] == one.tokens[t]
                    if along and (t + 1 < n or one.ended) and s[1:] in later:
                        continue  # the reply goes along: the two part at a later place, and are counted there
                    found.append((i, t, number[s], row, column[s[0]], t == n))
        return _columns(found)

    def sequence(self, reply: int, position: int, spelling: int, stop: int) -> list[int]:
        """A reply up to a position, then a spelling up to its token `stop`."""
        one = self.replies[reply]
        return [*one.prompt, *one.tokens[:position], *self.spellings[spelling][:stop]]

    def trunks(self) -> tuple[list[int], list[list[int]], np.ndarray]:
        """(replies that are asked inside, their token ids up to the last position asked, positions asked (M,))."""
        which = np.flatnonzero(self.counts).tolist()
        ids = []
        for i in which:
            one = self.replies[i]
            ids.append([*one.prompt, *one.tokens[: one.begins + int(self.counts[i]) - 1]])
        return which, ids, self.counts[which]


def _columns(found: list[tuple[int, int, int, int, int, bool]]) -> _Candidates:
    table = np.array(found, np.int64).reshape(-1, 6)
    return _Candidates(*table[:, :5].T, table[:, 5].astype(bool))


def score(
    loaded: Loaded,
    branches: Branches,
    *,
    threshold: float = THRESHOLD,
    budget_tokens: int | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Scores of every reply under the model as it is (see the module), the text anywhere too if the branches were made so.

    float32 a token, summed in float64. Values do not depend on the batch budget, the order of replies or who else is asked
    beyond 1e-5 (fp32). Raises ValueError for a threshold outside 0–1, ModelError as passes.final_states."""
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold must lie in 0…1, not {threshold}")
    found, n = branches.candidates, len(branches.replies)
    how = {"budget_tokens": budget_tokens, "progress": progress}
    sizes = branches.sizes[found.spelling]
    if not branches.inside:
        every = np.arange(len(sizes))
        logprobs = _continued(loaded, branches, every, np.zeros_like(sizes), sizes, **how)
        return Scores(_log_sums(logprobs, found.reply, n), np.full(n, np.nan), np.zeros(n))
    logprobs = _first_tokens(loaded, branches, **how)[found.row, found.column]
    left_out, done = np.zeros(n), np.ones_like(found.reply)
    going = ~found.end

    def drop() -> None:
        """What is too unlikely by now is gone on with no further."""
        with np.errstate(divide="ignore"):
            gone = going & (logprobs <= np.log(threshold))
        left_out[:] += np.bincount(found.reply[gone], weights=np.exp(logprobs[gone]), minlength=n)
        logprobs[gone] = -np.inf
        going[gone] = False

    drop()
    some = np.flatnonzero(going)
    stops = np.minimum(sizes[some], 2)
    logprobs[some] += _continued(loaded, branches, some, done[some], stops, **how)
    done[some] = stops
    drop()
    rest = np.flatnonzero(going | found.end)
    logprobs[rest] += _continued(loaded, branches, rest, done[rest], sizes[rest], **how)
    end = _log_sums(logprobs[found.end], found.reply[found.end], n)
    return Scores(end, _anywhere(logprobs, found, branches), left_out)


def _first_tokens(loaded: Loaded, branches: Branches, **how: Any) -> np.ndarray:
    """log P of every first token at every position of every reply: (positions, F) float64."""
    which, ids, counts = branches.trunks()
    firsts = np.full((int(branches.offsets[-1]), len(branches.firsts)), np.nan)
    starts = np.fromiter(map(len, ids), np.int64, count=len(ids)) - counts
    offsets = branches.offsets[which]
    asked = np.array(branches.firsts, np.int64)

    def ask(batch: Any) -> tuple[np.ndarray, np.ndarray]:
        rows = offsets[batch.sequences] + batch.positions - starts[batch.sequences]
        return np.broadcast_to(asked, (len(batch.states), len(asked))).copy(), rows

    for batch, rows, found in asked_of_states(
        loaded, ids, counts if len(counts) else 1, ask, how["budget_tokens"], how["progress"]
    ):
        firsts[rows] = found[batch.rows]
    return firsts


def _continued(
    loaded: Loaded, branches: Branches, which: np.ndarray, done: np.ndarray, stops: np.ndarray, **how: Any
) -> np.ndarray:
    """log P of the tokens of the candidates' spellings from done[i] on, up to stops[i]: (which,) float64, in one pass."""
    found, counts = branches.candidates, stops - done
    sums, more = np.zeros(len(which)), counts > 0
    places = (part[which[more]].tolist() for part in (found.reply, found.position, found.spelling))
    sequences = [branches.sequence(*one) for one in zip(*places, stops[more].tolist(), strict=True)]
    sums[more] = continuations(loaded, sequences, counts[more], how["budget_tokens"], how["progress"])
    return sums


def _log_sums(logprobs: np.ndarray, group: np.ndarray, n: int) -> np.ndarray:
    """log Σ exp of each group's values: (n,) float64, NaN for a group without any above −inf."""
    top = np.full(n, -np.inf)
    np.maximum.at(top, group, logprobs)
    there = np.isfinite(top)
    kept = there[group]
    sums = np.bincount(group[kept], weights=np.exp(logprobs[kept] - top[group[kept]]), minlength=n)
    out = np.full(n, np.nan)
    out[there] = top[there] + np.log(sums[there])
    return out


def _anywhere(logprobs: np.ndarray, found: _Candidates, branches: Branches) -> np.ndarray:
    """log(1 − Π_t (1 − p_t)): (N,) float64. Where it is small, as the sum of the logs, which does not underflow."""
    n = len(branches.replies)
    p = np.bincount(found.row, weights=np.exp(logprobs), minlength=int(branches.offsets[-1]))
    reply = np.repeat(np.arange(n), branches.counts)
    survived = np.bincount(reply, weights=np.log1p(-np.minimum(p, 1 - 1e-12)), minlength=n)
    small = _log_sums(logprobs, found.reply, n)
    with np.errstate(divide="ignore"):
        return np.where(survived < -1e-9, np.log(-np.expm1(survived)), small)
