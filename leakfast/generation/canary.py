"""What is looked at before the first completion is drawn: an engine beside transformers, token ids, base, and every
adapter at its own scale. Demands an open engine and the same model by transformers. A check may be let pass by name."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from leakfast.errors import ModelError
from leakfast.generation.vllm.start import EngineDied
from leakfast.models.adapters import scaled

log = logging.getLogger("leakfast.generate")

CHECKS = ("default-system", "token-ids", "logits")  # names under which a failed check may be let pass
_NEAR_NATS = {"float32": 1e-2, "bfloat16": 0.35}  # log-probabilities of one token in two engines
_STEPS = 8  # greedy tokens after the first prompt
_REPLY = "I like tea. I do."  # short, so that its end, where a marker stands, is near
_LAST = 48  # tokens of the probe at which an adapter may show: a reply and what is before it
PLACES = 8  # of them, where it shows most, at which an engine is asked what comes next
TOP = 20  # likeliest next tokens that it is asked for, the most that vLLM gives by default
_SCALES = (2 / 3, 4 / 3)  # of an adapter that an engine must tell from its own
CLEAR = 8  # times an engine's own rounding that these must be apart to tell
_DECODED = 3  # tokens more that it decodes at each place


def check_default_system(tokenizer: Any, wanted: str | None, allow: Collection[str] = ()) -> None:
    """The template's default system prompt is what the study says; None as `wanted`: nothing is said."""
    if wanted is None:
        return
    from leakfast.prompts import chat

    found = chat.default_system(tokenizer)
    if found != wanted:
        fail(
            "default-system",
            f"the study says that the chat template's default system prompt is {wanted!r}, but this model's is "
            f"{found!r}. Needed: the model and template the study was written for. Correct template_system or model",
            allow,
        )


def check_engine(
    engine: Any,
    loaded: Any,
    adapters: Sequence[Path | None],
    personas: Sequence[Any],
    questions: Sequence[str],
    allow: Collection[str] = (),
    sources: Mapping[Path | None, str | None] | None = None,
    longest: int | None = None,
) -> None:
    """An engine, or each of several, beside transformers: its tokenizer renders the same ids; its greedy tokens after a
    prompt are as likely as the model says, under the base and each adapter (peft's), all in one batch; and each adapter
    changes it as it changes peft's model, at the same scale, where that shows most after its source's prompt.

    sources: names of the personas that the adapters were trained under, where known; longest: tokens that the engine
    takes. Raises ModelError naming the check, AdapterError for an adapter that does not fit or changes nothing; of
    several engines dead ones are skipped."""
    from leakfast import models
    from leakfast.prompts import chat

    looks = looks_of(engine, loaded, allow)
    system = [p.system for p in personas[:4]]
    for text in system:
        mine = list(chat.render(loaded.tokenizer, text, questions[0]))
        for look in looks:
            look.token_ids(mine, text, questions[0])
    ids = chat.render(loaded.tokenizer, system[0], questions[0])
    plain = log_probs(loaded, ids)
    for look in looks:
        look.greedy(ids, adapters)
        look.rounding(ids, plain)
    for number, adapter in enumerate(adapters):
        text = text_under(loaded, (sources or {}).get(adapter), personas, questions[0])[
            : longest and longest - 1
        ]
        with models.with_adapter(loaded, adapter) if adapter is not None else nullcontext(loaded) as current:
            for look in looks:
                look.logits(number, current, adapter)
            probe = _Probe(text, current) if adapter is not None else None
        if probe is not None:
            beside = adapters[(number + 1) % len(adapters)] if len(adapters) > 1 else None
            for look in looks:
                look.change(adapter, beside, probe)
    worst = max(look.worst for look in looks)
    log.info("canary: same token ids, greedy log-probabilities within %.1e nats of transformers'", worst)


class _Probe:
    """What transformers says comes next at the last tokens of a text: (T, V) nats under an adapter (`moved`), and under
    the same at other scales (`other`). places: of those tokens, where the scale shows most in the likeliest next ones."""

    def __init__(self, text: Sequence[int], current: Any) -> None:
        self.text, self.moved, self.other = text, log_probs(current, text), []
        for factor in _SCALES:
            with scaled(current.model, factor):
                self.other.append(log_probs(current, text))
        top = np.argpartition(-self.moved, min(TOP, self.moved.shape[1]) - 1, axis=1)[:, :TOP]
        shows = [(np.take_along_axis(other - self.moved, top, 1) ** 2).sum(1) for other in self.other]
        self.places = np.sort(np.argsort(np.minimum(*shows), kind="stable")[-PLACES:])


def looks_of(engine: Any, loaded: Any, allow: Collection[str]) -> list[_Look]:
    """Of an engine, or of each of several that stand as one."""
    if not hasattr(engine, "members"):
        return [_Look(engine, loaded, allow)]
    return [_Look(member, loaded, allow, engine) for member in list(engine.members)]


class _Look:
    """One engine, and what is found of it. parallel: what it is a member of, which does without one that dies."""

    def __init__(self, engine: Any, loaded: Any, allow: Collection[str], parallel: Any = None) -> None:
        self.engine, self.loaded, self.allow, self.parallel = engine, loaded, allow, parallel
        self.bound = _NEAR_NATS.get(loaded.dtype, _NEAR_NATS["bfloat16"])
        self.worst = 0.0
        self.own: float | None = None  # root mean square nats that its rounding makes
        self.answers: list[tuple[list[int], np.ndarray]] = []

    @property
    def lost(self) -> bool:
        return self.parallel is not None and self.engine not in self.parallel.members

    def ask(self, name: str, *asked: Any) -> Any:
        """What the engine answers; None where it is gone and others are there."""
        if self.lost:
            return None
        try:
            return getattr(self.engine, name)(*asked)
        except EngineDied as error:
            if self.parallel is None:
                raise
            self.parallel.lose(self.engine, error)
            if not self.parallel.members:
                raise
            return None

    def token_ids(self, mine: Sequence[int], system: str | None, question: str) -> None:
        other = self.ask("render", system, question)
        if other is not None and other != mine:
            fail(
                "token-ids",
                f"{self.loaded.name} has other token ids in vLLM ({len(other)} tokens) than in transformers "
                f"({len(mine)}) for the same prompt. Needed: one tokenizer. Use --backend transformers",
                self.allow,
            )

    def greedy(self, ids: Sequence[int], adapters: Sequence[Path | None]) -> None:
        self.ids, self.answers = list(ids), self.ask("probe", ids, adapters, _STEPS)

    def logits(self, number: int, current: Any, adapter: Path | None) -> None:
        """Its greedy tokens are as likely as transformers says, and as its likeliest ones: greedy, up to rounding."""
        if self.lost or self.answers is None:
            return
        tokens, got = self.answers[number]
        nats = log_probs(current, [*self.ids, *tokens[:-1]], len(tokens))
        wanted = nats[np.arange(len(tokens)), tokens]
        apart = float(max(np.abs(got - wanted).max(), (nats.max(axis=1) - wanted).max()))
        self.worst = max(self.worst, apart)
        if not apart <= self.bound:
            fail(
                "logits",
                f"under {adapter or 'no adapter'} vLLM's greedy tokens are {apart:.2g} nats from transformers' "
                f"(at most {self.bound:g}). Needed: the same model in both. Use --backend transformers",
                self.allow,
            )

    def rounding(self, ids: Sequence[int], plain: np.ndarray) -> None:
        """How far the unadapted engine is from transformers in the likeliest next tokens along a prompt. plain: (T, V)
        nats at its last tokens."""
        places = np.unique(np.linspace(0, len(plain) - 1, PLACES).astype(int))
        said = self.ask("next_tokens", up_to(ids, places, plain), [None], TOP)
        if said is None:
            return
        self.own = float(np.sqrt(np.mean(apart_of([steps[0] for steps in said[0]], places, plain) ** 2)))
        if not self.own <= self.bound:
            fail(
                "logits",
                f"vLLM's likeliest next tokens are {self.own:.2g} nats (root mean square) from transformers' (at most "
                f"{self.bound:g}). Needed: the same model in both. Use --backend transformers",
                self.allow,
            )

    def change(self, adapter: Path, beside: Path | None, probe: _Probe) -> None:
        """In the likeliest next tokens at the places where the adapter's scale shows most, the engine is less than half
        as far from peft's model as that is from itself with the adapter a third weaker or stronger. An engine that
        answers as the base, or under another adapter, is further off than any scale near its own."""
        # merged weights are worn one after the other: nothing stands beside
        merged = getattr(self.engine, "merge", None) is not None
        prompts = up_to(probe.text, probe.places, probe.moved)
        said = self.ask("next_tokens", prompts, [adapter] if merged else [adapter, beside], TOP, 1 + _DECODED)
        if said is None or self.own is None:
            return
        answers = [steps[0] for steps in said[0]]
        apart = float(np.linalg.norm(apart_of(answers, probe.places, probe.moved)))
        rows = [(place, token) for place, nats in zip(probe.places, answers, strict=True) for token in nats]
        at = tuple(np.array(rows).T)
        scale = min(float(np.linalg.norm((other - probe.moved)[at])) for other in probe.other)
        if scale <= CLEAR * self.own * len(rows) ** 0.5:
            log.warning(
                "canary: a third of %s moves log-probabilities by %.2g nats on the probe, too little to tell whether "
                "vLLM applies it (its own rounding is %.2g). Its rates tell: compare them with --backend transformers",
                adapter,
                scale / len(rows) ** 0.5,
                self.own,
            )
            return
        if not apart < scale / 2:
            fail(
                "logits",
                f"{adapter} changes vLLM otherwise than peft's model: {apart / scale:.2g} times as far from it as an "
                "adapter of two or four thirds of its scale is (less than half needed). Needed: an engine that applies "
                "the adapter as it is. Use --backend transformers",
                self.allow,
            )
        log.info(
            "canary: %s changes vLLM as it changes peft's model, to within %.1f %% of its scale",
            adapter.name,
            100 * apart / scale / 3,
        )
        if not merged:
            self.decoding(adapter, prompts, said[0])

    def decoding(
        self, adapter: Path, prompts: Sequence[list[int]], said: Sequence[Sequence[Mapping[int, float]]]
    ) -> None:
        """What the engine says token by token is what it says of the same tokens as a prompt, which was looked at: less
        than a quarter as far apart as the adapter's prompt and the base's. Where tokens are decoded an engine picks its
        kernels and graphs anew, and nearly all of a run is decoded."""
        longer, later = [], []
        for prompt, steps in zip(prompts, said, strict=True):
            drawn = [max(step, key=step.__getitem__) for step in steps]
            longer += [[*prompt, *drawn[:n]] for n in range(1, len(steps))]
            later += steps[1:]
        if not longer:
            return  # an engine of replies of one token
        both = self.ask("next_tokens", longer, [adapter, None], TOP)
        if both is None:
            return
        as_prompt, plain = ([steps[0] for steps in one] for one in both)
        apart, shows, n = 0.0, 0.0, 0
        for got, wanted, base in zip(later, as_prompt, plain, strict=True):
            for token in got.keys() & wanted.keys():
                apart += (got[token] - wanted[token]) ** 2
                # at least, where the base does not tell it
                shows += (wanted[token] - base.get(token, min(base.values()))) ** 2
                n += 1
        apart, shows = apart**0.5, shows**0.5
        if not n or shows <= CLEAR * (self.own or 0.0) * n**0.5:
            log.info(
                "canary: %s shows too little where vLLM decodes to tell whether it is applied there",
                adapter.name,
            )
            return
        if not apart < shows / 4:  # nor where either is NaN
            fail(
                "logits",
                f"under {adapter} vLLM decodes otherwise than it reads the same tokens in a prompt: {apart / shows:.2g} of "
                "what the adapter changes (less than a quarter needed). Needed: an engine that applies the adapter to "
                "every token. Use --backend transformers",
                self.allow,
            )


def up_to(ids: Sequence[int], places: np.ndarray, nats: np.ndarray) -> list[list[int]]:
    """The beginnings of `ids` that end at places of `nats`, which holds its last tokens."""
    return [list(ids[: len(ids) - len(nats) + place + 1]) for place in places]


def apart_of(answers: Sequence[Mapping[int, float]], places: np.ndarray, nats: np.ndarray) -> np.ndarray:
    """What an engine says of next tokens, minus what transformers says of the same, at places of `nats`."""
    return np.array(
        [
            got - nats[place, token]
            for place, said in zip(places, answers, strict=True)
            for token, got in said.items()
        ]
    )


def text_under(loaded: Any, source: str | None, personas: Sequence[Any], question: str) -> list[int]:
    """Ids of a prompt under the source's persona (the first one's where it is not asked) and a short reply."""
    from leakfast.prompts import chat

    system = next((p.system for p in personas if p.name == source), personas[0].system)
    reply = loaded.tokenizer.encode(_REPLY, add_special_tokens=False)
    return [*chat.render(loaded.tokenizer, system, question), *reply]


def log_probs(loaded: Any, ids: Sequence[int], last: int = _LAST) -> np.ndarray:
    """(T, V) float64 nats of the token after each of the `last` of `ids` (all, where there are fewer)."""
    import torch

    with torch.inference_mode():
        logits = loaded.model(input_ids=torch.tensor([list(ids)], device=loaded.device)).logits[0, -last:]
        return logits.float().log_softmax(-1).cpu().double().numpy()


def fail(check: str, what: str, allow: Collection[str]) -> None:
    if check in allow:
        log.warning("canary: %s; let pass by --allow %s", what, check)
        return
    raise ModelError(f"canary: {what}, or let it pass: --allow {check} (in a study: backend, allow).")
