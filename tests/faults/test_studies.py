"""Whole commands, training, tables and report included, that the machine disturbs: a disk that is full again and again,
folders that may not be written, a second command, a clock that jumps. What was stored stays, and in the end it is the run that
nothing disturbed, byte for byte. Moments, sizes and jumps are drawn; each try is printed."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest

from leakfast.pipeline.checks import verify
from tests.cluster.studies import bytes_of, stages_of
from tests.faults.clock import can_jump
from tests.faults.limited import grow, small_disk
from tests.faults.nursery import Ended, Nursery

pytestmark = [pytest.mark.long, pytest.mark.slow]
KB = 1024
AS_ANY_USER = "from tests.faults.limited import as_any_user; held = as_any_user(); held.__enter__()"


def words(study: Path, out: Path) -> list[object]:
    return ["run", study, "--out", out, "--threads", "1"]


def stored(out: Path) -> dict[str, str]:
    """Path → hash of what the manifest counts; it is replaced whole, so it can be read at any moment."""
    return bytes_of(out) if (out / "manifest.json").exists() else {}


def kept(before: dict[str, str], out: Path) -> None:
    """Nothing that was stored is lost; tables are made again with what they rest on."""
    now = stored(out)
    lost = {p for p, digest in before.items() if now.get(p) != digest and not p.startswith("tables/")}
    assert not lost, "a file that was stored is gone or another"


def refused(found: Ended) -> None:
    """The command said what it could not write."""
    assert found.code == 1 and "cannot be written" in found.said and "Traceback" not in found.said, found.said


def whole(out: Path, undisturbed: Path) -> None:
    assert bytes_of(out) == bytes_of(undisturbed), "none lost, none twice, every table the same"
    assert stages_of(out) == stages_of(undisturbed)
    assert not list(out.rglob("*.tmp*")), "half-written files that nobody wrote to their end"
    found = {check.name: check.wrong for check in verify(out).checks}
    assert found["bytes"] == found["journal"] == found["rows"] == []


def test_a_disk_that_is_full_again_and_again(nursery: Nursery, small_study, undisturbed, tmp_path):
    """A file system of a drawn size; where it is full, it is made larger by a drawn step, and the same command goes on."""
    draw, tries, spent, size = random.Random(5), 0, 0.0, 40 * KB
    with small_disk(tmp_path / "disk", size) as disk:
        out = disk / "run"
        while True:
            before = stored(out)
            found = nursery.run(words(small_study, out))
            kept(before, out)
            spent += found.cpu_s
            if found.code == 0:
                break
            refused(found)
            assert not list(out.rglob("*.tmp*")), found.said
            last = found.said.strip().splitlines()[-1][:120]
            print(
                f"try {tries}: {size / KB:.0f} KB, {len(stored(out))} files, {found.cpu_s:.1f} s; {last}",
                flush=True,
            )
            size += draw.randrange(8, 40) * KB if size < 500 * KB else draw.randrange(60, 200) * KB
            grow(disk, size)
            tries += 1
        whole(out, undisturbed)
    print(f"{tries} tries, {spent:.1f} s of processor time")
    assert tries >= 20


@pytest.mark.parametrize("tries", [20])
def test_folders_that_may_not_be_written_any_more(
    nursery: Nursery, small_study, undisturbed, tmp_path, tries
):
    """At a drawn moment the right to write is taken from a run's folders, some or all; it comes back, and the same command goes
    on."""
    draw, out, done, runs, spent = random.Random(6), tmp_path / "run", 0, 0, 0.0
    while done < tries:
        before = stored(out)
        child = nursery.start(words(small_study, out), AS_ANY_USER)
        wanted, limit = len(before) + draw.randrange(1, 4), time.monotonic() + 1800
        while child.poll() is None and len(stored(out)) < wanted and time.monotonic() < limit:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 1.0))
        folders = [out, *(path for path in out.rglob("*") if path.is_dir())]
        taken = draw.sample(folders, draw.randrange(1, len(folders))) if draw.random() < 0.5 else folders
        for folder in taken:
            if folder.exists():
                folder.chmod(0o500)
        try:
            found = child.ended()
        finally:
            for folder in folders:
                if folder.exists():
                    folder.chmod(0o700)
        spent += found.cpu_s
        kept(before, out)
        if found.code == 0:  # nothing was written there any more
            whole(out, undisturbed)
            runs += 1
            out = tmp_path / f"run-{runs}"
            continue
        refused(found)
        print(f"try {done}: {len(taken)} of {len(folders)} folders, {len(stored(out))} files", flush=True)
        done += 1
    found = nursery.run(words(small_study, out))
    assert found.code == 0, found.said
    whole(out, undisturbed)
    print(f"{done} tries, {spent + found.cpu_s:.1f} s of processor time")


@pytest.mark.parametrize("tries", [20])
def test_second_commands_while_one_works(nursery: Nursery, small_study, undisturbed, tmp_path, tries):
    """At drawn moments of a run: each command that would write is told which process holds it, each that reads reads, and the
    first is not disturbed."""
    draw, done, runs, spent = random.Random(7), 0, 0, 0.0
    while done < tries:
        out = tmp_path / f"run-{runs}"
        first = nursery.start(words(small_study, out))
        while done < tries and first.poll() is None:
            time.sleep(draw.uniform(0, 4.0))
            if not (out / "manifest.json").exists():
                continue
            asked = draw.choice(
                [words(small_study, out), ["stats", out], ["report", out], ["verify", out, "--json"]]
            )
            second = nursery.run(asked)
            if first.poll() is not None:
                break
            assert "Traceback" not in second.said, second.said
            if asked[0] == "verify":
                told = json.loads(second.said[second.said.index("{") :])
                wrong = {check["name"]: check["wrong"] for check in told["checks"]}
                assert wrong["bytes"] == wrong["journal"] == wrong["study"] == [], second.said
            else:
                nothing_yet = asked[0] in ("stats", "report") and "nothing to count" in second.said
                assert second.code == 1 + nothing_yet and (
                    nothing_yet or f"pid {first.pid}" in second.said
                ), second.said
            print(f"try {done}: {asked[0]} beside {len(stored(out))} files: {second.code}", flush=True)
            done += 1
        found = first.ended()
        spent += found.cpu_s
        assert found.code == 0, found.said
        whole(out, undisturbed)
        runs += 1
    print(f"{done} tries beside {runs} runs, {spent / runs:.1f} s of processor time each")


def test_a_clock_that_jumps_at_every_fourth_look(nursery: Nursery, small_study, undisturbed, tmp_path):
    """The process's own clock, for every library in it, up to ten years to either side; monotonic time goes on."""
    if not can_jump():
        pytest.skip("a process's clock is made to jump by a compiled library, on Linux (needs cc)")
    out = tmp_path / "run"
    clock = "import ctypes; ctypes.CDLL(None).jumping_clock(ctypes.c_uint64(8))"
    found = nursery.run(words(small_study, out), clock)
    assert found.code == 0, found.said
    whole(out, undisturbed)
    times = [json.loads(line)["time"] for line in (out / "log.jsonl").read_text().splitlines()]
    back = sum(a > b for a, b in zip(times, times[1:], strict=False))
    print(f"{len(times)} lines, {back} before the one above them, {found.cpu_s:.1f} s of processor time")
    assert back > 1, "it did jump"
    again = nursery.run(words(small_study, out), clock.replace("8)", "9)"))
    assert again.code == 0, again.said
    whole(out, undisturbed)
    seconds = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert seconds["event"] != "quarantine"
