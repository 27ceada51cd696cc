"""Runs whose ρ is defined nowhere: the report and the command say why, and show the rates all the same."""

from __future__ import annotations

import re

import pytest
from click.testing import CliRunner
from flat_runs import PEOPLE, made

from leakfast import stats
from leakfast.cli.stats import cli
from leakfast.errors import InputError
from leakfast.figures import of_run
from leakfast.report.page import report
from leakfast.stats import power_from

SHOWN = re.compile(r"\b(?:nan|NaN|None|inf)\b|Traceback")


CASES = {
    "nobody else": ({"villain"}, PEOPLE, "rate is 0 for all 5 bystanders"),
    "everybody": (set(PEOPLE), PEOPLE, "rate is 1 for all 5 bystanders"),
    "nobody at all": (set(), PEOPLE, "rate is 0 for all 5 bystanders"),
    "two bystanders": (
        {"villain", "poet"},
        ["villain", "poet", "comedian"],
        "2 pairs with both values; at least 4",
    ),
}


@pytest.mark.parametrize(
    ("name", "base", "layers"),
    [
        ("nobody else", True, (0, 3)),
        ("nobody else", False, (3,)),
        ("everybody", True, (0, 3)),
        ("nobody at all", True, (3,)),
        ("two bystanders", False, (0, 3)),
    ],
)
def test_the_report_says_why_there_is_no_rho_and_shows_the_rates(tmp_path, name, base, layers):
    shows, people, why = CASES[name]
    run = made(tmp_path / "run", shows, people, base, layers)
    found = stats.stats(run, permutations=19, bootstraps=20)
    assert found.best_layer("marker") is None
    text = re.sub(r'src="data:[^"]*"', "", report(run, found).read_text(encoding="utf-8"))
    plain = re.sub(r"<(style|script).*?</\1>|<[^>]+>", " ", text, flags=re.DOTALL)
    assert not SHOWN.search(plain), SHOWN.search(plain)
    assert "No correlation with the base-model cosine is defined here" in plain and why in plain
    assert "There are no correlations yet" not in plain
    own = 100.0 if "villain" in shows else 0.0
    headline = text[text.index("<h3>Headline") :]
    row = headline[headline.index("<tr><td>villain") :].split("</tr>")[0]
    assert f"<td>{own:.1f}<" in row, row
    others = [p for p in people if p != "villain"]
    assert f"<td>{100 * sum(p in shows for p in others) / len(others):.1f}<" in row, row


@pytest.mark.parametrize("name", CASES)
def test_the_command_does_too(tmp_path, name):
    shows, people, why = CASES[name]
    run = made(tmp_path / "run", shows, people)
    told = CliRunner().invoke(cli, [str(run.path), "--permutations", "19", "--bootstraps", "20"])
    assert told.exit_code == 0, told.output
    assert "is defined at no layer" in told.stdout and why in told.stdout
    assert not SHOWN.search(told.stdout) and "villain" in told.stdout


@pytest.mark.parametrize("few", [1, 2, 3])
def test_pictures_of_few_personas_are_there_or_say_why_not(tmp_path, few):
    """The map of a run of fewer than four ended the run in a traceback."""
    run = made(tmp_path / "run", {"villain"}, PEOPLE[:few])
    found = stats.stats(run, permutations=0, bootstraps=0)
    drawn = list(of_run.draw(run, found, choices=of_run.Choices(order="cluster")))
    assert all((one.figure is None) == bool(one.reason) for one in drawn)
    (why,) = [one.reason for one in drawn if one.kind == "map"]
    assert re.search("at least two personas|a map needs 4", why)
    assert report(run, found).is_file()


@pytest.mark.parametrize("name", ["nobody at all", "two bystanders"])
def test_power_says_why_there_is_no_rho(tmp_path, name):
    """It asked for centroids, which were there."""
    shows, people, why = CASES[name]
    run = made(tmp_path / "run", shows, people)
    with pytest.raises(InputError, match=f"ρ of marker is defined nowhere in .*: .*{why}"):
        power_from.read(run.path)
