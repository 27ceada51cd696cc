"""A run that is finished and unchanged is told so at once, before its model is loaded. Demands a locked run and its study;
where it cannot be known without the network which weights a model's name means by now, the stages are gone through."""

from __future__ import annotations

import logging
import os
import platform
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from leakfast.pipeline import shown
from leakfast.pipeline.steps import Outcome
from leakfast.stats import tables
from leakfast.storage import layout
from leakfast.storage.disk import file_hash, hash_of
from leakfast.version import source_hash

if TYPE_CHECKING:
    from leakfast.pipeline.stages import Chosen
    from leakfast.storage.run import Run
    from leakfast.study.config import Study

log = logging.getLogger("leakfast.run")

_BY = ("torch", "transformers", "tokenizers", "peft", "vllm", "numpy", "polars", "scipy")
_PLACES = ("LEAKFAST_RUNS", "LEAKFAST_CACHE", "LEAKFAST_DEBUG")  # which change nothing of what is made
_COMMIT = re.compile(r"[0-9a-f]{40}")


def once(study: Study, chosen: Chosen, run: Run, work: Callable[[], Outcome]) -> Outcome:
    """What `work` makes of a run; where an earlier call finished it, nothing lacked, and all that it follows from is as it was,
    what is there."""
    if is_finished(study, chosen, run):
        log.info("%s: everything is there, and nothing that it follows from has changed", run.path)
        stages = dict.fromkeys(run.manifest["stages"])
        return Outcome(run.path, tables.read(run), run.path / layout.REPORT, stages)
    outcome = work()
    if not outcome.stats.missing and (weights := _weights(study)) is not None:
        run.note_finished(f"{_asked_and_made(study, chosen, run)} {hash_of(weights)}")
    return outcome


def is_finished(study: Study, chosen: Chosen, run: Run) -> bool:
    """Whether there is nothing left to do: as of `once`."""
    if (finished := run.manifest.get("finished")) is None:
        return False
    asked, _, weights = finished.partition(" ")
    if asked != _asked_and_made(study, chosen, run):  # what costs little first: weights are read whole
        return False
    found = _weights(study)
    return found is not None and hash_of(found) == weights and shown.is_shown(run, study)


def _asked_and_made(study: Study, chosen: Chosen, run: Run) -> str:
    """Hash over all that a run follows from but the model's weights, and all that was measured."""
    set_by = {k: v for k, v in os.environ.items() if k.startswith("LEAKFAST_") and k not in _PLACES}
    here = [platform.node(), os.environ.get("CUDA_VISIBLE_DEVICES"), set_by]
    asked = [study.model_dump_json(), vars(chosen), shown.named_files(study)]
    return hash_of(source_hash(), shown.versions(*_BY), here, asked, shown.contents(run))


def _weights(study: Study) -> list[object] | None:
    """What tells a study's model from others: every file of its folder, or the commit of a hub model where that is settled; None
    where it is not known without a network."""
    from leakfast.models.loading import folder_fingerprint
    from leakfast.models.names import offline, place_of

    place, folder = place_of(study.model)
    if folder is not None:
        beside = (
            path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix != ".safetensors"
        )
        return [folder_fingerprint(folder), {path.name: file_hash(path) for path in beside}]
    from huggingface_hub import try_to_load_from_cache

    revision = study.revision or "main"
    if not offline() and not _COMMIT.fullmatch(revision):
        return None
    found = try_to_load_from_cache(place, "config.json", revision=revision)
    return [place, os.path.basename(os.path.dirname(found))] if isinstance(found, str) else None
