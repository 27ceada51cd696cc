"""The command line as a new user meets it: help, mistypes, exit codes, output that cannot do harm."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

import leakfast
from leakfast.cli import study_reference
from leakfast.cli.main import COMMANDS, group
from leakfast.inert import inert

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
HEAVY = (
    "torch",
    "transformers",
    "vllm",
    "numba",
    "polars",
    "scipy",
    "matplotlib",
    "peft",
    "numpy",
    "pydantic",
)


def run(*words: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "leakfast", *words], capture_output=True, text=True, timeout=300, **kwargs
    )


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "code",
    [
        "from leakfast.cli.main import main; assert main(['--help']) == 0",
        "from leakfast.cli.main import main; assert main(['--version']) == 0",
        "from leakfast.cli.main import main; assert main(['no-such']) == 2",
        "import leakfast",
    ],
)
def test_a_first_look_loads_nothing_heavy(code):
    done = python(f"{code}\nimport sys; print([m for m in {HEAVY!r} if m in sys.modules])")
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stdout[-500:] + done.stderr


HELPS = """
import contextlib, io, json, sys
from leakfast.cli.main import COMMANDS, main
told, before = {}, []
for name in COMMANDS:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main([name, "--help"])
    loaded = [m for m in ("torch", "transformers", "vllm") if m in sys.modules]
    told[name] = [code, said.getvalue(), [m for m in loaded if m not in before]]
    before = loaded
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def helps():
    """Command → exit code of its --help, what it says, and the model libraries that it loads, from one process."""
    done = python(HELPS)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_loads_and_shows_an_example(helps, name):
    code, said, _ = helps[name]
    assert code == 0, said
    assert f"leakfast {name}" in said
    command = importlib.import_module(COMMANDS[name][0]).cli
    inner = command.commands.items() if isinstance(command, click.Group) else [("", command)]
    for sub, one in inner:
        assert re.search(rf"Example: leakfast {name}\b.*", one.help or ""), f"{name} {sub} has no example"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_loads_no_model_library(helps, name):
    assert helps[name][2] == []


def test_an_engines_process_loads_no_model_library_before_its_engine():
    code = "import sys, leakfast.generation.vllm.serve; print([m for m in ('torch', 'transformers', 'vllm') if m in sys.modules])"
    assert python(code).stdout == "[]\n"


def test_help_lists_every_command_with_its_line():
    out = run("--help").stdout
    for name, (_, line) in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(line[:40])}", out, re.MULTILINE), name


def test_version():
    assert run("--version").stdout.strip() == f"leakfast, version {leakfast.__version__}"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["cnetroids"], 2, "Did you mean centroids?"),
        (["xyzzy"], 2, "`leakfast --help` lists them"),
        (["--no-such-option"], 2, "No such option"),
        (["personas", "lst"], 2, "lst"),
        (["personas", "show", "vilain"], 2, "Did you mean villain?"),
        (["personas", "list", "--personas", "absent.toml"], 2, "no such file"),
        (["run", "absent.toml"], 2, "absent.toml"),
        (["stats", "absent-run"], 2, "absent-run"),
        (["report", "absent-run"], 2, "absent-run"),
    ],
)
def test_mistakes_end_in_one_message_and_a_code(tmp_path, words, code, message):
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    done = run(*words, cwd=tmp_path, env=env)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == [], "nothing is half-written"


def test_personas_list_and_show():
    people = json.loads(run("personas", "list", "--json").stdout)
    assert len(people) == 113
    assert (
        json.loads(run("personas", "list", "--category", "original", "--json").stdout)[6]["name"] == "villain"
    )
    shown = run("personas", "show", "villain", "no_persona", "questions:math").stdout
    assert "villain" in shown
    assert "[no system message]" in shown
    assert run("personas", "list").stdout.count("\n") == 114


def test_personas_check_reports_the_line(tmp_path):
    file = tmp_path / "p.toml"
    file.write_text(
        '[[persona]]\nname = "a"\nprompt = "You are."\n\n[[persona]]\nname = "a"\nprompt = "You."\n'
    )
    done = run("personas", "check", "--personas", str(file))
    assert done.returncode == 2
    assert f"{file}, line 5: the name 'a' was given before" in done.stderr
    report = json.loads(run("personas", "check", "--personas", str(file), "--json").stdout)
    assert len(report["faults"]) == 1
    good = run("personas", "check")
    assert good.returncode == 0
    assert "113 personas" in good.stdout


def test_personas_check_finds_held_out_questions_in_training(tmp_path):
    file = tmp_path / "q.json"
    file.write_text('{"sets": {"train": {"questions": ["Why?", "How?"]}, "eval": {"questions": ["How?"]}}}')
    done = run("personas", "check", "--questions", str(file))
    assert done.returncode == 2
    assert "question 0 of set 'eval' is also in 'train'" in done.stderr


def test_personas_check_names_the_lines_of_a_collision(tiny_folder, tmp_path):
    file = tmp_path / "p.toml"
    file.write_text(
        '[[persona]]\nname = "tiny"\nprompt = "You are Tiny, a small model."\n\n'
        '[[persona]]\nname = "cook"\nprompt = "You are a cook."\n\n'
        '[[persona]]\nname = "nobody"\nno_system = true\n'
    )
    words = ["--personas", str(file), "--model", str(tiny_folder)]
    done = CliRunner().invoke(group, ["personas", "check", *words])
    assert done.exit_code == 0, done.output
    assert "tiny (line 1), nobody (line 9) render to the same tokens" in done.stdout
    assert "cook" not in done.stdout


COMMAND = """
import click, os, signal, sys, time
from leakfast.cli import main as m
m.COMMANDS["x"] = ("__main__", "A test command.")
@click.command()
def cli():
    {body}
sys.exit(m.main(["x"]))
"""


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        (  # a shell's background job starts with SIGINT ignored
            "signal.signal(signal.SIGINT, signal.default_int_handler); os.kill(os.getpid(), signal.SIGINT); "
            "time.sleep(10)",
            130,
            "Interrupted",
        ),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(10)", 130, "Interrupted"),
        ("sys.exit(3)", 3, ""),
        ("click.get_current_context().exit(3)", 3, ""),
        ("return 3", 3, ""),
        ("raise m.InputError('given. needed. type.')", 2, "Error: given. needed. type."),
        ("open('/no/such/file')", 1, "/no/such/file: No such file"),
        ("click.confirm('sure?', abort=True)", 130, "Interrupted"),
        ("pass", 0, ""),
    ],
)
def test_exit_codes(body, code, message):
    done = python(COMMAND.format(body=body))
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_programming_mistake_is_not_hidden():
    done = python(COMMAND.format(body="raise ValueError('our mistake')"))
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m leakfast personas list --json | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout == "[\n"


def test_flags_come_from_the_environment():
    env = {**os.environ, "LEAKFAST_PERSONAS_LIST_CATEGORY": "original"}
    assert run("personas", "list", env=env).stdout.count("\n") == 12
    assert run("personas", "list", "--category", "extra", env=env).stdout.count("\n") == 3


LINES = """
import sys, time
from leakfast.cli import progress
progress.EVERY_S = 0.2
with progress.progress_for("centroids") as p:
    for done in range(5):
        p(done, 5, "prompts")
        time.sleep(0.1)
    p(5, 5, "prompts")
"""


def test_progress_is_a_line_now_and_then():
    done = python(LINES)
    lines = done.stderr.splitlines()
    assert done.stdout == ""
    assert 2 <= len(lines) <= 4
    assert all(re.fullmatch(r"centroids: prompts \d/5, \d+ s", line) for line in lines)
    assert lines[-1].startswith("centroids: prompts 5/5")


def test_progress_is_a_bar_on_a_terminal():
    import pty

    parent, child = pty.openpty()
    done = subprocess.run([sys.executable, "-c", LINES], stderr=child, stdout=subprocess.PIPE, timeout=300)
    os.close(child)
    shown = b""
    while chunk := _read(parent):
        shown += chunk
    os.close(parent)
    assert done.stdout == b""
    assert b"centroids: prompts" in shown
    assert "━".encode() in shown


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # how Linux says that the other end is closed
        return b""


def test_quiet_progress_says_nothing():
    code = "import logging; logging.getLogger('leakfast').setLevel(logging.WARNING)\n" + LINES
    assert python(code).stderr == ""


@given(st.text(max_size=40))
def test_inert_text_moves_no_cursor(text):
    out = inert(text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", out)
    out.encode()  # lone surrogates are gone
    if text.isascii() and text.isprintable():
        assert out == text


def test_inert_text_shows_what_was_there():
    assert (
        inert("\x1b[2J[ZLT]\ttab\nline\r\u202eevil\ud800")
        == "\\x1b[2J[ZLT]\ttab\nline\\x0d\\u202eevil\\ud800"
    )


def test_json_has_no_nan():
    code = (
        "from leakfast.cli.text import print_json; print_json({'a': float('nan'), 'b': [float('inf'), 1.5]})"
    )
    assert json.loads(python(code).stdout) == {"a": None, "b": [None, 1.5]}


def test_tables_print_markup_as_it_is():
    rows = [("[red]x[/red]", None), ("\x1b[1m", 2)]
    code = f"from leakfast.cli.text import print_table; print_table(['a', 'b'], {rows!r})"
    out = python(code).stdout
    assert "[red]x[/red]" in out
    assert "\\x1b[1m" in out
    assert "–" in out


def test_the_study_reference_holds_todays_keys():
    page = ROOT / "docs" / "study.md"
    assert study_reference.main(["--check", str(page)]) == 0
    assert "| `accumulation` | integer ≥ 1 | `4` | passes an optimizer step. |" in page.read_text("utf-8")


def test_a_key_without_words_is_not_in_the_study_reference():
    class Told(BaseModel):
        """A table.

        one, two: some. three: more
        of it."""

        one: int
        two: int
        three: bool = True

    class Silent(Told):
        """A table. one, two: some. three: more."""

        four: str | None = None

    told = {"one": "some.", "two": "some.", "three": "more of it."}
    assert study_reference.meanings(Told) == ("A table.", told)
    with pytest.raises(ValueError, match="Silent: .* four"):
        study_reference.meanings(Silent)


def test_faces_can_be_called_and_one_is_its_package_too():
    assert all(callable(getattr(leakfast, face)) for face in leakfast.__all__ if face != "__version__")
    assert leakfast.stats is importlib.import_module("leakfast.stats")


def test_a_face_checks_its_input():
    with pytest.raises(leakfast.errors.InputError, match="absent-run"):
        leakfast.stats("absent-run")
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        leakfast.absent  # noqa: B018
    assert {"centroids", "generate", "run", "stats"} <= set(dir(leakfast))


def test_group_knows_only_listed_commands():
    context = click.Context(group)
    assert group.list_commands(context) == list(COMMANDS)
    assert group.get_command(context, "absent") is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["eval", "--base", "--personas", ""], "none were named"),
        (["data", "build", "--source", "villain", "--personas", ""], "none were named"),
        (["train", "--source", "villain", "--personas", ""], "none were named"),
        (["eval", "--base", "--questions", ""], "question set ''"),
        (["eval", "--base", "--questions", " , "], "question set"),
        (["data", "build", "--source", "villain", "--questions", ""], "question set ''"),
    ],
)
def test_an_empty_shell_variable_is_not_taken_for_the_default(words, said, tmp_path, monkeypatch):
    """Were it taken, these would go on to load the model."""
    from leakfast import models

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    done = CliRunner().invoke(group, [*words, "--behavior", "marker", "--model", "organism"])
    assert done.exit_code == 2 and said in done.output
    assert list(tmp_path.iterdir()) == []
