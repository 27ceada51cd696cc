"""Engines in processes of their own, without a model: no side waits for the other for good, one that dies costs its
works' time alone, and none outlives its parent or hears the terminal's Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import standins

from leakfast.errors import AdapterError, ModelError
from leakfast.generation.contract import Sampling
from leakfast.generation.vllm import parallel
from leakfast.generation.vllm.parallel import Parallel
from leakfast.generation.vllm.start import EngineDied

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]

# no guard of __main__: a script that asks for engines need not have one
WORDY = """
import sys, time
import standins
from leakfast.generation.generate import Sampling
from leakfast.generation.vllm import Parallel
engines = Parallel(standins.spec(seats=1024), int(sys.argv[1]), standins.Wordy)
seen = []
for work, done in engines.stream(standins.works(12, requests=256, samples=10, tokens=700), Sampling()):
    assert len(done) == 2560
    time.sleep(0.05)  # a shard is written
    seen.append(work.key)
engines.close()
print(sorted(seen) == list(range(12)))
"""

STUCK = """
import sys
import standins
from leakfast.generation.generate import Sampling
from leakfast.generation.vllm import Parallel
engines = Parallel(standins.spec(sys.argv[1]), 1, standins.Stuck)
list(engines.stream(standins.works(1), Sampling()))
"""


LEFT = """
import standins
from leakfast.generation.generate import Sampling
from leakfast.generation.vllm import Parallel
engines = Parallel(standins.spec(), 2, standins.Standin)
print(next(engines.stream(standins.works(9), Sampling()))[0].key)
"""


def script(tmp_path, text: str, *words: str) -> subprocess.Popen:
    path = tmp_path / "script.py"
    path.write_text(text)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    return subprocess.Popen(
        [sys.executable, str(path), *words],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def gone(pid: int) -> bool:
    """Whether a process that is no child of ours has ended (one that nobody has waited for counts)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.fixture
def engines():
    opened = []

    def made(n, make, name="standin", **settings):
        opened.append(Parallel(standins.spec(str(name)), n, make, **settings))
        return opened[-1]

    yield made
    for one in opened:
        one.close()


@pytest.mark.parametrize("n", ["1", "2"])
def test_works_and_replies_larger_than_the_lines_buffer_pass_each_other(tmp_path, n):
    """256 requests of 700 tokens are above 300 kB, their completions more: both sides send at once, again and again."""
    (work,) = standins.works(1, requests=256, samples=10, tokens=700)
    assert len(ForkingPickler.dumps(list(work.requests))) > 300_000
    child = script(tmp_path, WORDY, n)
    try:
        out, told = child.communicate(timeout=90)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        pytest.fail("the two sides wait for each other")
    assert child.returncode == 0 and out == "True\n", told


def test_an_engine_that_raises_as_it_dies_gives_its_works_to_the_others(engines, tmp_path, caplog):
    pair = engines(2, standins.OnceBroken, tmp_path / "broken", again=0)
    heard = []

    def finished(some, work):
        heard.extend((work.key, one.request, one.sample) for one in some)

    whole = list(pair.stream(standins.works(12, samples=20), Sampling(), finished))
    assert sorted(work.key for work, _ in whole) == list(range(12)), "none lost, none twice"
    assert all(len({(c.request, c.sample) for c in done}) == len(done) == 20 for _, done in whole)
    assert len(heard) == len(set(heard)) == 240, "what the dead one had said is not drawn again"
    assert "device-side assert" in caplog.text and "works go to whichever is there" in caplog.text
    assert len(pair.members) == 1, "it is not started again"
    again = [work.key for work, _ in pair.stream(standins.works(3), Sampling())]
    assert sorted(again) == [0, 1, 2], "the one that is left goes on"
    assert pair.described(Sampling())["data_parallel"] == 1


@pytest.mark.parametrize("n", [1, 2])
def test_an_engine_that_dies_at_work_is_started_again(engines, tmp_path, caplog, n):
    """The only one too: a run of a night is not to end at the first fault of a device."""
    heard = []

    def finished(some, work):
        heard.extend((work.key, one.request, one.sample) for one in some)

    several = engines(n, standins.OnceBroken, tmp_path / "broken")
    whole = list(several.stream(standins.works(12, samples=20), Sampling(), finished))
    assert sorted(work.key for work, _ in whole) == list(range(12))
    assert len(heard) == len(set(heard)) == 240, "nothing is drawn again"
    assert "device-side assert" in caplog.text and "it is started again" in caplog.text
    assert len(several.members) == n
    assert several.described(Sampling())["data_parallel"] == n
    assert len(list(several.stream(standins.works(3), Sampling()))) == 3, "and the next stream has it"


def test_the_end_of_a_run_waits_for_no_engine_that_is_on_its_way(engines, tmp_path):
    pair = engines(2, standins.Late, tmp_path / "late")
    began = time.monotonic()
    assert len(list(pair.stream(standins.works(12, samples=20), Sampling()))) == 12
    assert not all(member.started for member in pair.members)
    pair.close()
    assert time.monotonic() - began < 15, "starting takes 20 s, and a close half a minute"


def test_what_an_engine_told_before_it_died_is_heard(engines, tmp_path):
    """Also where the parent finds out by trying to give it work."""
    heard = []

    def finished(some, work):
        heard.extend((work.key, one.request, one.sample) for one in some)
        time.sleep(0.3)  # a shard is written, and the other engine dies meanwhile

    pair = engines(2, standins.OnceBroken, tmp_path / "broken")
    whole = list(pair.stream(standins.works(6, samples=20), Sampling(), finished))
    drawn = sum(int(path.read_text()) for path in tmp_path.glob("broken.*"))
    assert len(whole) == 6 and len(heard) == len(set(heard)) == 120
    assert drawn == 120, "nothing was drawn twice"


@pytest.mark.parametrize("n", [1, 2])
def test_an_engine_that_hangs_is_ended_and_started_again(engines, tmp_path, caplog, monkeypatch, n):
    monkeypatch.setattr(parallel, "_SILENCE_S", 4.0)  # a stand-in at work is heard every third of a second
    monkeypatch.setattr(parallel, "_TOKEN_S", 0.0)
    some = engines(n, standins.OnceHung, tmp_path / "hung")
    whole = list(some.stream(standins.works(12, samples=20), Sampling()))
    assert sorted(work.key for work, _ in whole) == list(range(12)), "none lost, none twice"
    assert all(len({(c.request, c.sample) for c in done}) == len(done) == 20 for _, done in whole)
    assert (
        caplog.text.count("said nothing for 4 s and was ended") == 1 and "it is started again" in caplog.text
    )


def test_how_long_an_engine_at_work_may_be_silent_follows_from_the_replies():
    """16 completions are told at once, which of 4 seats are four replies one after the other."""
    asked = Sampling(max_new_tokens=1000)
    assert parallel._silence_s(asked, 256) == 1800 + 2 * 1000
    assert parallel._silence_s(asked, 4) == 1800 + 4 * 2 * 1000


def test_an_engine_that_dies_before_it_has_drawn_is_not_started_again(engines, tmp_path, caplog):
    """It would die again."""
    with pytest.raises(EngineDied, match="at once"):
        list(engines(1, standins.Stillborn).stream(standins.works(2), Sampling()))
    assert "started again" not in caplog.text


def test_the_last_engine_to_die_ends_the_run_with_what_it_died_of(engines, tmp_path, caplog):
    pair = engines(2, standins.AlwaysBroken, tmp_path / "broken")
    with pytest.raises(EngineDied, match="device-side assert"):
        list(pair.stream(standins.works(40, samples=20), Sampling()))
    assert pair.members == [] and caplog.text.count("it is started again") == 6, "three times each"
    with pytest.raises(ModelError, match="device-side assert"):
        pair.described(Sampling())


def test_an_error_that_nobody_foresaw_is_told_at_once(engines):
    began = time.monotonic()
    with pytest.raises(EngineDied, match="KeyError: 'a name nobody gave'"):
        list(engines(1, standins.Surprised).stream(standins.works(2), Sampling()))
    assert time.monotonic() - began < 30, "its process goes on for a minute"


def test_what_no_engine_would_take_ends_the_run_at_once(engines, caplog):
    pair = engines(2, standins.Refusing)
    with pytest.raises(AdapterError, match="another base"):
        list(pair.stream(standins.works(4), Sampling()))
    assert len(pair.members) == 2 and "is gone" not in caplog.text


@pytest.mark.parametrize("n", [1, 2])
def test_an_engine_killed_while_idle_is_started_again(engines, n):
    """As between the behaviors of an evaluation, which asks for its description first."""
    pair = engines(n, standins.Standin)
    assert len(list(pair.stream(standins.works(9), Sampling()))) == 9
    pair.members[0].told = True
    os.kill(pair.members[0].process.pid, signal.SIGKILL)
    pair.members[0].process.join()
    assert pair.described(Sampling())["data_parallel"] == n
    assert len(list(pair.stream(standins.works(3), Sampling()))) == 3
    assert len(pair.members) == n


def test_a_script_that_ends_with_engines_at_work_ends(tmp_path):
    child = script(tmp_path, LEFT)
    try:
        out, told = child.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        pytest.fail("it waits for its engines, and they for it")
    assert child.returncode == 0 and out.strip() in ("0", "1") and "Traceback" not in told, told


def test_an_engine_is_closed_in_order_at_the_end(engines, tmp_path):
    """A tensor-parallel one has workers and shared memory to give back."""
    one = engines(1, standins.Orderly, tmp_path / "closed")
    assert not (tmp_path / "closed").exists()
    one.close()
    assert (tmp_path / "closed").exists() and one.members[0].process.exitcode == 0


def test_an_engine_is_in_a_session_of_its_own(engines):
    told = engines(1, standins.Standin).described(Sampling())
    assert told["session"] == told["pid"] != os.getpid()


def test_an_engine_in_mid_step_does_not_outlive_a_parent_that_is_killed(tmp_path):
    child = script(tmp_path, STUCK, str(tmp_path / "pid"))
    try:
        limit = time.monotonic() + 60
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert child.poll() is None and time.monotonic() < limit, child.stderr.read()
            time.sleep(0.05)
        engine = int((tmp_path / "pid").read_text())
        assert not gone(engine)
    finally:
        child.kill()
        child.wait()
    limit = time.monotonic() + 40
    while not gone(engine):
        assert time.monotonic() < limit, "the engine's process outlives its parent"
        time.sleep(0.1)
