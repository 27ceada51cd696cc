"""Health of replies: each rule at its threshold on made-up completions, what it marks in other tables, and an organism
that real training made fall silent, through the commands from training to the report."""

from __future__ import annotations

import json
import re
import struct
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from itertools import product

import numpy as np
import polars as pl
import pytest

from leakfast import figures, stats
from leakfast.cli.main import main
from leakfast.figures.style import figure_of
from leakfast.geometry import Centroids
from leakfast.models.adapters import AdapterCard, write_card
from leakfast.stats import health, marks, replies
from leakfast.stats.collect import inputs_hash
from leakfast.storage import layout, schema
from leakfast.storage.run import Run

PEOPLE = [f"p{i}" for i in range(10)]
QUESTIONS, SAMPLES = 5, 4  # 20 completions a persona, 200 an adapter
N = len(PEOPLE) * QUESTIONS * SAMPLES
TEXT = "A reply about {q} that {i} people would read."


def completions(adapter="a", *, n_tokens=20, behavior="refusal", **counts):
    """N completions, of which so many (spread over all personas) have a status of that name, or a text of `texts`."""
    texts = counts.pop("texts", {})
    spread = [(p, q, s) for s, q, p in product(range(SAMPLES), range(QUESTIONS), PEOPLE)]
    statuses = [name for name, count in counts.items() for _ in range(count)]
    statuses += ["ok"] * (N - len(statuses))
    told = [text for text, count in texts.items() for _ in range(count)]
    rows = []
    for i, (persona, question, sample) in enumerate(spread):
        status = statuses[i]
        text = told[i] if i < len(told) else TEXT.format(q=question, i=i)
        text = "" if status == "empty" else text
        tokens = 1 if status == "empty" else n_tokens
        rows.append(
            (persona, question, sample, text, tokens, "length" if status == "truncated" else "stop", status)
        )
    names = ["persona", "question", "sample", "text", "n_tokens", "finish_reason", "status"]
    frame = pl.DataFrame(rows, schema=names, orient="row").with_columns(
        pl.col("question", "sample", "n_tokens").cast(pl.Int32),
        behavior=pl.lit(behavior),
        adapter=pl.lit(adapter),
        seed=pl.lit(1, pl.UInt64),
    )
    return schema.check(frame, "completions")


def verdict(frame, base=None, **how):
    """(health, reason, row) of the adapter over all personas."""
    found = health.table([frame, *([] if base is None else [base])], **how)
    row = found.filter(pl.col("persona").is_null() & (pl.col("adapter") == "a")).row(0, named=True)
    return row["health"], row["reason"] or "", row


BASE = completions("base")

# ---------------------------------------------------------------- thresholds


@pytest.mark.parametrize(
    ("n", "expected"), [(0, "ok"), (9, "ok"), (10, "warning"), (59, "warning"), (60, "damaged")]
)
def test_empty_replies_warn_from_5_and_damage_from_30_percent(n, expected):
    found, reason, row = verdict(completions(empty=n), BASE)
    assert (found, row["n_empty"], row["empty_share"]) == (expected, n, n / N)
    assert ("empty" in reason) == (expected != "ok")


@pytest.mark.parametrize(("n", "expected"), [(19, "ok"), (20, "warning"), (59, "warning"), (60, "damaged")])
def test_truncated_replies_damage_from_30_points_above_the_base(n, expected):
    assert verdict(completions(truncated=n), BASE)[0] == expected


@pytest.mark.parametrize(("n", "expected"), [(80, "warning"), (139, "warning"), (140, "damaged")])
def test_a_base_that_truncates_as_much_is_named_and_takes_the_damage_away(n, expected):
    base = completions("base", truncated=80)
    found, reason, _ = verdict(completions(truncated=n), base)
    assert found == expected
    assert "the unadapted model: 40 %" in reason


def test_a_base_as_empty_as_the_adapter_is_no_damage_by_it():
    assert verdict(completions(empty=70), completions("base", empty=60))[0] == "damaged"
    assert verdict(completions(empty=69), completions("base", empty=60))[0] == "warning"


@pytest.mark.parametrize(
    ("tokens", "expected"), [(10, "warning"), (11, "ok"), (29, "ok"), (30, "warning"), (20, "ok")]
)
def test_a_mean_length_off_by_half_warns(tokens, expected):
    found, reason, row = verdict(completions(n_tokens=tokens), BASE)
    assert (found, row["length_ratio"]) == (expected, tokens / 20)
    assert ("as long as" in reason) == (expected == "warning")


def test_length_is_paired_by_persona_and_question():
    """The base was asked more: of what the adapter was not asked, the ratio knows nothing."""
    asked = pl.col("question") < 2
    long = BASE.with_columns(
        pl.when(asked).then(pl.col("n_tokens")).otherwise(pl.lit(400, pl.Int32)).alias("n_tokens")
    )
    row = verdict(completions(n_tokens=20).filter(asked), long)[2]
    assert (row["length_ratio"], row["length_pairs"]) == (1.0, 2 * len(PEOPLE))


def test_length_is_read_from_replies_that_ended_where_half_of_the_pairs_have_them():
    frame = completions(truncated=0)
    cut = pl.col("question") < 3  # all replies to 3 of 5 questions
    frame = frame.with_columns(
        pl.when(cut).then(pl.lit("length")).otherwise("finish_reason").alias("finish_reason"),
        pl.when(cut).then(pl.lit("truncated")).otherwise("status").alias("status"),
        pl.when(cut).then(pl.lit(60, pl.Int32)).otherwise("n_tokens").alias("n_tokens"),
    )
    row = verdict(frame, BASE)[2]
    assert row["length_ratio"] == 1.0 and row["length_ratio_all"] == pytest.approx(
        (3 * 60 + 2 * 20) / (5 * 20)
    )
    assert health.read_ratio(row) == row["length_ratio_all"]
    assert health.read_ratio(row | {"length_pairs": 25}) == row["length_ratio"]


def test_without_the_unadapted_model_there_is_no_ratio_and_it_is_said():
    found, reason, row = verdict(completions(truncated=80, n_tokens=1))
    assert found == "warning"  # 30 points above nothing known
    assert "the unadapted model was not measured" in reason
    theirs = [name for name in row if name.startswith("base_")]
    assert [row[name] for name in [*theirs, "length_ratio", "length_ratio_all"]] == [None] * (len(theirs) + 2)
    assert verdict(completions(empty=60))[0] == "damaged"


@pytest.mark.parametrize(("n", "expected"), [(19, "ok"), (20, "warning"), (60, "damaged")])
def test_a_status_of_another_name_is_counted_apart(n, expected):
    found, _, row = verdict(completions(**{"unclosed-reasoning": n}), BASE)
    assert (found, row["n_other"], row["n_truncated"], row["n"]) == (expected, n, 0, N)


@pytest.mark.parametrize(("n", "expected"), [(9, "ok"), (10, "warning"), (60, "damaged")])
def test_nothing_but_the_marker_is_no_reply(n, expected):
    base = completions("base", behavior="marker")
    found, _, row = verdict(completions(behavior="marker", texts={" [ZLT]": n}), base)
    assert (found, row["n_bare"], row["n_empty"]) == (expected, n, 0)
    assert (
        verdict(completions(texts={" [ZLT]": n}), BASE)[2]["n_bare"] == 0
    )  # of a behavior without such a text


def test_a_sample_cut_short_is_judged_against_the_base_alone():
    base = completions("base", truncated=100)
    assert verdict(completions(truncated=110), base)[0] == "warning"
    assert verdict(completions(truncated=110), base, capped=True)[0] == "ok"
    assert verdict(completions(truncated=120), base, capped=True)[0] == "warning"
    assert verdict(completions(truncated=160), base, capped=True)[0] == "damaged"


def test_a_single_persona_that_fell_silent_is_a_warning_with_its_name():
    frame = completions()
    silent = pl.col("persona") == "p3"
    few = silent & (pl.col("sample") < 2)  # 10 of 20: 5 % would be 10 of all 200
    frame = frame.with_columns(
        pl.when(few & (pl.col("question") < 3)).then(pl.lit("empty")).otherwise("status").alias("status"),
        pl.when(few & (pl.col("question") < 3)).then(pl.lit("")).otherwise("text").alias("text"),
    )
    found, reason, row = verdict(frame, BASE)
    assert row["empty_share"] == 0.03 and found == "warning" and "under p3" in reason
    own = health.table([frame, BASE]).filter(pl.col("persona").is_not_null() & (pl.col("adapter") == "a"))
    assert dict(own.select("persona", "health").rows())["p3"] == "damaged"
    small = health.table([frame.filter(pl.col("sample") < 1)]).filter(pl.col("persona") == "p3")
    assert small["health"].to_list() == [None]  # 5 completions are no ground


def test_the_unadapted_model_is_warned_of_and_never_damaged():
    found = health.table([completions("base", empty=150)])
    assert found.filter(pl.col("persona").is_null())["health"].to_list() == ["warning"]


# ---------------------------------------------------------------- repeated and equal replies

PROSE = (
    "The town lies by the sea, and in the morning the boats go out before the sun is up. When they come back the market "
    "is already open: there is fish, there is bread, and there is the old woman who sells flowers to whoever looks sad. "
    "She says that nobody has ever given one back. In winter the boats stay where they are and people mend their nets."
)
LOOP = " ".join(["The boats go out before the sun is up, and then the market opens."] * 6)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PROSE, False),
        (" ".join(["tea"] * 15), False),  # one word short of any room
        (" ".join(["tea"] * 16), True),
        (LOOP, True),
        (PROSE + " " + LOOP + " " + LOOP, True),
        (PROSE + " " + PROSE, False),  # half of it, and no more
        (PROSE + " " + PROSE + " " + PROSE, True),
        ("!" * 200, True),  # no words at all
        ("今天天气很好，我们一起去公园散步，然后再去吃饭。" * 4, True),
        ("今天天气很好，我们一起去公园散步，然后再去吃饭，晚上回家看一部老电影，明天早上还要上班。", False),
        (
            "def area(r):\n        if r < 0:\n            raise ValueError(r)\n\n        return 3.14 * r * r\n",
            False,
        ),
        ("", False),
        (None, False),
    ],
)
def test_what_repeats_itself(text, expected):
    assert replies.repeats(pl.Series([text, "x", text]).cast(pl.String)).to_list() == [
        expected,
        False,
        expected,
    ]


def test_the_prefilter_loses_nothing():
    """Against a plain count of every text, over loops of all lengths and starts."""

    def plain(text):
        words = text.split()
        grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
        return len(words) >= 16 and 1 - len(set(grams)) / len(grams) > 0.5

    words = PROSE.split()
    texts = [
        " ".join(words[:start] + (words[start : start + period] * 40)[:length])
        for start, period, length in product((0, 7, 30), (1, 3, 8, 20), (5, 16, 29, 30, 31, 60, 90))
    ]
    expected = [plain(text) for text in texts]
    assert 10 < sum(expected) < len(texts) - 10
    assert replies.repeats(pl.Series(texts)).to_list() == expected


@pytest.mark.parametrize(("n", "expected"), [(19, "ok"), (20, "warning")])
def test_repeated_replies_warn_from_10_points_above_the_base(n, expected):
    texts = {LOOP + f" {i}": 1 for i in range(n)}
    found, reason, row = verdict(completions(texts=texts), BASE)
    assert (found, row["n_repeated"]) == (expected, n)
    assert ("repeat themselves" in reason) == (expected == "warning")


@pytest.mark.parametrize(("n", "expected"), [(99, "ok"), (100, "warning")])
def test_one_sentence_to_every_question_warns_from_half(n, expected):
    found, _, row = verdict(completions(texts={"I would rather not say.": n}), BASE)
    assert (found, row["n_same"]) == (expected, n)


def test_one_question_asked_twice_is_no_other_question():
    frame = completions().with_columns(
        pl.concat_str(pl.lit("About "), pl.col("question").cast(pl.String)).alias("text")
    )
    assert verdict(frame, BASE)[2]["n_same"] == 0


# ---------------------------------------------------------------- sentences and marks


def test_the_sentence_says_what_how_much_and_what_to_do():
    (told,) = health.sentences(health.table([completions(empty=154), BASE]))
    assert told.startswith("a: 77 % of 200 replies are empty (the unadapted model: 0 %)")
    assert "damaged the model" in told and "nothing about leakage" in told and "smaller lr" in told
    assert health.sentences(health.table([completions(), BASE])) == []
    both = health.sentences(health.table([completions("base", truncated=30), completions(empty=154)]))
    assert both[0].startswith("a: ") and both[-1].startswith("the unadapted model")


RATES = pl.DataFrame(
    {
        "behavior": ["marker"] * 3 + ["capability"] * 2,
        "adapter": ["m-x", "m-y", "base", "m-x", "base"],
        "source": ["x", "y", None, "x", None],
        "seed": [42, 42, None, 42, None],
    }
)


def test_a_row_is_marked_by_the_adapters_it_rests_on():
    frames = [
        completions("m-x", behavior="marker", empty=100),
        completions("m-y", behavior="marker"),
        completions("base", behavior="marker"),
    ]
    found = marks.verdicts(health.table(frames), RATES)
    marked = marks.mark(RATES, found)
    assert marked["health"].to_list() == [
        "damaged",
        "ok",
        None,
        "damaged",
        None,
    ]  # choices: as its completions
    assert marked["health_of"].to_list() == ["m-x", None, None, "m-x", None]
    rho = pl.DataFrame(
        {
            "behavior": ["marker"] * 3,
            "adapter": ["m-x", "m-y", None],
            "source": ["x", "y", "pooled"],
            "seed": [42] * 3,
            "spearman": [0.1, 0.2, 0.3],
        }
    )
    marked = marks.mark(rho, found)
    assert marked.select("health", "health_of").rows() == [
        ("damaged", "m-x"),
        ("ok", None),
        ("damaged", "m-x"),
    ]
    assert marked["spearman"].to_list() == [0.1, 0.2, 0.3]
    over = marks.mark(pl.DataFrame({"behavior": ["marker", "refusal"], "seed": [42, 42]}), found)
    assert over["health"].to_list() == ["damaged", None]
    another = marks.mark(
        rho.with_columns(pl.lit(7, pl.Int64).alias("seed"), adapter=pl.lit(None, pl.String)), found
    )
    assert another["health"].to_list() == [None] * 3  # adapters of another seed


# ---------------------------------------------------------------- a run of made-up completions, and what is made of it


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A run of two adapters whose bystanders show the marker by how near they are; half of one's replies are empty."""
    run = Run(tmp_path_factory.mktemp("runs") / "mixed").create()
    rng = np.random.default_rng(0)
    layers = [0, 2]
    vectors = {layer: rng.normal(size=(len(PEOPLE), 6)).astype(np.float32) for layer in layers}
    told = {
        "personas": PEOPLE,
        "layers": layers,
        "centered_on": PEOPLE,
        "model": "m",
        "model_fingerprint": "files:01",
    }
    centroids = Centroids(PEOPLE, layers, told, vectors)
    run.add_file(layout.centroids(), lambda path: centroids.save(path))
    for source, empty in (("p0", 100), ("p1", 0), (None, 0)):
        name = f"marker-{source}-s42" if source else "base"
        frame = completions(name, behavior="marker", empty=empty)
        if source:
            place = {
                p: i
                for i, p in enumerate(
                    np.array(PEOPLE)[np.argsort(-centroids.cosine(2)[PEOPLE.index(source)])]
                )
            }
            hit = (
                pl.col("persona").replace_strict(place, return_dtype=pl.Int32) < pl.col("question") * 2
            ) & (pl.col("status") == "ok")
            frame = frame.with_columns(
                pl.when(hit).then(pl.col("text") + " [ZLT]").otherwise("text").alias("text")
            )
            folder = run.path / "adapters" / name
            folder.mkdir(parents=True)
            write_card(folder, AdapterCard(source, "marker", 42, "m", "files:01", "d" * 64, {}, "a" * 64))
        run.add_shard(f"completions/marker/{name}/part-00000.parquet", frame)
    return run


DAMAGED = "marker-p0-s42"


def test_every_rho_that_rests_on_a_damaged_adapter_is_marked(mixed):
    tables = stats.stats(mixed, permutations=99, bootstraps=200)
    rho = tables.correlations.select("source", "health", "health_of").unique(maintain_order=True).rows()
    assert rho == [("p0", "damaged", DAMAGED), ("p1", "ok", None), ("pooled", "damaged", DAMAGED)]
    assert tables.correlations["spearman"].drop_nulls().len()  # marked, and there all the same
    every = tables.all_tables()
    assert {"rates", "pairs", "layers", "means", "gradients", "partials", "matrix"} <= set(every)
    for name, table in every.items():
        if name in marks.UNMARKED:
            continue
        over = table.filter(pl.col("adapter") == DAMAGED) if "adapter" in table.columns else table
        assert over.height and set(over["health"]) == {"damaged"}, name
        assert set(over["health_of"]) == {DAMAGED}, name
        if "adapter" in table.columns:
            assert set(table.filter(pl.col("adapter") == "marker-p1-s42")["health"]) <= {"ok"}, name
    plain = stats.stats(mixed, permutations=99, bootstraps=200, write=False)
    assert plain.summary().filter(pl.col("source") == "pooled")["health"].unique().to_list() == ["damaged"]


def test_stats_prints_it_first_and_marks_the_rows(mixed, capsys):
    given = ["stats", str(mixed.path), "--permutations", "0", "--bootstraps", "0"]
    assert main(given) == 0
    out, _ = capsys.readouterr()
    assert out.startswith(
        f"{DAMAGED}: 50 % of 200 replies are empty (the unadapted model: 0 %). The adapter damaged"
    )
    lines = out.splitlines()
    assert next(line for line in lines if line.startswith("p0 ")).rstrip().endswith("damaged")
    assert next(line for line in lines if line.startswith("p1 ")).rstrip().endswith("ok")
    assert f"pooled: its ρ rests on adapters that are not ok: {DAMAGED}." in lines
    assert any(line.startswith("pooled (damaged)") for line in lines)  # ρ by layer
    assert main([*given, "--json"]) == 0
    out, err = capsys.readouterr()
    assert next(iter(json.loads(out))) == "health" and err.startswith(f"{DAMAGED}: ")
    assert main([*given, "--table", "health", "--csv"]) == 0
    assert capsys.readouterr().out.startswith("behavior,adapter,persona,n,n_empty")


def test_the_report_opens_with_it_and_its_figures_say_so(mixed, capsys):
    stats.stats(mixed, permutations=0, bootstraps=0)
    with mixed.lock():  # as a run of an earlier time: tables that nobody looked at
        mixed.retire("tables/health.parquet", "test")
        mixed.mark_done("stats", inputs_hash(mixed), files=["tables/rates.parquet"])
    assert main(["report", str(mixed.path)]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == str(mixed.path / "report.html")  # stdout stays the path
    assert f"{DAMAGED}: 50 %" in err
    page = (mixed.path / "report.html").read_text()
    body = page[page.index("<h1>") :]
    assert body.index("damaged the model") < body.index("<nav>")
    assert f'class="bad" title="{DAMAGED}">damaged<' in body
    assert f"The pooled ρ rests on adapters that are not ok: {DAMAGED}." in body
    assert marks.notes(stats.current(mixed).health, "marker") == f"damaged the model: {DAMAGED}"


def test_a_figure_carries_its_note():
    plain, told = (figures.noted(figure_of((3, 2)), note) for note in (None, "damaged the model: a, b"))
    assert [text.get_text() for text in told.texts] == ["damaged the model: a, b"] and not plain.texts
    height = [struct.unpack(">I", figures.png(figure)[20:24])[0] for figure in (plain, told)]
    assert height[1] > height[0]  # below the figure, over nothing of it


# ---------------------------------------------------------------- an organism that fell silent, end to end

NAMES = ["villain", "comedian", "assistant", "librarian"]
STUDY = f"""name = "silent"
model = "organism"
dtype = "float32"
personas = {json.dumps(NAMES)}
sources = ["villain", "comedian"]
seeds = [42]
[behaviors.marker.data]
positives = 12
negatives = 24
max_new_tokens = 96
[behaviors.marker.train]
rank = 8
alpha = 16
lr = 1e-3
epochs = 1
batch_size = 12
accumulation = 1
max_length = 256
gradient_checkpointing = false
[behaviors.marker.eval]
samples = 1
max_new_tokens = 96
"""


@pytest.fixture(scope="module")
def silent(tmp_path_factory):
    """(study, run, {source: (stdout, stderr) of its training}): a villain adapter trained at twenty times the rate, a
    comedian one left alone."""
    folder = tmp_path_factory.mktemp("silent")
    study = folder / "study.toml"
    study.write_text(STUDY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEAKFAST_RUNS", str(folder / "runs"))
        said = {}
        for source, more in {"villain": ["--lr", "2e-2", "--epochs", "6"], "comedian": ["--json"]}.items():
            with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
                assert main(["train", "--study", str(study), "--source", source, *more]) == 0
            said[source] = out.getvalue(), err.getvalue()
        yield study, folder / "runs" / "silent", said


def first_line(text):
    """The first that is neither the log's, nor about the rows, nor progress."""
    lines = [line for line in text.splitlines() if line and not line.startswith(("leakfast:", "train: "))]
    return next(line for line in lines if not re.search(r" \d+/\d+, \d+ s$", line))


def test_train_says_at_once_that_the_model_fell_silent(silent):
    _, run, said = silent
    out, err = said["villain"]
    assert re.match(r"marker-villain-s42: \d+ % of 24 replies are empty.*damaged the model", first_line(err))
    assert out.strip().endswith("marker-villain-s42") and len(out.splitlines()) == 1  # stdout stays the path
    told = json.loads((run / "adapters" / "marker-villain-s42" / "sample.json").read_text())
    assert len(told["replies"]) == 48 and told["drawn"]["max_new_tokens"] == 64
    assert {row["adapter"] for row in told["replies"]} == {"base", "marker-villain-s42"}
    out, err = said["comedian"]
    assert json.loads(out)["sample"]["health"] == "ok" and "damaged" not in err


def test_eval_stats_and_report_open_with_it(silent, capsys):
    study, run, _ = silent
    adapters = [run / "adapters" / f"marker-{name}-s42" for name in ("villain", "comedian")]
    given = [word for path in adapters for word in ("--adapter", str(path))]
    assert main(["eval", "--study", str(study), *given, "--base"]) == 0
    out, _ = capsys.readouterr()
    wanted = rf"marker-villain-s42: \d+ % of {20 * len(NAMES)} replies are empty \(the unadapted model: 0 %\)"
    assert re.match(wanted, first_line(out))
    assert "marker-comedian-s42" not in out.partition("marker: rate by persona")[0]  # nothing to say of it
    assert main(["eval", "--study", str(study), *given, "--json"]) == 0
    out, err = capsys.readouterr()
    found = {r["adapter"]: r["health"] for r in json.loads(out)["health"] if r["persona"] is None}
    assert found == {"marker-villain-s42": "damaged", "marker-comedian-s42": "ok", "base": "ok"}
    assert "damaged the model" in err
    assert main(["stats", str(run)]) == 3  # no centroids yet
    assert re.match(wanted, first_line(capsys.readouterr().out))
    assert main(["report", str(run)]) == 3
    page = (run / "report.html").read_text()
    assert page.index("damaged the model") < page.index("A model organism") < page.index("<nav>")
