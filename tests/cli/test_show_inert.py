"""Nothing that a run holds steers the terminal: payloads in names of personas, folders and the run, in replies and prompts
come out as they were typed, in every view of `leakfast show`."""

from __future__ import annotations

import json
import re
import unicodedata

import pytest

from leakfast.cli.main import main
from tests.cli import shown_runs as made


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """A watch of a run that nobody writes ends at its first look."""
    monkeypatch.setattr("leakfast.pipeline.progress.QUIET_S", -1.0)


def shown(capsys, *words: str) -> str:
    assert main(["-q", "show", *map(str, words)]) == 0
    return capsys.readouterr().out


def told(capsys, *words: str):
    return json.loads(shown(capsys, *words, "--json"))


PAYLOADS = [
    "\x1b[2J",
    "\x1b[31mred\x1b[0m",
    "\x1b[1;1Hhome",
    "\x1b[6n",
    "\x1b[?1049h",
    "\x1b[8mhidden",
    "\x1bc",
    "\x1b]0;title\x07",
    "\x1b]0;title\x1b\\",
    "\x1b]8;;http://127.0.0.1/\x1b\\link\x1b]8;;\x1b\\",
    "\x1b]52;c;aGk=\x07",
    "\x1b]1337;File=inline=1:aGk=\x07",
    "\x1bP1$r\x1b\\",
    "\x1b_apc\x1b\\",
    "\x1b^pm\x1b\\",
    "\x1bXsos\x1b\\",
    "\x9b2J",
    "\x9d0;title\x9c",
    "\x90q\x9c",
    "\x84\x85\x88",
    "\rover",
    "a\x08\x08b",
    "\x07bell",
    "\x00nul",
    "\x0bvt\x0cff",
    "\x0eshift\x0f",
    "\x7fdel",
    "\u202eevil",
    "\u202dleft\u202c",
    "\u2066iso\u2069",
    "\u2067iso\u2068",
    "\u200emark\u200f",
    "\u061carab",
    "zero\u200bwidth",
    "join\u200d\u200cer",
    "word\u2060join\u2063",
    "\ufeffbom",
    "soft\u00adhyphen",
    "\u2028line\u2029para",
    "\ufff9anno\ufffatation\ufffb",
    "\u180evowel",
    "\U000e0041\U000e0042tags",
    "\U000e0100variation",
    "\U0001d173music\U0001d17a",
    "[red]markup[/red]",
    "[link=http://127.0.0.1/]x[/link]",
    "{{7*7}} %s %n",
    "tab\tand\nline",
]


def steers(text: str) -> list[str]:
    """Characters that draw nothing but steer, those a printer of lines needs left out."""
    return [
        c for c in text if c not in "\n\t" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp", "Cn")
    ]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A run whose personas, replies and folders are named by payloads, one each."""
    people = [f"p{i:02d}{payload}" for i, payload in enumerate(PAYLOADS)]
    adapters = tuple(f"a{i}{payload}".replace("/", "∕") for i, payload in enumerate(PAYLOADS[:2]))
    text = "".join(PAYLOADS)
    return made.make(
        tmp_path_factory.mktemp("hostile") / "run\x1b[5m\u202e",
        people,
        adapters,
        (f"{text} [ZLT]", f"{text}?"),
    ).path


def test_there_are_enough_payloads():
    assert len(PAYLOADS) >= 40 and len(set(PAYLOADS)) == len(PAYLOADS)
    assert sum(bool(steers(payload)) for payload in PAYLOADS) >= 40


@pytest.mark.parametrize("coloured", [False, True])
@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--top", "60"],
        ["--json"],
        ["--persona"],
        ["--persona", "--json"],
        ["--completions", "9"],
        ["--completions", "9", "--json"],
        ["--persona", "--completions", "2", "--no-hit"],
        ["--watch"],
        ["--watch", "--json"],
    ],
    ids=" ".join,
)
def test_no_payload_reaches_the_terminal(hostile, capsys, monkeypatch, words, coloured):
    if coloured:  # rich writes its own colours then, which are the only escapes there may be
        monkeypatch.setenv("FORCE_COLOR", "1")
    names = [f"p{i:02d}{PAYLOADS[i]}" for i in (0, 7, 16, 27, 45, 47)] if "--persona" in words else [""]
    for name in names:
        full = [word for one in words for word in ([one, name] if one == "--persona" else [one])]
        assert main(["show", str(hostile), *full]) == 0
        said = capsys.readouterr()
        out = re.sub(r"\x1b\[[0-9;]*m", "", said.out) if coloured else said.out
        assert not re.search(r"\x1b\[(?:8|31)m", said.out)
        assert steers(out) == [] == steers(said.err)
        assert "\\x1b" in out or "\\u001b" in out  # shown as it was typed


def test_payloads_in_json_read_back_as_they_were(hostile, capsys):
    found = told(capsys, hostile, "--top", "60")["behaviors"][0]["leaks"]
    names = {row["persona"] for block in found for row in block["rows"]}
    assert names == {f"p{i:02d}{payload}" for i, payload in enumerate(PAYLOADS)}


def test_names_stay_on_their_line_and_markup_is_text(hostile, capsys):
    said = shown(capsys, hostile, "--top", "60")
    assert "tab\\tand\\nline" in said
    assert "[red]markup[/red]" in said and "[link=http://127.0.0.1/]x[/link]" in said


@pytest.mark.parametrize("payload", PAYLOADS)
def test_an_error_that_names_a_payload_is_inert(hostile, capsys, payload):
    name = payload.replace("\x00", "")
    assert main(["-q", "show", str(hostile), "--completions", "--persona", f"p99{name}"]) == 2
    assert main(["-q", "show", str(hostile), "--completions", "--source", f"{name}?"]) == 2
    assert steers(capsys.readouterr().err) == []


def test_prompts_of_a_study_are_inert(tmp_path, capsys):
    run = made.make(tmp_path / "run")
    prompts = {name: f"You are {''.join(PAYLOADS)}" for name in made.PEOPLE}
    people = tmp_path / "people.json"
    people.write_text(json.dumps(prompts))
    study = f'name = "s"\nmodel = "organism"\npersonas = "{people}"\nsources = ["p00", "p01"]\n[behaviors.marker]\n'
    run.create(study)
    said = shown(capsys, run.path, "--persona", "p05")
    assert "prompt: You are \\x1b[2J" in said
    assert steers(said) == []
    assert told(capsys, run.path, "--persona", "p05")["prompt"] == prompts["p05"]
