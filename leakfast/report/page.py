"""The report: one HTML file that needs nothing else. Demands a run with completions; rounds here, computes nothing. No
request leaves the page. Figures as files are `figures.files`."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from markupsafe import Markup, escape

from leakfast.figures import of_run, svg
from leakfast.inert import inert
from leakfast.report import across, content, payload, picks, policy, sample
from leakfast.report.caveats import caveats
from leakfast.stats import health
from leakfast.stats.specificity import place
from leakfast.stats.summary import most
from leakfast.stats.tables import Stats, current
from leakfast.storage import layout
from leakfast.storage.run import Run

TEMPLATES = Path(__file__).parent


@dataclass(frozen=True)
class Compared:
    """Another run's name, and `stats.against.compare` of the two."""

    name: str
    table: pl.DataFrame

    def sections(self) -> dict[str, list[dict[str, Any]]]:
        """Behavior → its rows; a unit stands in each."""
        out: dict[str, list[dict[str, Any]]] = {}
        for row in self.table.rows(named=True):
            out.setdefault(row["behavior"], []).append(row)
        return {behavior: picks.twins(rows) for behavior, rows in out.items()}


def report(
    run: str | Path | Run,
    stats: Stats | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    compared: Compared | None = None,
    made_of: str | None = None,
) -> Path:
    """Write report.html of a run and return its path.

    `stats`: the run's tables; those on disk if they are up to date, else they are computed. `compared`: with another
    run, which the page then opens with; it is report-against.html. `made_of`: hash of what the page follows from,
    kept in the run's manifest. The same run gives the same bytes under the same versions. Raises InputError if `run` is
    no run, StoreError if it cannot be written."""
    run = (run if isinstance(run, Run) else Run(run)).open()
    stats = stats or current(run)
    pictures = _pictures(run, stats, progress)
    sections = [
        {
            **content.behavior_section(run, stats, behavior),
            "figures": {kind: uri for (kind, of), uri in pictures.items() if of == behavior},
        }
        for behavior in stats.behaviors()
    ]
    html = render(
        sections=sections,
        drawn={kind: uri for (kind, of), uri in pictures.items() if of is None},
        compared=compared,
        blobs=_blobs(run, stats, {s["name"]: s["questions"] for s in sections}),
        **told(run, stats),
    )
    about = {} if made_of is None else {"made_of": made_of}
    path = run.add_file(layout.REPORT_AGAINST if compared else layout.REPORT, html.encode("utf-8"), **about)
    if progress:
        progress(1, 1, "written")
    return path


def told(run: Run, stats: Stats) -> dict[str, Any]:
    """What the page says of the whole run, by the template's names."""
    studied, unread = content.study_of(run)
    return {
        "relations": content.relations(stats),
        "across": across.grid(across.across(stats)),
        "settings": content.settings(run),
        "provenance": content.provenance(run, stats),
        "missing": stats.missing,
        "caveats": caveats(run, stats, studied, unread),
        "remarks": stats.remarks(),
        "unwell": stats.warnings(),
        "health_rule": health.rule(),
    }


def render(*, served: str | None = None, **values) -> str:
    """The template filled with `values`; every text is escaped unless this module made it. served: the version of the run
    that a served page was made of, None for a file."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FileSystemLoader(TEMPLATES),
    )
    environment.filters |= {
        "percent": percent,
        "signed": signed,
        "p": p_value,
        "words": words,
        "place": _place,
    }
    environment.filters |= {"digits": digits, "count": count, "amount": amount, "change": change}
    environment.filters |= {"in_short": content.in_short, "most": lambda row: words(most(row))}
    own = {
        "css": Markup(policy.css()),
        "scripts": [Markup(text) for text in policy.scripts(served is not None)],
        "policy": policy.policy(served=served is not None),
        "served": served,
    }
    values.setdefault("compared", None)
    return environment.get_template("template.html").render(**own, **values)


def _shown(value: Any) -> Any:
    """A text that was not made here, with what would steer the page written out."""
    return inert(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _blobs(run: Run, stats: Stats, questions: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """What the charts and the browser of completions are drawn from, packed."""
    data = payload.payload(run, stats, questions)
    place = {person["name"]: number for number, person in enumerate(data["personas"])}
    texts = sample.sample(run, data["adapters"], place)
    return {"data": payload.packed(data), "texts": payload.packed(texts)}


# what no chart of the page shows; all are files with `leakfast plot`
_PICTURES = ("gradients", "partials", "question_sets", "shifts", "relations")


def _pictures(run: Run, stats: Stats, progress: Callable[[int, int, str], None] | None) -> dict:
    """(kind, behavior or None) → the picture as a data URI of its SVG."""
    out, most = {}, len(_PICTURES) * len(stats.behaviors())
    for number, one in enumerate(of_run.draw(run, stats, _PICTURES)):
        if one.figure is not None:
            uri = "data:image/svg+xml;base64," + base64.b64encode(svg(one.figure)).decode()
            out[one.kind, one.behavior] = uri
        if progress:
            progress(min(number + 1, most), most + 1, f"picture of {one.kind}")
    return out


# rounding: the only place where a number of a report loses digits

_NONE = Markup('<span class="none">–</span>')


def percent(share: float | None, places: int = 1) -> str:
    """0.4163 → 41.6, without the sign."""
    return _NONE if share is None else f"{100 * share:.{places}f}".replace("-", "−")


def amount(value: float | None, unit: str) -> str:
    """A share in percent, or points as they are; one digit."""
    return percent(value) if unit == "share" else digits(value, 1)


def change(value: float | None, unit: str) -> str:
    """A change of a share in percentage points, or of points; one digit, with its sign."""
    return signed(None if value is None else (100 * value if unit == "share" else value), 1)


def _place(rank: float | None, of: int | None) -> str:
    return place(rank, of) or _NONE


def signed(value: float | None, places: int = 2) -> str:
    """0.7044 → +0.70, with a true minus."""
    return _NONE if value is None else f"{value:+.{places}f}".replace("-", "−")


def digits(value: float | None, places: int = 2) -> str:
    """0.8983 → 0.90, with a true minus."""
    return _NONE if value is None else f"{value:.{places}f}".replace("-", "−")


def count(value: int | None) -> str:
    """22200 → 22,200."""
    return _NONE if value is None else f"{value:,}"


def p_value(p: float | None) -> str:
    """3.2e-34 → 3.2 × 10⁻³⁴; from 0.001 on, two digits."""
    if p is None:
        return _NONE
    if p == 0:
        return Markup("&lt; 10<sup>−300</sup>")
    if p >= 1e-3:
        return f"{p:.2g}"
    mantissa, exponent = f"{p:.1e}".split("e")
    return Markup(f"{mantissa}&thinsp;×&thinsp;10<sup>−{abs(int(exponent))}</sup>")


def words(name: str | None) -> str:
    """villain_teacher → villain teacher, escaped."""
    return _NONE if name is None else escape(str(name).replace("_", " "))
