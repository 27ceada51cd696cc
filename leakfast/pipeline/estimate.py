"""What a study will ask for, before anything is spent: prompts, exact prompt tokens, completions, expected
output tokens, seconds, disk and the judge's price. Demands the tokenizer alone; the model only where a calibration is asked for.
A number that nobody measured or stated is None, never a guess. Leaves trainings of adapters out: their time is not planned."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from leakfast.errors import InputError
from leakfast.pipeline import asks, estimate_shown
from leakfast.pipeline import estimate_probability as probable
from leakfast.pipeline import estimate_training as training
from leakfast.pipeline.estimate_stage import Stage
from leakfast.pipeline.matching import steps_of
from leakfast.progress import Progress
from leakfast.prompts.personas import load_personas, load_questions
from leakfast.storage import layout
from leakfast.storage.run import Run

if TYPE_CHECKING:
    import polars as pl

    from leakfast.measure.request import Asked
    from leakfast.study.config import EvalConfig, Study

BYTES_A_TOKEN = (
    4.5  # of English text, so that a reply's tokens become the bytes that the judge's price is reckoned by
)


@dataclass(frozen=True)
class Sample:
    """What a sample of completions of one behavior told: means over `n` completions, the rate of drawing them
    (output tokens a second, None where it was not timed) and where it is from, and the engine's start."""

    n: int
    tokens_each: float
    bytes_each: float
    tokens_per_s: float | None
    said: str
    rate_said: str = ""
    start_s: float | None = None


def plan(
    study: Study,
    *,
    tokens_each: float | None = None,
    tokens_per_s: float | None = None,
    train_tokens_per_s: float | None = None,
    calibrate: int = 0,
    backend: str | None = None,
    seed: int = 42,
    progress: Progress | None = None,
) -> list[Stage]:
    """Stages of `study` in order: centroids, trainings of all weights (estimate_training), then each behavior's measurement
    over its adapters and the base, then what is shown of them (estimate_shown). train_tokens_per_s: tokens a second of such a
    training, where it is known.

    Output tokens a completion: tokens_each if stated, else of `calibrate` completions drawn now from the
    unadapted model, else of what the study's run holds already, else at most max_new_tokens. Seconds: at
    tokens_per_s if stated, else, where a calibration is asked for, at what tune measured on this device for vLLM, or
    at the calibration's own rate, timed in one engine that is open and warm; else None. backend: who calibrates; None:
    the study's. Raises InputError for a sample below 0 and for a [vllm] table that cannot be, and what
    loading the tokenizer (or, for a calibration, the model and its engine) raises."""
    from leakfast import models
    from leakfast.generation import backends
    from leakfast.prompts.rendering import asked_by

    rates = (tokens_per_s, train_tokens_per_s)
    if calibrate < 0 or (tokens_each or 0) < 0 or any(rate is not None and rate <= 0 for rate in rates):
        raise InputError(
            "plan: --calibrate and --tokens-each must be 0 or more, --tokens-per-s and --train-tokens-per-s above 0."
        )

    backends.Drawing.of(study)  # refuses what the run would
    tokenizer = models.load_tokenizer(study.model, study.revision, asked_by(study))
    personas = load_personas(study.personas)
    samples: dict[str, Sample] = {}
    if calibrate and tokens_each is None:
        samples = _calibrated(study, personas, calibrate, backend, seed, progress)
    lengths = _lengths(tokenizer, personas, load_questions(study.centroids.questions).questions)
    stages = [Stage("centroids", 1, len(lengths), sum(lengths))]
    stages += training.planned(study, train_tokens_per_s)
    each = len(study.sources) * len(study.seeds)  # adapters of a behavior
    if study.centroids.adapters:
        n = each * len(asks.trained(study))
        stages.append(Stage("centroids of adapters", n, n * len(lengths), n * sum(lengths)))
    if study.asks_predictors:
        stages += _predictors(study, tokenizer, personas, tokens_per_s)
    for behavior, cfg in study.behaviors.items():
        targets = each * len(asks.measured_on(study, behavior)) + 1
        asked = asks.asked(study, behavior)
        first, by = probable.drawn(asked, targets)
        stage = _measurement(f"evaluate {behavior}", first, tokenizer, personas, by)
        if stage.completions:
            sample = samples.get(behavior) or _from_run(study, behavior)
            stage = _expected(stage, cfg.eval, sample, tokens_each, tokens_per_s)
        stages += [_judged(study, behavior, stage)] if by else []
        read = _probable(f"probability of {behavior}", asked[0], study, tokenizer, personas, targets)
        stages += [probable.beside_samples(one, asked[0], stage, len(personas), targets) for one in read]
        if behavior in study.trajectory.behaviors:
            stages += _on_the_way(study, behavior, stage, tokenizer, personas)
    return [*stages, estimate_shown.planned(study, Run(study.run_dir))]


def _predictors(study: Study, tokenizer: Any, personas: Sequence[Any], rate: float | None) -> list[Stage]:
    """The replies that are drawn, and each of them read under every persona: prompts counts those readings, prompt_tokens
    the tokens that go through the model where what they share is read once, with replies as long as they may be. Neither
    where no family that was asked needs it."""
    cfg, p = study.predictors, len(personas)
    lengths = _lengths(tokenizer, personas, load_questions(cfg.questions).questions)
    drawn = cfg.replies * len(lengths)
    tokens = drawn * cfg.reply_tokens
    said = "at most: reply_tokens"
    seconds, stated = (tokens / rate, "stated") if rate else (None, "")
    stages = [
        Stage("predictors: replies", 1, len(lengths), sum(lengths), drawn, tokens, said, seconds, stated),
        Stage("predictors: replies read by all", p, p * drawn, sum(lengths) + p * tokens),
    ]
    return stages if "output" in cfg.made else stages[:1] if "geometry" in cfg.made else []


def _probable(
    name: str, one: Asked, study: Study, tokenizer: Any, personas: Sequence[Any], targets: int
) -> list[Stage]:
    """What is read for probabilities, where they are asked; its seconds are not known."""
    if not probable.is_probable(one):
        return []
    return [Stage(name, targets, *probable.read(one, study.model, tokenizer, personas, targets))]


def _judged(study: Study, behavior: str, stage: Stage) -> Stage:
    """The stage with its judge's price: every completion judged once (equal ones are asked once only), each as long as
    expected at three bytes a token, and every reply as long as it may be. A model without a price raises InputError."""
    from leakfast.behaviors.registry import get
    from leakfast.judge import stage as judging
    from leakfast.judge.prompt import estimated_tokens

    cfg = judging.settings(study, behavior)
    if get(behavior).measured_by != "judge" or cfg.judge is None or stage.output_tokens is None:
        return stage
    spec = judging.parse_spec(cfg.judge)
    questions = load_questions(study.behaviors[behavior].eval.questions).questions
    overhead = sum(estimated_tokens(question, "") for question in questions) / len(questions)
    told = round(stage.completions * overhead) + round(stage.output_tokens * BYTES_A_TOKEN / 3)
    usd = judging.charged(spec, cfg.prices, cfg.free).usd(
        told, stage.completions * judging.asking(cfg).max_tokens, in_batch=spec.way == "batch"
    )
    return replace(stage, judge_usd=usd)


def _lengths(tokenizer: Any, personas: Sequence[Any], questions: Sequence[str]) -> list[int]:
    from leakfast.prompts import chat

    return [len(ids) for ids in chat.render_grid(tokenizer, personas, questions)]


def _measurement(
    name: str, asked: Sequence[Asked], tokenizer: Any, personas: Sequence[Any], targets: int
) -> Stage:
    """Prompts and tokens of one behavior, each prompt once a target."""
    lengths, drawn = [], 0
    for one in asked:
        texts = one.texts
        if one.by_choices:
            letters = one.config.scoring == "letters"
            texts = [item.letters_prompt if letters else item.question for item in one.questions]
        lengths += _lengths(tokenizer, personas, texts)
        drawn += 0 if one.by_choices else len(texts) * len(personas) * one.config.samples
    return Stage(name, targets, targets * len(lengths), targets * sum(lengths), completions=targets * drawn)


def _on_the_way(
    study: Study, behavior: str, whole: Stage, tokenizer: Any, personas: Sequence[Any]
) -> list[Stage]:
    """The behavior at the points of training that the study follows, each reply as long as in the whole measurement."""
    people, one, targets = probable.on_the_way(study, behavior, personas)
    name = f"{behavior} through training"
    read = _probable(f"probability of {name}", one, study, tokenizer, people, targets)
    if not one.by_choices and one.config.measure == "probability":
        return read
    stage = _measurement(name, [one], tokenizer, people, targets)
    if not whole.completions:
        return [stage, *read]
    to_match = [_like(one, whole) for one in _to_match(study, behavior, tokenizer, personas)]
    return [*to_match, _judged(study, behavior, _like(stage, whole)), *read]


def _to_match(study: Study, behavior: str, tokenizer: Any, personas: Sequence[Any]) -> list[Stage]:
    """The sources alone, each under its own adapters: at all points of training, and anew at the chosen ones."""
    if study.trajectory.match is None:
        return []
    people, one = asks.asked_to_match(study, behavior, personas)
    of = asks.followed(study)
    numbers = (sum(len(asks.points(study, name)) for name in of), len(of))
    stages = []
    for title, points in zip(steps_of(behavior), numbers, strict=True):
        stage = _measurement(title, [one], tokenizer, people, points * len(study.seeds))
        stages.append(replace(stage, targets=stage.targets * len(people)))
    return stages


def _like(stage: Stage, whole: Stage) -> Stage:
    """The stage with what is expected of its completions, each as long as in the whole measurement."""
    share = stage.completions / whole.completions
    return replace(
        stage,
        output_tokens=None if whole.output_tokens is None else round(whole.output_tokens * share),
        output_from=whole.output_from,
        seconds=None if whole.seconds is None else whole.seconds * share,
        rate_from=whole.rate_from,
        start_s=whole.start_s,
        disk_bytes=None if whole.disk_bytes is None else round(whole.disk_bytes * share),
    )


def _expected(
    stage: Stage,
    cfg: EvalConfig,
    sample: Sample | None,
    tokens_each: float | None,
    tokens_per_s: float | None,
) -> Stage:
    if tokens_each is not None:
        each, said = tokens_each, "stated"
    elif sample is not None:
        each, said = sample.tokens_each, sample.said
    else:
        each, said = float(cfg.max_new_tokens), "at most: max_new_tokens"
    tokens = round(each * stage.completions)
    rate = tokens_per_s or (sample.tokens_per_s if sample else None)
    rate_said = "stated" if tokens_per_s else sample.rate_said if sample else ""
    disk = round(stage.completions * sample.bytes_each) if sample else None
    return replace(
        stage,
        output_tokens=tokens,
        output_from=said,
        seconds=tokens / rate if rate else None,
        rate_from=rate_said,
        start_s=sample.start_s if sample else None,
        disk_bytes=disk,
    )


def _from_run(study: Study, behavior: str) -> Sample | None:
    """Means of what the study's run holds of this behavior; None without completions."""
    import polars as pl

    run = Run(study.run_dir)
    if not (run.path / layout.MANIFEST).is_file():
        return None
    files = run.shards(layout.completions(behavior))
    if not files:
        return None
    entries = run.manifest["shards"]
    counted = pl.concat([pl.read_parquet(run.path / f, columns=["n_tokens"]) for f in files])["n_tokens"]
    size = sum(entries[f]["bytes"] for f in files)
    return Sample(
        len(counted),
        float(counted.mean()),
        size / len(counted),
        None,
        f"{len(counted):,} completions in {run.path}",
    )


def _calibrated(
    study: Study, personas: Sequence[Any], n: int, backend: str | None, seed: int, progress: Progress | None
) -> dict[str, Sample]:
    """Behavior → n completions of the unadapted model, of prompts spread evenly over personas and questions. One engine
    draws them all; each behavior's are timed from the first request to the last completion, after a tenth of them to
    warm up."""
    from leakfast import models
    from leakfast.behaviors.registry import get
    from leakfast.generation import backends
    from leakfast.generation import transformers as local
    from leakfast.generation.contract import Sampling, requests_for
    from leakfast.generation.frames import to_frame
    from leakfast.prompts import chat
    from leakfast.prompts.rendering import asked_by

    cfgs = {name: cfg.eval for name, cfg in study.behaviors.items() if get(name).by_completions}
    if not cfgs:
        return {}
    loaded = models.load(study.model, dtype=study.dtype, revision=study.revision, rendering=asked_by(study))
    samplings = {n: Sampling(cfg.temperature, cfg.top_p, cfg.drawn_tokens) for n, cfg in cfgs.items()}
    how = backends.Drawing.of(study, backend=backend)
    backend = backends.settle(loaded, how, list(samplings.values()), adapters=True)  # as the run will
    # one engine, and of the unadapted model
    options = replace(how.options, lora="live", data_parallel=1)
    chosen = {}
    for name, cfg in cfgs.items():
        prompts = chat.render_prompts(loaded.tokenizer, personas, load_questions(cfg.questions).questions)
        few = min(n, len(prompts))
        chosen[name] = [prompts[i * len(prompts) // few] for i in range(few)]
        requests = requests_for(chosen[name], 1, seed, "calibration")
        local.check_lengths(loaded.model, requests, cfg.drawn_tokens)
    longest = max(len(p.ids) + cfgs[name].drawn_tokens for name, few in chosen.items() for p in few)
    seats = max(cfg.batch_completions for cfg in cfgs.values())
    stated = any("batch_completions" in cfg.model_fields_set for cfg in cfgs.values())
    total, finished = sum(map(len, chosen.values())), 0
    samples = {}
    began = time.perf_counter()
    with backends.opened(
        loaded, [], backend, batch_completions=seats, stated=stated, longest=longest, options=options
    ) as engine:
        start_s = time.perf_counter() - began
        tuned = _rate(loaded, backend, seats if stated else None)
        for name, prompts in chosen.items():
            requests = requests_for(prompts, 1, seed, "calibration")
            done, took = _timed(engine, requests, samplings[name])
            longest = cfgs[name].max_new_tokens
            about = {"behavior": "", "adapter": "base", "source": None, "answer_tokens": longest}
            frame = to_frame(loaded, prompts, requests, done, **about)
            said = f"timed now with {backend}, {len(prompts)} completions in a warm engine"
            rate, said = tuned if tuned[0] is not None else (float(frame["n_tokens"].sum()) / took, said)
            samples[name] = _sample(frame, rate, said, start_s)
            finished += len(prompts)
            if progress is not None:
                progress(finished, total, name)
    return samples


def _timed(engine: Any, requests: Sequence[Any], sampling: Any) -> tuple[list[Any], float]:
    """Completions of the requests, and the seconds they took in a warm engine."""
    from leakfast.generation.contract import Work

    for _ in engine.stream([Work(None, None, requests[: max(1, len(requests) // 10)])], sampling):
        pass
    began = time.perf_counter()
    done = [c for _, some in engine.stream([Work(None, None, requests)], sampling) for c in some]
    return done, time.perf_counter() - began


def _sample(frame: pl.DataFrame, rate: float, said: str, start_s: float) -> Sample:
    from leakfast.storage.disk import parquet_bytes

    tokens, n = frame["n_tokens"], frame.height
    error = float(tokens.std() or 0.0) / n**0.5 if n > 1 else float("nan")
    return Sample(
        n,
        float(tokens.mean()),
        len(parquet_bytes(frame)) / n,
        rate,
        f"{n} completions drawn now, {tokens.mean():.1f} ± {error:.1f} (standard error) tokens each",
        f"{rate:,.0f} output tokens/s, {said}",
        start_s,
    )


def _rate(loaded: Any, backend: str, seats: int | None) -> tuple[float | None, str]:
    """What tune measured for vLLM on this device, and in words; None for the other backend, or where it did not. A
    sample does not fill an engine's seats as a run does."""
    if backend != "vllm":
        return None, ""
    from leakfast.generation import vllm

    device = vllm.device_name()
    rate = vllm.rate_for(device, loaded.fingerprint, loaded.dtype, seats)
    return rate, f"measured on this {device} by leakfast tune"
