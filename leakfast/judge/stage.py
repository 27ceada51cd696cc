"""Judging a run: its completions of a behavior, by one judge, to judgements/<behavior>/<adapter>/<judge>.parquet.
What was paid for before is kept; the same command again is the resume. Demands a run with completions and the
questions they answer."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from leakfast.errors import InputError
from leakfast.judge import batches, chats, lexicon
from leakfast.judge.contract import Reply, Request
from leakfast.judge.journal import Cache
from leakfast.judge.keys import scrub
from leakfast.judge.prices import FREE, Budget, Price, known_of, price_of
from leakfast.judge.prompt import estimated_tokens, read
from leakfast.judge.sdk import Asking
from leakfast.judge.spec import Spec, parse_spec
from leakfast.judge.work import Work, gather, table
from leakfast.progress import Progress
from leakfast.prompts.reasoning import answer
from leakfast.storage import layout

if TYPE_CHECKING:
    from leakfast.prompts.questions import QuestionSet
    from leakfast.storage.run import Run
    from leakfast.study.config import JudgeConfig, Study

log = logging.getLogger("leakfast.judge")

_ASKING = Asking()
REPLY_TOKENS = _ASKING.max_tokens
THINKING_TOKENS = 2_000  # counted as output: a reply cut before it begins would be paid for and give no score


def settings(study: Study, behavior: str) -> JudgeConfig:
    """The judge's settings in a study; its judge is the organism's lexicon where the study's model is the
    organism and no other is named."""
    return default_judge(study.behaviors[behavior].judge, study.model)


def default_judge(cfg: JudgeConfig, model: str) -> JudgeConfig:
    """The settings, with the organism's lexicon as the judge of the organism where no other is named."""
    if cfg.judge is None and model == lexicon.NAME:
        return cfg.model_copy(update={"judge": lexicon.NAME})
    return cfg


def asking(cfg: JudgeConfig) -> Asking:
    """How the settings say a service is asked. Where they give no temperature, 0 is sent where the judge's API is known
    to take one (prices.toml; a server of one's own at base_url; a local model) and none elsewhere; where they give no
    max_tokens, REPLY_TOKENS, or THINKING_TOKENS for a judge that thinks first. Raises InputError for a temperature that
    the judge's API is known not to take."""
    spec = parse_spec(cfg.judge) if cfg.judge else None
    known = known_of(spec.model, cfg.prices) if spec and spec.way in ("chat", "batch") else None
    takes = known.temperature if known else None
    if takes is None and spec is not None:
        takes = True if spec.way == "local" or (spec.service == "openai" and cfg.base_url) else None
    temperature = cfg.temperature if cfg.send_temperature else None
    if temperature is not None and takes is False:
        raise InputError(
            f"judge: temperature {temperature:g} given, but {spec.name} takes none: the service would refuse the "
            "request. Leave temperature out."
        )
    if temperature is None and cfg.send_temperature and takes:
        temperature = 0.0
    max_tokens = cfg.max_tokens or (THINKING_TOKENS if known and known.thinks else REPLY_TOKENS)
    return Asking(cfg.base_url, temperature, max_tokens, cfg.timeout_s, cfg.concurrency, cfg.poll_s)


def check(cfg: JudgeConfig) -> None:
    """Raises InputError for settings whose judge is none, has no price, or lacks its key or its library."""
    assert cfg.judge is not None
    spec = parse_spec(cfg.judge)
    if spec.way in ("chat", "batch"):
        charged(spec, cfg.prices, cfg.free)
        _client(spec, asking(cfg))


def charged(spec: Spec, prices: Any, free: bool) -> Price:
    """What the judge costs a token; InputError for a model without a price."""
    return FREE if free or spec.way in ("lexicon", "local") else price_of(spec.model, prices)


@dataclass(frozen=True)
class Plan:
    """What judging will ask for. requests: different (question, completion) pairs; of these `kept` were answered
    before, `in_flight` are in a batch that was sent, `to_send` are left; input tokens are estimated, output tokens
    and cost are at most so many."""

    judge: str
    behavior: str
    completions: int
    empty: int
    requests: int
    kept: int
    in_flight: int
    to_send: int = 0
    input_tokens: int = 0
    output_tokens_at_most: int = 0
    usd_at_most: float = 0.0
    spent_usd: float = 0.0


@dataclass(frozen=True)
class Judged:
    """What judging did. statuses: adapter → status → completions; stopped: why some were not asked, if so."""

    plan: Plan
    files: tuple[str, ...]
    statuses: dict[str, dict[str, int]]
    spent_usd: float
    stopped: str | None = None

    def coverage(self, adapter: str) -> float:
        """Share of the adapter's completions that have scores."""
        counted = self.statuses[adapter]
        return counted.get("ok", 0) / max(1, sum(counted.values()))


@dataclass(frozen=True)
class Terms:
    """What is judged and what it may cost. series: completions drawn on the way through training instead, to
    series/judgements/; prices: a TOML file beside the shipped one; free: the service costs nothing (else the model needs
    a price); max_cost: USD in all, over every call for this judge in this run, and what does not fit is not sent; again:
    ask anew where a kept reply gave no score."""

    series: bool = False
    prices: Any = None
    free: bool = False
    max_cost: float | None = None
    again: bool = False


def judge(
    run: Run,
    behavior: str,
    spec: Spec,
    questions: QuestionSet | Sequence[str],
    *,
    asking: Asking = _ASKING,
    dry_run: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> Plan | Judged:
    """Judge every completion of `behavior` in the run, under every adapter and the base.

    Equal completions of one question are asked once. settings: fields of `Terms`. dry_run: send nothing and return the
    Plan. Raises InputError (nothing to judge, no price, no key), JudgeError (the service), StoreError."""
    terms = Terms(**settings)
    run.open()
    with contextlib.nullcontext() if dry_run else run.lock():  # so that two processes never pay for the same
        work = gather(run, behavior, spec, questions, series=terms.series)
        price = charged(spec, terms.prices, terms.free)
        cache = Cache(run.path / layout.JUDGE / f"{spec.file}.jsonl")
        ledger = batches.Ledger(run.path / layout.JUDGE / f"{spec.file}-batches.jsonl")
        if cache.damaged:
            log.warning("%s: %d damaged lines; those replies are asked for again", cache.path, cache.damaged)
        _from_before(work, cache, ledger, terms.again)
        plan, to_send = _plan(work, behavior, spec, price, asking, cache)
        if dry_run:
            return plan
        stopped = None
        if spec.way != "lexicon":
            open_usd = sum(intent.usd for intent in ledger.open.values())
            budget = Budget(
                price, terms.max_cost, spec.way == "batch", asking.max_tokens, cache.spent_usd, open_usd
            )
            stopped = _ask(spec, asking, work, to_send, cache, ledger, budget, progress)
        files, statuses = [], {}
        for adapter, frame in work.frames.items():
            made = table(work, frame, spec)
            relpath = f"{layout.judgements(behavior, adapter, series=terms.series)}/{spec.file}.parquet"
            run.add_shard(relpath, made, judge=spec.name, prompt=spec.prompt_version)
            files.append(relpath)
            statuses[adapter] = dict(Counter(made["status"].to_list()).most_common())
        run.log(
            "judge",
            **asdict(plan),
            statuses=statuses,
            stopped=stopped,
            service=scrub(asking.base_url or ""),
            max_tokens=asking.max_tokens,
            temperature=asking.temperature,
        )
    return Judged(plan, tuple(files), statuses, cache.spent_usd, stopped)


def _from_before(work: Work, cache: Cache, ledger: batches.Ledger, again: bool) -> None:
    """Replies that are there, and requests that are in a batch already."""
    flying = batches.in_flight(ledger)
    for request in work.requests:
        reply = cache.replies.get(request.key)
        if reply is not None and not (again and read(reply).status != "ok"):
            work.replies[request.key] = reply
        elif request.key in flying:
            work.pending.add(request.key)


def _plan(
    work: Work, behavior: str, spec: Spec, price: Price, asking: Asking, cache: Cache
) -> tuple[Plan, list[tuple[Request, int]]]:
    texts = [text or "" for frame in work.frames.values() for text in frame["text"]]
    plan = Plan(
        judge=spec.name,
        behavior=behavior,
        completions=len(texts),
        empty=sum(not (answer(text) or "").strip() for text in texts),
        requests=len(work.requests),
        kept=len(work.replies),
        in_flight=len(work.pending),
        spent_usd=cache.spent_usd,
    )
    if spec.way == "lexicon":
        return plan, []
    left = [
        (request, estimated_tokens(request.question, request.completion))
        for request in work.requests
        if request.key not in work.replies
    ]
    to_send = [(request, n) for request, n in left if request.key not in work.pending]
    tokens, out = sum(n for _, n in to_send), len(to_send) * asking.max_tokens
    usd = price.usd(tokens, out, in_batch=spec.way == "batch")
    plan = replace(
        plan, to_send=len(to_send), input_tokens=tokens, output_tokens_at_most=out, usd_at_most=usd
    )
    if spec.way == "batch":  # a batch that turns out never to have arrived is sent again
        to_send += [(request, n) for request, n in left if request.key in work.pending]
    return plan, to_send


def _ask(
    spec: Spec,
    asking: Asking,
    work: Work,
    to_send: list[tuple[Request, int]],
    cache: Cache,
    ledger: batches.Ledger,
    budget: Budget,
    progress: Progress | None,
) -> str | None:
    """Have every request answered as far as that goes; why it stopped short, if it did."""

    estimated = {request.key: n for request, n in to_send}

    def keep(replies: list[Reply]) -> None:
        priced = [(reply, _usd(reply, budget, estimated.get(reply.key, 0))) for reply in replies]
        cache.keep(priced)
        budget.settle(0.0, sum(usd for reply, usd in priced if reply.is_paid))
        work.replies.update({reply.key: reply for reply in replies})

    replies: dict[str, Reply] = {}
    short = False
    client = _client(spec, asking) if to_send or (spec.way == "batch" and ledger.open) else None
    if client is None:
        pass
    elif spec.way == "batch":
        replies, short = batches.carry_out(client, to_send, ledger, budget, keep, asking.poll_s, progress)
    elif spec.way == "chat":
        replies, short = chats.carry_out(client, to_send, budget, keep, asking.concurrency, progress)
    else:
        for came in client.ask_all([request for request, _ in to_send]):
            keep(came)
            if progress is not None:
                progress(len(work.replies), len(work.requests), "replies")
    work.replies.update(replies)
    work.pending = batches.in_flight(ledger) - set(work.replies)
    if work.pending and spec.way != "batch":
        return "some are in a batch: collect it with the judge that sent it"
    return "--max-cost" if short else None


def _client(spec: Spec, asking: Asking) -> Any:
    if spec.service == "local":
        from leakfast.judge.local import Local

        return Local(spec.model, asking)
    if spec.service == "anthropic":
        from leakfast.judge import anthropic as module
    else:
        from leakfast.judge import openai as module
    return (module.Batch if spec.way == "batch" else module.Chat)(spec.model, asking)


def _usd(reply: Reply, budget: Budget, estimated: int) -> float:
    """What a reply cost by the service's own count; where it told none, by our estimate of the prompt and the
    longest reply."""
    if not reply.is_paid:
        return 0.0
    output = budget.max_tokens if reply.output_tokens is None else reply.output_tokens
    prompt = estimated if reply.input_tokens is None else reply.input_tokens
    return budget.price.usd(prompt, output, in_batch=budget.in_batch)
