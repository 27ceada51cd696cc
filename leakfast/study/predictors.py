"""The study's table about what may predict leakage before training. Demands pydantic; leaves the work to
measure.predictors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _once(what: str, otherwise: str = "") -> Callable[[Any], Any]:
    """Refuses a list that names one twice; otherwise: what may stand in a list's place, so that none may be empty."""

    def checked(some: Any) -> Any:
        if isinstance(some, list) and (len(set(some)) < len(some) or (otherwise and not some)):
            rest = f', at least one, or "{otherwise}"' if otherwise else ""
            raise ValueError(f"give each {what} once{rest}")
        return some

    return checked


# decoder blocks, counted from 0
Layers = Annotated[Literal["all"] | list[Annotated[int, Field(ge=0)]], AfterValidator(_once("layer", "all"))]

Family = Literal["geometry", "output", "text"]
FAMILIES: tuple[Family, ...] = get_args(Family)
Families = Annotated[Literal["all"] | list[Family], AfterValidator(_once("family", "all"))]
Position = Literal["system_end", "question_end"] | Annotated[int, Field(le=-1)]
Positions = Annotated[list[Position], AfterValidator(_once("position"))]


class PredictorConfig(BaseModel):
    """What is compared between every two personas before training, of the unadapted model; made where the table is there.

    questions: the set asked; what replies are compared on grows with it.
    layers: decoder blocks of the predictors from states, counted from 0.
    replies: drawn a persona and question, at temperature 1; each is read under every persona's prompt.
    reply_tokens: longest reply, and how far it is read.
    families: which are made; output, which every reply is read under every prompt for, costs most.
    positions: where else in the prompt states are compared: system_end (the last token of the system prompt), question_end, or
    -1, -2, … from the prompt's end (post-instruction tokens).
    statements: whether the differences between "I am X" and "I am not X" are compared, of personas whose prompt begins
    "You are X"."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    questions: str = "eval"
    layers: Layers = "all"
    replies: Annotated[int, Field(ge=1)] = 1
    reply_tokens: Annotated[int, Field(ge=1)] = 40
    families: Families = "all"
    positions: Positions = []
    statements: bool = False

    @property
    def made(self) -> tuple[Family, ...]:
        """The families that are made."""
        return FAMILIES if self.families == "all" else tuple(self.families)
