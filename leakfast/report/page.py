"""The report: one HTML file that needs nothing else, and the figures as PNG and PDF beside it. Demands
a run with completions; rounds here, computes nothing. No request leaves the page."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from leakfast import figures
from leakfast.report import content, payload, policy, sample
from leakfast.report.caveats import caveats
from leakfast.stats import health, marks, summary
from leakfast.stats.specificity import place
from leakfast.stats.tables import Stats, current
from leakfast.storage import layout
from leakfast.storage.run import Run

TEMPLATES = Path(__file__).parent


def report(
    run: str | Path | Run, stats: Stats | None = None, progress: Callable[[int, int, str], None] | None = None
) -> Path:
    """Write report.html and figures/*.{png,pdf} of a run and return the report's path.

    `stats`: the run's tables; those on disk if they are up to date, else they are computed. The same
    run gives the same bytes under the same versions. Raises InputError if `run` is no run, StoreError
    if it cannot be written."""
    run = (run if isinstance(run, Run) else Run(run)).open()
    stats = stats or current(run)
    behaviors = stats.behaviors()
    steps = 2 * len(behaviors) + 1
    sections = []
    for number, behavior in enumerate(behaviors):
        if progress:
            progress(2 * number, steps, f"figures of {behavior}")
        images = _draw(run, stats, behavior)
        if progress:
            progress(2 * number + 1, steps, f"tables of {behavior}")
        sections.append({**content.behavior_section(run, stats, behavior), "figures": images})
    html = render(
        sections=sections,
        drawn=_draw_whole(run, stats),
        blobs=_blobs(run, stats, {s["name"]: s["questions"] for s in sections}),
        **told(run, stats),
    )
    path = run.add_file(layout.REPORT, html.encode("utf-8"))
    if progress:
        progress(steps, steps, "written")
    return path


def told(run: Run, stats: Stats) -> dict[str, Any]:
    """What the page says of the whole run, by the template's names."""
    return {
        "relations": content.relations(stats),
        "settings": content.settings(run),
        "provenance": content.provenance(run, stats),
        "missing": stats.missing,
        "caveats": caveats(run, stats, content.study_of(run)[0]),
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
    environment.filters |= {"digits": digits, "count": count, "amount": amount}
    own = {
        "css": Markup(policy.css()),
        "scripts": [Markup(text) for text in policy.scripts(served is not None)],
        "policy": policy.policy(served=served is not None),
        "served": served,
    }
    return environment.get_template("template.html").render(**own, **values)


def _blobs(run: Run, stats: Stats, questions: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """What the charts and the browser of completions are drawn from, packed."""
    data = payload.payload(run, stats, questions)
    place = {person["name"]: number for number, person in enumerate(data["personas"])}
    texts = sample.sample(run, data["adapters"], place)
    return {"data": payload.packed(data), "texts": payload.packed(texts)}


def _draw(run: Run, stats: Stats, behavior: str) -> dict[str, str]:
    """Draw, store as PNG and PDF, and return each figure as a data URI of its SVG."""
    drawn, more = {}, stats.more
    layer, y, unit = stats.best_layer(behavior), stats.outcome(behavior), stats.unit(behavior)
    if layer is not None:
        drawn["scatter"] = figures.scatter(*stats.tables().values(), behavior=behavior, layer=layer, y=y)
        drawn["layers"] = figures.layers(stats.correlations, behavior=behavior, y=y)
    if "gradients" in more and "isotonic" in more:
        drawn["gradients"] = figures.gradients(
            stats.pairs, more["gradients"], more["isotonic"], behavior=behavior, unit=unit
        )
    if "partials" in more and layer is not None:
        drawn["partials"] = figures.partials(more["partials"], behavior=behavior, layer=layer, y=y)
    if "matrix" in more:
        drawn["matrix"] = figures.matrix(more["matrix"], behavior=behavior, y=y, unit=unit)
    if "question_sets" in more and layer is not None:
        drawn["question_sets"] = figures.question_sets(
            more["question_sets"], behavior=behavior, layer=layer, y=y, unit=unit
        )
    if "shifts" in more and layer is not None:
        drawn["shifts"] = figures.shifts(
            more["shifts"], more["shift_correlations"], behavior=behavior, layer=layer, y=y, unit=unit
        )
    note = marks.notes(stats.health, behavior)
    return {
        kind: _kept(run, f"{kind}-{behavior}", figures.noted(figure, note))
        for kind, figure in drawn.items()
        if figure is not None
    }


def _draw_whole(run: Run, stats: Stats) -> dict[str, str]:
    """The figures that are about all behaviors, in the same way."""
    drawn = {}
    if "relations" in stats.more and stats.more["relations"]["behavior"].n_unique() > 1:
        table = stats.more["relations"]
        units = {behavior: stats.unit(behavior) for behavior in table["behavior"].unique()}
        figure = figures.relations(table, stats.more["relations_alike"], units=units)
        if figure is not None:
            told = [marks.notes(stats.health, behavior) for behavior in stats.behaviors()]
            note = "; ".join(one for one in told if one) or None
            drawn["relations"] = _kept(run, "relations", figures.noted(figure, note))
    if run.has(layout.table("trajectory")):
        table = run.read(layout.table("trajectory"))
        figure = figures.trajectory(table, lambda behavior: summary.unit(table, behavior))
        drawn["trajectory"] = _kept(run, "trajectory", figures.noted(figure, marks.series_note(table)))
    return drawn


def _kept(run: Run, name: str, figure) -> str:
    run.add_file(f"{layout.FIGURES}/{name}.png", figures.png(figure))
    run.add_file(f"{layout.FIGURES}/{name}.pdf", figures.pdf(figure))
    return "data:image/svg+xml;base64," + base64.b64encode(figures.svg(figure)).decode()


# rounding: the only place where a number of a report loses digits

_NONE = Markup('<span class="none">–</span>')


def percent(share: float | None, places: int = 1) -> str:
    """0.4163 → 41.6, without the sign."""
    return _NONE if share is None else f"{100 * share:.{places}f}"


def amount(value: float | None, unit: str) -> str:
    """A share in percent, or points as they are; one digit."""
    return percent(value) if unit == "share" else digits(value, 1)


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
