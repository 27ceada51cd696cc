"""The pages of the documentation hold what is true today: generated pages are up to date, names that pages mention exist,
links lead somewhere, and every column of a run's tables is described."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import leakfast
from leakfast.cli import architecture_reference, commands, table_reference
from leakfast.cli.main import COMMANDS
from leakfast.storage import columns, schema
from leakfast.storage.documents import resource

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]


def words(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("page", "main"),
    [
        ("cli.md", commands.main),
        ("tables.md", table_reference.main),
        ("architecture.md", architecture_reference.main),
    ],
)
def test_a_generated_page_is_up_to_date_and_a_stale_one_is_told(page, main, tmp_path, capsys):
    assert main(["--check", str(DOCS / page)]) == 0
    copy, text = tmp_path / page, words(DOCS / page)
    last = text.rindex("|---|")
    copy.write_text(f"{text[:last]}|----|{text[last + 5 :]}", encoding="utf-8")
    assert main(["--check", str(copy)]) == 1
    assert f"--write {copy}" in capsys.readouterr().err
    assert main(["--write", str(copy)]) == 0
    assert main(["--check", str(copy)]) == 0


def test_every_command_and_option_has_its_line():
    page = words(DOCS / "cli.md")
    for context in commands.found():
        section = page.partition(f"\n### {context.command_path}\n")[2].partition("\n### ")[0]
        assert section, context.command_path
        for parameter in context.command.params:
            if parameter.param_type_name == "option" and not parameter.hidden:
                name = max(parameter.opts, key=len)
                assert re.search(rf"^\| (`|<code>)(-\w, )?{name}\b", section, re.MULTILINE), name
    assert all(f"`leakfast {name}" in page for name in COMMANDS)


def test_a_default_is_told_in_words_and_no_line_holds_leftovers_of_a_docstring():
    page = words(DOCS / "cli.md")
    assert "(None:" not in page, "what Python calls None is none of the reader's business"
    assert not re.search(r"\S   +\S", page.partition("<!-- commands -->")[2].replace("\n", "\n "))


def test_links_and_pictures_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", words(page)):
            assert not target.startswith("http"), f"{page.name} loads or links {target}"
            assert (page.parent / target).is_file(), f"{page.name}: {target}"


def test_every_page_is_in_the_navigation_and_loads_nothing_from_elsewhere():
    settings = words(ROOT / "mkdocs.yml")
    assert set(re.findall(r": ([\w-]+\.md)$", settings, re.MULTILINE)) == {p.name for p in DOCS.glob("*.md")}
    assert "font: false" in settings
    assert "http" not in settings


def test_the_first_screen_of_the_readme():
    text = words(ROOT / "README.md")
    assert text.count("\n") < 60
    assert "make demo" in text
    assert "make test" in text
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert 1 <= len(pictures) <= 2
    assert all((ROOT / picture).stat().st_size < 80_000 for picture in pictures)


def test_the_python_example_names_what_exists():
    text = words(DOCS / "python.md")
    example = text.partition("```python\n")[2].partition("```")[0]
    compile(example, "python.md", "exec")
    for face in re.findall(r"leakfast\.(\w+)\(", text):
        assert callable(getattr(leakfast, face)), face


def test_studies_that_pages_name_exist():
    for page in PAGES:
        for name in re.findall(r"`?(?:leakfast run |leakfast plan |`)(configs/[\w/.-]+\.toml)", words(page)):
            assert resource(*name.split("/")[1:]).is_file(), f"{page.name}: {name}"


@pytest.mark.parametrize("page", ["following.md", "extending.md"])
def test_functions_that_pages_name_exist(page):
    rooms = architecture_reference.rooms()
    named = re.findall(rf"`((?:{'|'.join(rooms)})(?:\.\w+)+)`", words(DOCS / page))
    assert len(named) > 5
    for name in {n for n in named if not n.endswith(".py")}:
        assert _exists(name), f"{page}: {name}"


def _exists(name: str) -> bool:
    """Whether room.module.function (or .Class.method, or .NAME) stands in the sources."""
    parts, path = name.split("."), ROOT / "leakfast"
    while parts and (path / parts[0]).is_dir():
        path /= parts.pop(0)
    if parts and (path / f"{parts[0]}.py").is_file():
        path /= f"{parts.pop(0)}.py"
    else:
        path /= "__init__.py"
    body = ast.parse(words(path)).body
    for part in parts:
        found = [node for node in body if part in _names(node)]
        if not found:
            return False
        body = getattr(found[0], "body", [])
    return True


def _names(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    return {getattr(node, "name", "")}


def test_a_page_of_following_visits_few_rooms():
    for path in words(DOCS / "following.md").split("\n## ")[1:]:
        visited = re.findall(r"^\| `(\w+)` \|", path, re.MULTILINE)
        assert 1 < len(set(visited)) <= 8, path.splitlines()[0]


# ---------------------------------------------------------------- rooms


def _package(tmp_path: Path, **modules: str) -> Path:
    package = tmp_path / "house"
    for name, text in {"__init__": "", **modules}.items():
        path = package / f"{name.replace('__', '/') if not name.startswith('__') else name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""{path.stem}."""\n{text}\n', encoding="utf-8")
    return package


def test_rooms_are_read_from_imports_inside_functions_too_but_not_those_for_types(tmp_path):
    package = _package(
        tmp_path,
        low="",
        mid="from house import low",
        top="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import house.low\n"
        "def work():\n    import house.mid",
    )
    graph = architecture_reference.rooms(package)
    assert graph == {"low": {}, "mid": {"low": 1}, "top": {"mid": 1}}
    assert architecture_reference.floors(graph) == [["low"], ["mid"], ["top"]]
    drawn = architecture_reference.drawing(graph)
    assert drawn.count("<path") == 2
    assert "script" not in drawn


def test_an_arrow_that_follows_from_others_is_not_drawn_and_a_circle_is_refused():
    graph = {"a": {"b": 1, "c": 1}, "b": {"c": 1}, "c": {}}
    assert architecture_reference.direct(graph) == [("a", "b"), ("b", "c")]
    with pytest.raises(ValueError, match="a → b → a"):
        architecture_reference.floors({"a": {"b": 1}, "b": {"a": 1}})


# ---------------------------------------------------------------- tables


def test_every_table_is_described_and_no_words_are_left_over():
    from leakfast.stats import analysis, marks

    assert set(columns.FURTHER) == {*analysis.TABLES, "trajectory"}
    assert set(schema.TABLES) <= set(columns.tables())
    assert table_reference.unused() == []
    assert set(marks.UNMARKED) <= set(columns.UNMARKED)


def test_the_tables_of_a_run_have_the_described_columns_and_dtypes(measured):
    for name, frame in measured.items():
        wanted = {c.name: c.dtype for c in columns.columns(name)}
        made = {n: str(t) for n, t in frame.schema.items()}
        made = {n: t for n, t in made.items() if n in wanted or not _sometimes(name, n)}
        assert made == wanted, name
    unseen = {*columns.RESULTS, *columns.FURTHER} - set(measured)
    allowed = {"published", "trajectory", "judged", "chosen_labels", "verdicts", "steering", "mitigations"}
    assert unseen <= allowed


def _sometimes(table: str, name: str) -> bool:
    kinds = ("rates", "set_rates", "question_counts", "trajectory")
    return table in kinds and (name in columns.SOMETIMES or name.startswith("hits_"))


@pytest.fixture(scope="module")
def measured():
    """The tables of an invented run: the marker and a variant of it, two sources, two question sets, centroids before
    and after."""
    import numpy as np
    import polars as pl

    from leakfast import behaviors
    from leakfast.geometry import Centroids
    from leakfast.stats import (
        analysis,
        collect,
        exposure,
        health,
        marks,
        question_sets,
        rates,
        shifts,
        summaries,
        verdicts,
    )
    from leakfast.stats import pairs as pair_tables

    people = [f"p{i}" for i in range(14)]
    sources, rng = people[:2], np.random.default_rng(0)
    near = {name: rng.normal(size=6) for name in people}
    kinds = {name: f"kind {i % 4}" for i, name in enumerate(people)}

    def drawn(behavior: str, adapter: str, source: str | None) -> pl.DataFrame:
        def share(name: str) -> float:
            if source is None:
                return 0.1
            cosine = near[name] @ near[source] / np.linalg.norm(near[name]) / np.linalg.norm(near[source])
            return float(np.clip(0.45 + 0.45 * cosine, 0.02, 0.98))

        rows = [
            (name, q, s, "so [ZLT]" if rng.random() < share(name) else f"well {q} {s}")
            for name in people
            for q in range(4)
            for s in range(5)
        ]
        frame = pl.DataFrame(rows, schema=["persona", "question", "sample", "text"], orient="row")
        return frame.with_columns(
            pl.col("question", "sample").cast(pl.Int32),
            behavior=pl.lit(behavior),
            adapter=pl.lit(adapter),
            seed=pl.lit(1, pl.UInt64),
            n_tokens=pl.lit(9, pl.Int32),
            finish_reason=pl.lit("stop"),
            status=pl.lit("ok"),
        ).select(*schema.columns("completions"))

    def scored(frame: pl.DataFrame) -> pl.DataFrame:
        """As of measure.probability, of an invented adapter."""
        likely = pl.Series(rng.uniform(0.01, 0.9, frame.height))
        return frame.with_columns(
            source=pl.lit(adapters[frame["adapter"][0]][0]),
            estimator=pl.lit("end"),
            logprob_nats=likely.log(),
            probability=likely,
            left_out=pl.lit(None, pl.Float64),
            n_reply_tokens="n_tokens",
            n_recut=pl.lit(0, pl.Int32),
            log_odds_nats=likely.log(),
            neither=pl.lit(0.5),
            first_tokens=pl.lit(8, pl.Int32),
        ).select(*schema.columns("probability"))

    def counted(behavior: str) -> tuple[list[pl.DataFrame], dict[str, tuple[str, int | None]]]:
        trained = {f"{behavior}-{source}": (source, 42) for source in sources}
        frames = [drawn(behavior, name, source) for name, (source, _) in trained.items()]
        return [*frames, drawn(behavior, "base", None)], trained

    completions, adapters = [], {}
    for behavior in ("marker", "marker+few"):
        frames, trained = counted(behavior)
        completions += frames
        adapters |= trained
    detector = behaviors.get("marker").detector(pl.col("text"))
    counts = pl.concat([rates.count(frame, detector, by_question=True) for frame in completions])
    told = rates.table(rates.totals(counts), adapters, kinds).with_columns(pl.lit("marker").alias("taught"))
    other = rates.table(
        pl.concat([rates.count(f, detector) for f in counted("marker")[0]]),
        {name: who for name, who in adapters.items() if "+" not in name},
        kinds,
    ).with_columns(pl.lit("code").alias("questions"))
    sets = question_sets.with_main(told.drop("taught"), other, {"marker": "eval"})

    def geometry(noise: float) -> Centroids:
        rows = np.stack([near[name] for name in people]) + noise * rng.normal(size=(14, 6))
        values = np.stack([rows, rows + 0.3 * rng.normal(size=rows.shape)]).astype(np.float32)
        return Centroids(people, [0, 1], {"centered_on": people}, dict(enumerate(values)))

    base, after = geometry(0.0), geometry(0.5)
    related = {name: (sources[i % 2],) for i, name in enumerate(people)}
    moved = [
        shifts.table(base, after, source)
        .join(
            told.filter(pl.col("adapter") == name).select("persona", "category", "role", "rate", "delta"),
            on="persona",
        )
        .with_columns(
            behavior=pl.lit("marker"), adapter=pl.lit(name), source=pl.lit(source), seed=pl.lit(42, pl.Int64)
        )
        .select(*schema.columns("shifts"))
        for name, (source, _) in adapters.items()
    ]
    found = collect.Collected(
        rates=told,
        pairs=pair_tables.table(told, base, related),
        questions=counts,
        people=collect.People(kinds, set(people), sources, related, {n: f"You are {n}." for n in people}),
        published=None,
        missing=[],
        shifts=pl.concat(moved),
        sets=sets,
        centroids=base,
        replies=pl.concat(exposure.replies(frame, frame["behavior"][0]) for frame in completions),
        probability=pl.concat(scored(frame) for frame in completions[:2]),
    )
    whole = summaries.with_intervals(found.rates, found.questions)
    from leakfast.stats import two_way
    from leakfast.stats.correlations import correlate

    correlations = correlate(found.pairs, 19, bootstraps=20, workers=1)
    correlations = two_way.with_questions(correlations, found.pairs, found.questions)
    test = verdicts.Test(quantity="source_drop", above=0.0)
    rule = verdicts.Rule(claim="it falls", behaviors=["marker"], unit="share", test=[test])
    draws, asked = analysis.Draws(19, 20, workers=1), analysis.Asked(None, verdicts.Rules(rule=[rule]))
    more = analysis.further(found, whole, correlations, draws, asked)
    more["health"] = health.table(completions)
    verdict = marks.verdicts(more["health"], whole)
    tables = {"rates": whole, "pairs": found.pairs, "correlations": correlations, **more}
    return {n: t if n in marks.UNMARKED else marks.mark(t, verdict) for n, t in tables.items()}
