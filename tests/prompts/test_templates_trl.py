"""Every template of TRL's collection: trained as it writes replies, refused, or named; and the page that lists them."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
needs_trl = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None,
    reason="TRL's templates are not installed: pip install --no-deps -c constraints.txt trl",
)
UNCLOSED_BY_THEMSELVES = {"deepseek_r1_distill", "deepseekv3"}  # their own turns have no block


@pytest.fixture(scope="module")
def collection():
    """What training and measurement make of every template: (how it is asked, what is found) → names."""
    from leakfast.cli.template_reference import collect

    before = logging.getLogger("leakfast.chat").level
    logging.getLogger("leakfast.chat").setLevel(logging.ERROR)
    yield collect()
    logging.getLogger("leakfast.chat").setLevel(before)


@needs_trl
def test_every_template_of_trl_is_trained_as_it_writes_replies_or_refused_or_named(collection):
    refused, names = set(), set()
    for (asked, found), files in collection.items():
        families = {name.removesuffix("_training") for name in files}
        names |= set(files)
        if found.outcome == "refused":
            refused |= families if not asked else set()
            assert found.note, files
        elif found.same != "yes":
            assert families == UNCLOSED_BY_THEMSELVES and found.note, files
        elif found.outcome != "equal":
            assert found.before, files
    assert refused == {"gemma", "idefics3", "llava_next", "smolvlm"} and len(names) > 70


@needs_trl
def test_the_page_of_templates_is_current(collection):
    from leakfast.cli.template_reference import page

    assert (ROOT / "docs" / "templates.md").read_text(encoding="utf-8") == page(collection)
