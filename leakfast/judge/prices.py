"""What a judge costs: USD per million tokens by model, from a table that a user may extend, and a budget that is
asked before anything is sent. An unknown model has no price, not a price of 0."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from leakfast.errors import InputError
from leakfast.storage.documents import did_you_mean, find_shipped, read_document
from leakfast.storage.validation import explain

SHIPPED = "prices.toml"
_DATED = re.compile(r"-(?:\d{8}|\d{4}-\d\d-\d\d)\Z")
_Usd = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Price(BaseModel):
    """USD per million tokens; `batch` is the share of it that a batch costs. What else a request depends on: `thinks`,
    whether the model thinks before it answers (counted as output); `temperature`, whether its API takes one (None: not
    known); its limits (None: not known)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: _Usd
    output: _Usd
    batch: Annotated[float, Field(gt=0, le=1)] = 1.0
    thinks: bool = False
    temperature: bool | None = None
    context_tokens: Annotated[int, Field(gt=0)] | None = None
    max_output_tokens: Annotated[int, Field(gt=0)] | None = None

    def usd(self, input_tokens: int, output_tokens: int, *, in_batch: bool = False) -> float:
        """What so many tokens cost."""
        whole = (input_tokens * self.input + output_tokens * self.output) / 1e6
        return whole * (self.batch if in_batch else 1.0)


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    models: dict[str, Price]


FREE = Price(input=0, output=0)


def price_of(model: str, given: str | Path | None = None) -> Price:
    """The price of `model`, or of it without a date at its end; the user's file first, then the shipped one.

    Raises InputError for a model in neither, and for a file of another shape with its line."""
    tables = _tables(given)
    found = known_of(model, given)
    if found is not None:
        return found
    known = list(dict.fromkeys(name for table in tables for name in table))
    raise InputError(
        f"judge: no price is known for the model {model!r}.{did_you_mean(model, known)} Give a TOML file with "
        f'[models."{model}"], input and output in USD per million tokens: --prices FILE. Or say --free for a '
        "server that costs nothing."
    )


def known_of(model: str, given: str | Path | None = None) -> Price | None:
    """As `price_of`, None for a model in neither file."""
    names = dict.fromkeys((model, _DATED.sub("", model)))
    return next((table[name] for name in names for table in _tables(given) if name in table), None)


def _tables(given: str | Path | None) -> list[dict[str, Price]]:
    return [_read(path) for path in ([given] if given else []) + [SHIPPED]]


def _read(path: str | Path) -> dict[str, Price]:
    document = read_document(find_shipped(path))
    try:
        return _Table.model_validate(document.data).models
    except ValidationError as error:
        raise InputError(explain(error, document, _Table)) from None


@dataclass
class Budget:
    """What may be spent in all, and what is spent or promised. limit_usd None: no limit."""

    price: Price
    limit_usd: float | None
    in_batch: bool
    max_tokens: int
    spent_usd: float = 0.0
    promised_usd: float = 0.0

    def at_most(self, input_tokens: int) -> float:
        """What a request of so many prompt tokens may cost, its reply being as long as it may be."""
        return self.price.usd(input_tokens, self.max_tokens, in_batch=self.in_batch)

    def promise(self, usd: float) -> bool:
        """Set `usd` aside, unless the limit would be passed: then nothing changes and False."""
        whole = self.spent_usd + self.promised_usd + usd
        if self.limit_usd is not None and whole > self.limit_usd * (1 + 1e-12):
            return False
        self.promised_usd += usd
        return True

    def settle(self, promised: float, usd: float) -> None:
        """A promise was kept: it cost `usd`."""
        self.promised_usd = max(0.0, self.promised_usd - promised)
        self.spent_usd += usd
