"""Inspect logs of a run: one .eval file for each behavior (and question set) and adapter, a sample for each persona and
question, an epoch for each completion drawn. Demands inspect_ai, whose classes make every sample and whose
`write_eval_log` writes the header. The samples are put into the archive here, one by one: `write_eval_log` takes them all
at once and compares each with every other, which takes hours for a run of 111,000 completions."""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from leakfast.progress import Progress
from leakfast.sinks.inspect_samples import Folder, folders, frames, row_sample
from leakfast.sinks.material import Material
from leakfast.sinks.places import Sent, Target
from leakfast.storage.disk import explained, hash_of
from leakfast.version import __version__

CONTENT = "leakfast_content"  # key of a log's metadata: hash of everything it was made of


def send(material: Material, asked: Target, progress: Progress) -> Sent:
    """Write the logs into the folder `asked.where`; one that is there and whole, made of the same shards, stays. Memory
    is bounded by one shard of completions. Raises StoreError for a folder that cannot be written."""
    out, found = Path(asked.where), folders(material)
    done = Sent("inspect", str(out))
    drawn = {folder.behavior for folder in found}
    done.left_out += [
        f"{behavior}: has no completions in this run, and a log is made of completions"
        for behavior in material.stats.behaviors()
        if behavior not in drawn
    ]
    total, ready = sum(folder.rows for folder in found), 0
    for folder in found:
        path, content = out / f"{folder.name}.eval", _content(material, folder)
        if folder.questions is None:
            done.left_out.append(f"{folder.name}: the wording of its questions is not in the run")
        if any(name not in material.people for name in folder.personas):
            done.left_out.append(f"{folder.name}: the wording of system prompts is not in the run")
        if _content_of(path) == content:
            done.kept.append(path.name)
        else:
            with explained(path):
                _write(material, folder, path, content)
            done.sent.append(path.name)
        ready += folder.rows
        progress(ready, total, folder.name)
    return done


def _content(material: Material, folder: Folder) -> str:
    """SHA-256 over the shards, judgements, study and version that a log follows from."""
    shards = material.run.manifest["shards"]
    hashes = [shards[path]["sha256"] for path in (*folder.shards, *folder.judgements)]
    return hash_of(hashes, material.study_hash, folder.name, __version__)


def _content_of(path: Path) -> str | None:
    """The same of a log that is there; None where there is none that can be read."""
    from inspect_ai.log import read_eval_log

    if not path.is_file():
        return None
    try:
        kept = (read_eval_log(str(path), header_only=True).eval.metadata or {}).get(CONTENT)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # not finished, or no log: made again
    return kept if isinstance(kept, str) else None


@dataclass
class _Scores:
    """What is added up while samples go by: per score (how many have it, their sum)."""

    samples: int = 0
    sums: dict[str, tuple[int, float]] = field(default_factory=dict)

    def add(self, sample: Any) -> None:
        self.samples += 1
        for name, score in (sample.scores or {}).items():
            n, total = self.sums.get(name, (0, 0.0))
            self.sums[name] = (n + 1, total + float(score.value))


def _write(material: Material, folder: Folder, path: Path, content: str) -> None:
    """The log whole or not at all: samples and their summaries, then the header, then its name."""
    from inspect_ai.log import EvalLog, EvalStats, write_eval_log

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp.eval")
    scores = _Scores()
    try:
        with (
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, allowZip64=True) as archive,
            tempfile.TemporaryFile() as summaries,
        ):
            for sample in _samples(material, folder):
                scores.add(sample)
                name = f"samples/{sample.id}_epoch_{sample.epoch}.json"
                archive.writestr(name, sample.model_dump_json(exclude_none=True))
                _append(summaries, sample.summary().model_dump_json(exclude_none=True))
            _finish(summaries)
            with archive.open("summaries.json", "w", force_zip64=True) as member:
                shutil.copyfileobj(summaries, member)
        times = sorted(material.written[p] for p in folder.shards if p in material.written)
        log = EvalLog(
            status="success",
            eval=_spec(material, folder, content, times),
            results=_results(scores),
            stats=EvalStats(started_at=times[0], completed_at=times[-1]) if times else EvalStats(),
        )
        write_eval_log(log, str(temporary), format="eval", header_only=True)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _samples(material: Material, folder: Folder) -> Iterator[Any]:
    for frame, judged in frames(material, folder):
        for row in frame.iter_rows(named=True):
            yield row_sample(material, folder, row, judged)


def _append(file: BinaryIO, item: str) -> None:
    file.write((b"," if file.tell() else b"[") + item.encode())


def _finish(file: BinaryIO) -> None:
    file.write(b"]" if file.tell() else b"[]")
    file.seek(0)


def _spec(material: Material, folder: Folder, content: str, times: list[str]) -> Any:
    from inspect_ai.log import EvalConfig, EvalDataset, EvalSpec
    from inspect_ai.model import GenerateConfig

    card, base = material.card(folder.adapter), material.base()
    health, reason = material.verdict(folder.behavior, folder.adapter)
    cfg = None
    if material.study is not None and folder.behavior in material.study.behaviors:
        cfg = material.study.behaviors[folder.behavior].eval
    drawn = {} if cfg is None else {"temperature": cfg.temperature, "top_p": cfg.top_p}
    if cfg is not None:
        drawn["max_tokens"] = cfg.drawn_tokens
    args = {"behavior": folder.behavior, "adapter": folder.adapter, "questions": folder.question_set}
    return EvalSpec(
        eval_id=content[:22],
        run_id=material.hash[:22],
        created=times[-1] if times else "1970-01-01T00:00:00+00:00",
        task=folder.task,
        task_id=hash_of(folder.task)[:22],
        task_args=args,
        task_args_passed=args,
        dataset=EvalDataset(
            name=folder.question_set, samples=len(folder.personas) * folder.asked, shuffled=False
        ),
        model=f"leakfast/{folder.adapter}",
        model_args={
            "base": base["model"],
            "base_fingerprint": base["fingerprint"],
            "adapter_hash": card.adapter_hash if card else None,
            "source": folder.source,
            "training_seed": card.seed if card else None,
        },
        model_generate_config=GenerateConfig(**drawn),
        config=EvalConfig(epochs=folder.samples),
        packages={"leakfast": __version__},
        metadata={
            CONTENT: content,
            "study": material.name,
            "study_sha256": material.study_hash,
            "run_sha256": material.hash,
            "health": health,
            "health_reason": reason,
            "study_unread": material.why,
        },
    )


def _results(scores: _Scores) -> Any:
    """Means over the samples that have a score; the tables' rates are per persona, and say how sure they are."""
    from inspect_ai.log import EvalMetric, EvalResults, EvalScore

    return EvalResults(
        total_samples=scores.samples,
        completed_samples=scores.samples,
        scores=[
            EvalScore(
                name=name,
                scorer=name,
                scored_samples=n,
                unscored_samples=scores.samples - n,
                metrics={"mean": EvalMetric(name="mean", value=total / n)},
            )
            for name, (n, total) in scores.sums.items()
        ],
    )
