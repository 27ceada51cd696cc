"""What pydantic finds wrong, as a user reads it: one line a value, whatever kinds it may be of."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from leakfast.storage.documents import parse_toml
from leakfast.storage.validation import explain


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Inner(_Table):
    share: Annotated[float, Field(ge=0, le=1)] = 0.5


class Outer(_Table):
    rate: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    blocks: Literal["all"] | list[Annotated[int, Field(ge=0)]] = "all"
    words: dict[str, bool | str] = {}
    inner: Inner | None = None
    several: list[Inner] = []
    named: Annotated[dict[str, Inner], Field(min_length=1)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            'rate = "fast"',
            "f.toml, line 1: rate is 'fast': input should be a valid number or 'auto'. Correct that line.",
        ),
        (
            "rate = -1.0",
            "f.toml, line 1: rate is -1.0: input should be greater than 0 or 'auto'. Correct that line.",
        ),
        (
            'blocks = "some"',
            "f.toml, line 1: blocks is 'some': input should be 'all' or a valid list. Correct that line.",
        ),
        (  # a list was meant: that it is not "all" is not said
            "blocks = [0, -2]",
            "f.toml, line 1: blocks.1 is -2: input should be greater than or equal to 0. Correct that line.",
        ),
        (  # a key that is called as pydantic calls a kind
            "words = { str = 3 }",
            "f.toml, line 1: words.str is 3: input should be a valid boolean or a valid string. Correct that line.",
        ),
        ("inner = { shar = 1 }", "f.toml, line 1: unknown key inner.shar. Did you mean share?"),
        ("several = [{}, { x = 1 }]", "f.toml, line 1: unknown key several.1.x. Known here: share."),
        ("inner = 3", "f.toml, line 1: inner is 3: a table is needed. Correct that line."),
    ],
)
def test_a_value_has_one_line(text, said):
    assert _told(f"{text}\n[named.a]\n") == said


class Listed(_Table):
    rules: list[Outer]
    one: Inner
    text: str


def test_what_is_missing_is_a_line_or_a_table():
    assert _told("") == "f.toml: named is missing. Add a table `[named.NAME]`."
    assert _told("", Listed).splitlines() == [
        "f.toml: rules is missing. Add a table `[[rules]]`.",
        "       f.toml: one is missing. Add a table `[one]`.",
        "       f.toml: text is missing. Add a line `text = …`.",
    ]


def _told(text: str, model: type[BaseModel] = Outer) -> str:
    document = parse_toml(text, "f.toml")
    with pytest.raises(ValidationError) as caught:
        model.model_validate(document.data)
    return explain(caught.value, document, model)
