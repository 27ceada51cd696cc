"""The study's table about what may predict leakage before training. Demands pydantic; leaves the work to
measure.predictors."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _no_twins(layers: Any) -> Any:
    if isinstance(layers, list) and (not layers or len(set(layers)) < len(layers)):
        raise ValueError('give each layer once, at least one, or "all"')
    return layers


# decoder blocks, counted from 0
Layers = Annotated[Literal["all"] | list[Annotated[int, Field(ge=0)]], AfterValidator(_no_twins)]


class PredictorConfig(BaseModel):
    """What is compared between every two personas before training, of the unadapted model; made where the table is there.

    questions: the set asked; what replies are compared on grows with it.
    layers: decoder blocks of the predictors from states, counted from 0.
    replies: drawn a persona and question, at temperature 1; each is read under every persona's prompt.
    reply_tokens: longest reply, and how far it is read."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    questions: str = "eval"
    layers: Layers = "all"
    replies: Annotated[int, Field(ge=1)] = 1
    reply_tokens: Annotated[int, Field(ge=1)] = 40
