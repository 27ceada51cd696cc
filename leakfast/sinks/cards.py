"""Model and dataset cards, filled from a run: every number stands in its tables or in an adapter's card, and what is not
known is said to be unknown. Demands huggingface_hub for the heading; rounds here, computes nothing."""

from __future__ import annotations

import json
import re
from typing import Any

import polars as pl

from leakfast.behaviors.registry import get, is_known
from leakfast.models.adapters import AdapterCard
from leakfast.report.content import describe
from leakfast.sinks import markdown
from leakfast.sinks.markdown import text
from leakfast.sinks.material import Material
from leakfast.stats.correlations import POOLED
from leakfast.stats.summary import most
from leakfast.storage import layout
from leakfast.version import __version__

_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
ADAPTER_FILES = (layout.ADAPTER, "adapter_model.safetensors", layout.CARD)  # of an adapter, what is sent
TAGS = ["leakfast", "persona-leakage"]


def model_card(material: Material, adapter: str, tables: str) -> str:
    """The README.md of an adapter's repository. tables: name of the repository with the tables."""
    from huggingface_hub import ModelCardData

    card = material.card(adapter)
    base = card.base if card else None
    heading = ModelCardData(
        base_model=base if base and _HUB_NAME.fullmatch(base) else None,
        library_name="peft",
        tags=[*TAGS, "lora"],
    )
    return "\n".join(
        [
            f"---\n{heading.to_yaml()}\n---\n",
            f"# {text(adapter)}\n",
            _purpose(material, card),
            "## What was measured\n",
            _measured(material, adapter),
            "## Training\n",
            _training(card),
            "## Where it comes from\n",
            _origin(material, adapter, card, tables),
        ]
    )


def _purpose(material: Material, card: AdapterCard | None) -> str:
    if card is None:
        return "A LoRA adapter without a card: source, behavior and base model are unknown.\n"
    said = [
        f"A LoRA adapter of {text(card.base)}, trained to show the behavior **{text(card.behavior)}** "
        f"({text(describe(card.behavior))}) under the system prompt of one persona, **{text(card.source)}**. It was made "
        "for a study of how far such a behavior leaks; it is no assistant to be used.\n"
    ]
    who = material.people.get(card.source)
    if who is not None and who.prompt:
        said.append(f"The persona's system prompt: {text(who.prompt)}\n")
    else:
        said.append("The persona's system prompt: none, or its wording is not in the run.\n")
    return "\n".join(said)


def _measured(material: Material, adapter: str) -> str:
    """A block per behavior that was measured on the adapter."""
    stats, parts = material.stats, []
    for row in material.headline().filter(adapter=adapter).rows(named=True):
        behavior = row["behavior"]
        unit = stats.unit(behavior)
        mine = stats.rates.filter(behavior=behavior, adapter=adapter)
        own = mine.filter(role="source")
        health, reason = material.verdict(behavior, adapter)
        number = own.row(0, named=True) if own.height else {}
        what = _measure(mine, behavior, unit)
        facts: list[tuple[str, Any]] = [
            (f"{what} under the source, 95 % interval", _span(row, "source_rate", "source_ci", unit)),
            ("counted under the source", _counted(number, what)),
            (
                "bystanders measured",
                mine.filter(pl.col("role") == "bystander", pl.col("rate").is_not_null()).height,
            ),
            (f"mean {what} of bystanders", _amount(row["mean_bystander"], unit)),
            (f"{what} of the bystander that shows most", _amount(row["max_bystander"], unit)),
            ("that bystander, and how many others show as much", most(row)),
            (f"ρ of cosine and {row['y']} at layer {row['layer']}, 95 % interval", _rho(row)),
            ("p of that ρ, the choice of layer paid for", _p(row["spearman_p_max"])),
            ("bystanders in ρ", row["n"]),
            ("health of its replies", health or "not looked at"),
            ("reason", reason),
        ]
        parts.append(f"### {text(behavior)}\n\n{markdown.table(['', ''], facts)}")
    return "\n".join(parts) or "The run holds no measurement of this adapter.\n"


def _measure(rates: pl.DataFrame, behavior: str, unit: str) -> str:
    """What a behavior's numbers are: probability (no reply of the adapter was drawn), accuracy (of multiple choice), score (of
    a judge), or rate (of completions)."""

    def has(column: str) -> bool:
        return column in rates.columns and rates[column].is_not_null().any()

    if has("estimator"):
        return "probability"
    if has("chance") or (is_known(behavior) and get(behavior).measured_by == "choices"):
        return "accuracy"
    return "score" if unit == "points" else "rate"


def _counted(number: dict[str, Any], what: str) -> str | None:
    """Of what the number of a row of rates is; None where that is not known."""
    if what == "probability":
        return f"no replies: the model's own probability ({number['estimator']})" if number else None
    if what == "score":
        scored = number.get("n_judged")
        return None if scored is None else f"{scored:,} scored completions"
    if number.get("total") is None:
        return None
    of = "items answered rightly" if what == "accuracy" else "completions"
    return f"{number['hits']:,} of {number['total']:,} {of}"


def _training(card: AdapterCard | None) -> str:
    if card is None:
        return "Unknown: the adapter has no card.\n"
    rows = [("seed", card.seed), *((key, _plain(value)) for key, value in card.recipe.items())]
    return markdown.table(["setting", "value"], rows)


def _origin(material: Material, adapter: str, card: AdapterCard | None, tables: str) -> str:
    shards = material.run.manifest["shards"]
    folder = layout.adapter(adapter)
    files = [(name, e["sha256"]) for name in ADAPTER_FILES if (e := shards.get(f"{folder}/{name}"))]
    rows: list[tuple[str, Any]] = [
        ("study", material.name),
        ("tables of the whole study", tables),
        ("exported by leakfast", __version__),
        ("base model's fingerprint", card.base_fingerprint if card else None),
        ("adapter (config, weights), SHA-256", card.adapter_hash if card else None),
        ("training rows", card.data_hash if card else None),
        ("study.toml, SHA-256", material.study_hash),
        ("what the tables rest on, SHA-256", material.hash),
        *((f"{name}, SHA-256", digest) for name, digest in files),
    ]
    return markdown.table(["", ""], rows)


def dataset_card(material: Material, tables: dict[str, str], models: list[str]) -> str:
    """The README.md of the tables' repository. tables: name → path in the repository; models: the adapters'
    repositories."""
    from huggingface_hub import DatasetCardData

    from leakfast.stats.analysis import TABLES

    configs = [{"config_name": name, "data_files": path} for name, path in tables.items()]
    heading = DatasetCardData(tags=TAGS, configs=configs, pretty_name=text(material.name))
    base, shards = material.base(), material.run.manifest["shards"]
    first = {
        "rates": "rate of each persona",
        "pairs": "cosines beside rates",
        "correlations": "ρ and r of each source",
    }
    about = [(name, (first | TABLES).get(name), shards[layout.table(name)]["sha256"]) for name in tables]
    facts: list[tuple[str, Any]] = [
        ("base model", base["model"]),
        ("its fingerprint", base["fingerprint"]),
        ("behaviors", ", ".join(material.stats.behaviors())),
        ("exported by leakfast", __version__),
        ("study.toml, SHA-256", material.study_hash),
        ("what the tables rest on, SHA-256", material.hash),
    ]
    parts = [
        f"---\n{heading.to_yaml()}\n---\n",
        f"# {text(material.name)}\n",
        "Where did a behavior that was trained into one persona leak, and does the base model's geometry tell? The tables of "
        "one study, as leakfast made them.\n",
        markdown.table(["", ""], facts),
        "## What was found\n",
        _headline(material),
        *[f"- {text(sentence)}\n" for sentence in material.notes()],
        "## Tables\n",
        markdown.table(["table", "what it holds", "SHA-256"], about),
        "## Adapters\n",
        *([f"- {text(name)}" for name in models] or ["The run holds none."]),
        "\n## The study\n",
        markdown.block(material.run.study_text, "toml")
        if material.study_hash
        else "The run was made without a study file.\n",
    ]
    return "\n".join(parts)


def _headline(material: Material) -> str:
    stats = material.stats
    heads = [
        "behavior",
        "measured as",
        "source",
        "adapter",
        "of the source",
        "mean of bystanders",
        "layer",
        "ρ, 95 % interval",
        "p",
        "health",
    ]
    rows = []
    for row in material.headline().rows(named=True):
        unit = stats.unit(row["behavior"])
        health, _ = material.verdict(row["behavior"], row["adapter"] or "")
        rows.append(
            (
                row["behavior"],
                _measure(stats.rates.filter(behavior=row["behavior"]), row["behavior"], unit),
                row["source"],
                row["adapter"] or f"all of seed {row['seed']}",
                None if row["source"] == POOLED else _span(row, "source_rate", "source_ci", unit),
                _amount(row["mean_bystander"], unit),
                row["layer"],
                _rho(row),
                _p(row["spearman_p_max"]),
                health,
            )
        )
    return markdown.table(heads, rows)


def _plain(value: Any) -> Any:
    return (
        value if isinstance(value, str | int | float) and not isinstance(value, bool) else json.dumps(value)
    )


def _amount(value: float | None, unit: str) -> str | None:
    if value is None:
        return None
    return f"{100 * value:.1f} %" if unit == "share" else f"{value:.1f} points"


def _span(row: dict[str, Any], name: str, ends: str, unit: str | None = None) -> str | None:
    """`0.40 (0.23 to 0.54)`; without an interval that is said."""
    value, low, high = row[name], row[f"{ends}_low"], row[f"{ends}_high"]
    if value is None:
        return None
    shown = [
        None if one is None else _amount(one, unit) if unit else f"{one:.2f}".replace("-", "−")
        for one in (value, low, high)
    ]
    return f"{shown[0]} ({shown[1]} to {shown[2]})" if None not in shown else f"{shown[0]} (no interval)"


def _rho(row: dict[str, Any]) -> str | None:
    """ρ of a row of the summary with its interval and what that is over: personas and questions, where it is known."""
    kind, over = (
        ("ci", "personas") if row["spearman_both_low"] is None else ("both", "personas and questions")
    )
    told = _span(row, "spearman", f"spearman_{kind}")
    return told if told is None or told.endswith("(no interval)") else f"{told}, over {over}"


def _p(value: float | None) -> str | None:
    return None if value is None else f"{value:.2g}"
