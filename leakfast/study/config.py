"""The study file: every setting of a run as a checked, frozen object, and the seeds drawn from it.
An unknown key is an error that names the key meant and the line. Leaves the work to the stages."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
)

from leakfast.errors import InputError
from leakfast.storage.documents import Document, find_shipped, parse_toml, read_document
from leakfast.storage.validation import explain
from leakfast.study.behavior import (
    BehaviorConfig,
    Count,
    DataConfig,
    EvalConfig,
    JudgeConfig,
    Seed,
    Share,
    TrainConfig,
    behavior_config,
    with_settings,
)
from leakfast.study.predictors import Layers, PredictorConfig
from leakfast.study.steering import SteeringConfig, TrainSteeringConfig, in_order

__all__ = [
    "BehaviorConfig",
    "CentroidConfig",
    "DataConfig",
    "EvalConfig",
    "JudgeConfig",
    "PredictorConfig",
    "SteeringConfig",
    "Study",
    "TrainConfig",
    "TrainSteeringConfig",
    "TrajectoryConfig",
    "behavior_config",
    "load_study",
    "parse_study",
    "settings_in",
]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class CentroidConfig(_Table):
    """Which prompts the centroids average over, and where.

    questions: the set whose prompts are averaged over.
    layers: decoder blocks, counted from 0.
    adapters: whether they are computed under every trained adapter too, so that the tables tell what training did to
    the geometry."""

    questions: str = "eval"
    layers: Layers = "all"
    adapters: bool = False


class TrajectoryConfig(_Table):
    """What is measured on the way through training, for all sources: everybody at every point, or (match) the sources at every
    point and everybody where they show the behavior as strongly as wanted.

    behaviors: those of the study that are measured (empty: no trajectory).
    of: those whose training is followed (none: all that are trained). shares: when, as shares of that training, 0–1.
    personas: who is asked beside the sources.
    samples, n_items: fewer than the behaviors' own, where that is enough (None: as they say).
    measure: completions, probability or both (None: as the behaviors say); by probability every 5 % of training costs little.
    match: a source's rate, 0–1, at which trainings are compared, for behaviors that a detector reads (None: no such). Each
    adapter is then measured under its own source's prompt alone at all `shares` and at the end, and `personas` are asked
    before training, at the end, and at the one point whose source rate is nearest to match, the later of equals. A rate that
    was picked for being near lies nearer than the point really is; so the source answers anew there, and that rate,
    of replies that chose nothing, is the one that the table `mitigations` reports and calls matched or not. Means (`average`)
    may stand in `of`, and are followed without it: their one point is their end.
    match_samples: a source's replies to each question at a point, to choose by, and as many again at the chosen one."""

    behaviors: list[str] = []
    of: list[str] = []
    shares: Annotated[list[Share], Field(min_length=1)] = [0.0, 0.25, 0.5, 0.75, 1.0]
    personas: str | list[str] = "originals"
    samples: Count | None = None
    n_items: Count | None = 100
    measure: Literal["completions", "probability", "both"] | None = None
    match: Share | None = None
    match_samples: Count = 20


class VllmConfig(_Table):
    """How vLLM runs where it draws: as `leakfast eval`'s flags of these names.

    lora: live (adapters beside each other in one batch) or merged (each swapped into the weights; one GPU).
    invariant: the same text whatever else is in the batch (GPUs).
    data_parallel: engines, one a GPU. tensor_parallel: GPUs an engine."""

    lora: Literal["live", "merged"] = "live"
    invariant: bool = False
    data_parallel: Count = 1
    tensor_parallel: Count = 1


class Study(_Table):
    """What is run, on which model, and by whom.

    name: what the run's folder is called. runs: what that folder lies in: a folder, or s3://bucket/prefix;
    LEAKFAST_RUNS goes first. model: organism, a hub id, or a folder. revision: commit or branch of a hub model.
    template_system: what the model's chat template is to say where there is no system message (checked before
    anything is drawn; None: nothing is checked).
    template_kwargs: arguments of the chat template, such as enable_thinking = false, wherever a prompt is rendered.
    system_role: user puts a persona's text into the user turn, for models whose template has no system role.
    reasoning: closed: replies stand where the template puts its own, after an empty reasoning block or in the final
    channel; open: completions begin at the generation prompt, so that the model reasons; answers alone are read.
    dtype: of the model's weights. stream: whether eval and predictors leave the weights on disk and read a block at a
    time; auto: where they do not fit in memory. run trains, and loads the model whole.
    backend: who draws completions; auto takes vLLM where it is installed and there is a GPU.
    personas: all, names, or a file: who is measured. sources: those of `personas` that are trained.
    seeds: of training and draws; every behavior is trained into every source once a seed.
    allow: checks of model and engine that may fail."""

    name: str
    runs: str = "runs"
    model: str = "Qwen/Qwen2.5-7B-Instruct"
    revision: str | None = None
    template_system: str | None = None
    template_kwargs: dict[str, bool | int | float | str] = {}
    system_role: Literal["system", "user"] = "system"
    reasoning: Literal["closed", "open"] = "closed"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    stream: Literal["auto", "on", "off"] = "auto"
    backend: Literal["auto", "vllm", "transformers"] = "auto"
    personas: str | list[str] = "all"
    sources: Annotated[list[str], Field(min_length=1)]
    seeds: Annotated[list[Seed], Field(min_length=1)] = [42]
    allow: list[Literal["default-system", "token-ids", "logits"]] = []
    vllm: VllmConfig = VllmConfig()
    centroids: CentroidConfig = CentroidConfig()
    predictors: PredictorConfig = PredictorConfig()
    trajectory: TrajectoryConfig = TrajectoryConfig()
    steering: Annotated[list[SteeringConfig], AfterValidator(in_order)] = []
    behaviors: Annotated[dict[str, BehaviorConfig], Field(min_length=1)]

    _raw_text: str = PrivateAttr(default="")

    @field_validator("behaviors", mode="before")
    @classmethod
    def _behaviors_have_settings(cls, tables: Any) -> Any:
        if not isinstance(tables, dict):
            return tables
        return {
            name: given if isinstance(given, BehaviorConfig) else with_settings(name, given)
            for name, given in tables.items()
        }

    @field_validator("name")
    @classmethod
    def _name_is_a_folder(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError("the name becomes a folder: letters, digits, dots, dashes, underscores only")
        return name

    @field_validator("sources", "seeds")
    @classmethod
    def _each_once(cls, values: list[Any]) -> list[Any]:
        twins = sorted({str(v) for v in values if values.count(v) > 1})
        if twins:
            raise ValueError(f"{', '.join(twins)} stands twice; name each once")
        return values

    @property
    def asks_predictors(self) -> bool:
        """Whether the file has a table [predictors], empty or not."""
        return "predictors" in self.model_fields_set

    @property
    def raw_text(self) -> str:
        """The file as written, for the run directory."""
        return self._raw_text

    @property
    def run_dir(self) -> Path:
        """Where the run goes: `$LEAKFAST_RUNS/<name>`, else `<runs>/<name>`. A Path makes one slash of the two of s3://;
        `leakfast.storage.objects.address_of` has the address."""
        return Path(os.environ.get("LEAKFAST_RUNS") or self.runs) / self.name


def load_study(path: str | Path) -> Study:
    """The study of a TOML file; a shipped study is found by its name alone (`demo.toml`).

    Raises InputError naming file, line, what is wrong and the nearest valid word: unknown keys,
    values out of range, personas, question sets or behaviors that do not exist."""
    return _check(read_document(find_shipped(path)))


def parse_study(text: str, path: str | Path = "study.toml") -> Study:
    """As `load_study`, from the text itself; `path` is used in messages and to find files beside it."""
    return _check(parse_toml(text, path))


def settings_in(path: str | Path) -> Study:
    """The study of a run's file as its settings have it, whether or not the files that it names are there. Raises InputError
    as `load_study`, but for names that do not exist."""
    return _shaped(read_document(path))


def _check(document: Document) -> Study:
    from leakfast.study.references import check_words

    study = _shaped(document)
    check_words(study, document)
    return study


def _shaped(document: Document) -> Study:
    from leakfast.study.references import beside

    if not isinstance(document.data, dict):
        raise InputError(f"{document.path}: a study is a table of settings. See configs/demo.toml.")
    try:
        study = Study.model_validate(beside(document.data, document.path.parent))
    except ValidationError as error:
        raise InputError(explain(error, document, Study)) from None
    study._raw_text = document.text
    return study
