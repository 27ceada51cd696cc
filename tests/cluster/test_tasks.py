"""A study as tasks: what waits for what, how measuring is cut, and how long they take on so many workers."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from leakfast.cluster import tasks as t
from leakfast.cluster.simulate import _seconds, rates_of, simulate
from leakfast.measure.shards import Job, Shard
from leakfast.pipeline.stages import Stages, chosen_of
from leakfast.pipeline.steps import SHOWN
from leakfast.storage.run import Run
from leakfast.study.config import load_study, parse_study
from tests.cluster.studies import MATCH, written

AUTO = """
name = "auto"
model = "organism"
sources = ["villain", "comedian"]
seeds = [42, 137]
[behaviors.marker.train]
lr = "auto"
[behaviors.marker.eval]
measure = "{measure}"
"""


def tasks(study, tmp_path, workers=1):
    chosen = chosen_of(study, ())
    trained, controls = Stages(study, Run(tmp_path / "run"), chosen=chosen).sorted()
    return t.cut(t.tasks_of(study, chosen, trained, controls), workers, study)


def by_name(found):
    named = {task.name: task for task in found}
    assert len(named) == len(found), "every task has a name of its own"
    return named


def test_they_come_after_what_they_read(tmp_path):
    found = tasks(load_study(written(tmp_path)), tmp_path, workers=2)
    done = set()
    for task in found:  # an order in which one worker could do them
        assert set(task.after) <= done
        done.add(task.name)
    named = by_name(found)
    assert named["train refusal-villain-s42"].after == ("check",)
    assert "train refusal-villain-s42" in named["measure refusal refusal-villain-s42"].after
    assert "adapters/refusal-villain-s42" in named["measure hellaswag refusal-villain-s42"].needs
    both = {"train refusal-villain-s42", "train refusal-comedian-s42"}
    last = named["trajectory refusal refusal-villain-s42 refusal-comedian-s42"]
    assert both <= set(last.after)
    assert not any(path.startswith("completions/") for path in last.needs), "fewer are asked on the way"


def test_points_of_training_wait_for_ends_that_they_copy(tmp_path):
    """Where as many replies are asked of as many personas as at the end; else nothing is the same, and nothing waits."""
    study = written(tmp_path)
    text = study.read_text(encoding="utf-8").replace(
        'personas = ["assistant"]\nsamples = 2', 'personas = "all"'
    )
    found = tasks(parse_study(text, study), tmp_path, workers=2)
    last = by_name(found)["trajectory refusal refusal-villain-s42 refusal-comedian-s42"]
    ends = {"base", "refusal-villain-s42", "refusal-comedian-s42"}  # copied where they were asked the same
    assert {f"completions/refusal/{name}" for name in ends} <= set(last.needs)
    measured = {t.name for t in found if t.kind == "measure" and t.behavior == "refusal"}
    assert measured and measured <= set(last.after)
    assert not any("hellaswag" in name for name in last.after), "a control is no end"


def test_a_learning_rate_is_found_once(tmp_path):
    named = by_name(tasks(parse_study(AUTO.format(measure="completions")), tmp_path))
    first = "train marker-villain-s42"
    for name, task in named.items():
        if task.kind == "train":
            assert (first in task.after) == (name != first)
            assert {"data/marker-lr.json", "data/marker-villain-s42.jsonl"} <= set(task.needs)


def test_probabilities_alone_wait_for_the_replies_of_the_base(tmp_path):
    named = by_name(tasks(parse_study(AUTO.format(measure="probability")), tmp_path, workers=8))
    task = named["measure marker marker-villain-s137"]
    assert "measure marker base" in task.after and "completions/marker/base" in task.needs
    assert not [name for name in named if name.startswith("probability")]


def test_probabilities_beside_completions_wait_for_the_replies_and_these_for_none(tmp_path):
    """Else all workers but one wait while the base's replies are drawn."""
    found = tasks(parse_study(AUTO.format(measure="both")), tmp_path, workers=2)
    named = by_name(found)
    drawn = [task for task in found if task.kind == "measure"]
    assert len(drawn) == 5 * 2 and not [name for task in drawn for name in task.after if "measure" in name]
    assert len([task for task in found if task.kind == "probability"]) == 5
    task = named["probability marker marker-villain-s137"]
    mine, base = (f"measure marker {one}" for one in ("marker-villain-s137", "base"))
    assert set(task.after) == {"check", *(f"{name} {k}/2" for name in (mine, base) for k in (1, 2))}
    assert {f"completions/marker/{one}" for one in ("base", "marker-villain-s137")} <= set(task.needs)
    assert {"probability/marker/base", "adapters/marker-villain-s137"} <= set(task.needs)
    assert set(named["probability marker base"].after) == {"check", f"{base} 1/2", f"{base} 2/2"}


def through_training(tmp_path, measure, on_the_way, replies="base"):
    """The task that measures the marker at points of training, among few personas; measure: of the marker at the end."""
    table = f'[trajectory]\nbehaviors = ["marker"]\npersonas = "originals"\nmeasure = "{on_the_way}"\n'
    text = AUTO.format(measure=measure) + f'probability_replies = "{replies}"\n'
    study = parse_study(text.replace("[behaviors.marker.train]", f"{table}[behaviors.marker.train]"))
    return next(task for task in tasks(study, tmp_path, workers=8) if task.kind == "trajectory")


@pytest.mark.parametrize("measure", ["completions", "probability"])
def test_points_of_training_are_asked_on_the_replies_that_the_run_holds(tmp_path, measure):
    """A worker that was not lent the base's replies draws a few, for the few personas there, and they would take the place of
    the run's own."""
    task = through_training(tmp_path, measure, "probability")
    assert "completions/marker/base" in task.needs
    assert [name for name in task.after if name.startswith("measure marker base")]


@pytest.mark.parametrize(("on_the_way", "replies"), [("completions", "base"), ("both", "own")])
def test_points_of_training_wait_for_no_replies_that_nothing_is_asked_on(tmp_path, on_the_way, replies):
    task = through_training(tmp_path, "completions", on_the_way, replies)
    assert not [name for name in task.needs if name.startswith("completions/")]
    assert not [name for name in task.after if name.startswith("measure")]


@pytest.mark.parametrize(("workers", "pieces"), [(1, 1), (2, 2), (8, 7), (1000, 9)])
def test_measuring_is_cut_into_as_many_pieces_as_workers_need(tmp_path, workers, pieces):
    """Four adapters and the base: 5 tasks, 22,200 completions each, in 9 shards of 2,560."""
    found = tasks(parse_study(AUTO.format(measure="completions")), tmp_path, workers)
    measured = [task for task in found if task.kind == "measure"]
    assert len(measured) == 5 * pieces
    assert {task.portion for task in measured} == {(k, pieces) for k in range(pieces)}
    by_name(found)


def test_pieces_share_the_shards(tmp_path):
    shards = tuple(Shard(f"part-{n}", n, n + 1, 1, "", n == 4) for n in range(9))
    job = Job(None, "folder", shards, ())
    pieces = [job.portion(k, 4) for k in range(4)]
    assert sorted(s.start for piece in pieces for s in piece.shards) == list(range(9))
    assert sorted(s.start for piece in pieces for s in piece.missing) == [0, 1, 2, 3, 5, 6, 7, 8]
    assert job.portion(0, 1) == job


def journal(folder, *more):
    """The journal of a run whose rows took 0.01 s, trainings 60 s, of which rows 10, centroids 5 s, the model 2 s."""
    names = [f"marker-{source}-s{seed}" for source in ("villain", "comedian") for seed in (42, 137)]
    events = [{"event": "model", "seconds": 2.0}, {"event": "took", "step": "centroids", "seconds": 5.0}]
    events += [{"event": "took", "step": f"train {name}", "seconds": 50.0} for name in names]
    events += [{"event": "took", "step": f"data {name}", "seconds": 10.0} for name in names]
    events += [
        {
            "event": "eval",
            "behavior": "marker",
            "by": "own",
            "made": 1000,
            "kept": 5,
            "seconds": 10.0,
            "adapters": ["base"],
        }
    ]
    events += [{"event": "took", "step": "learning rate of marker", "seconds": 30.0}]
    folder.mkdir(exist_ok=True)
    run = Run(folder).create()
    for one in [*events, *more]:
        run.log(**one)
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"torn')
    return run


def test_the_time_on_workers_is_that_of_their_schedule(tmp_path):
    study, run = parse_study(AUTO.format(measure="completions")), journal(tmp_path / "timed")
    assert rates_of(run).row == {"marker": 0.01}
    alone = simulate(study, run, 1)
    work = 30 + 4 * 60 + 5 + 5 * 222
    assert alone.wall_s == pytest.approx(work + 2) and alone.efficiency == pytest.approx(1)
    two = simulate(study, run, 2)
    assert (work + 4) / 2 <= two.wall_s < (work + 4) / 2 + 130
    assert two.work_s == pytest.approx(work + 4, abs=0.1)
    most = simulate(study, run, 500)
    # learning rate and training, then another training, then a shard's share of the measuring
    assert most.critical_path_s == pytest.approx(2 + 30 + 60 + 60 + 222 / 9, abs=0.1)
    assert most.wall_s == pytest.approx(most.critical_path_s) and most.path[1] == "train marker-villain-s42"
    assert simulate(study, run, 500, shared=2.0).wall_s == pytest.approx(2 * most.wall_s)
    assert simulate(study, run, 2, usd_per_hour=3.0).usd == pytest.approx(2 * 3.0 * two.wall_s / 3600)
    assert alone.shown_s is None and "timed did not time them" in alone.shown_said
    run.log("took", step=SHOWN, seconds=12.5)
    told = simulate(study, run, 1)
    assert told.shown_s is None and "they took 12.5 s" in told.shown_said, (
        "nothing was measured there: of another size"
    )


def test_what_nobody_timed_is_named_and_gives_no_total(tmp_path):
    study, run = parse_study(AUTO.format(measure="completions")), Run(tmp_path / "timed").create()
    run.log("took", step="centroids", seconds=5.0)
    told = simulate(study, run, 2)
    assert (
        told.wall_s is None and "train marker-villain-s42" in told.untimed and "centroids" not in told.untimed
    )


def test_probabilities_are_timed_by_adapter_beside_the_rows(tmp_path):
    """Four passes over an adapter's 300 replies took 8 s; by probability alone nobody knows how many replies are drawn."""
    timed = {"event": "eval", "behavior": "marker", "by": "probability", "kept": 0, "seconds": 8.0}
    run = journal(tmp_path / "timed", timed | {"made": 1200, "adapters": ["a", "b", "c", "base"]})
    without = simulate(parse_study(AUTO.format(measure="completions")), run, 1)
    both = simulate(parse_study(AUTO.format(measure="both")), run, 1)
    assert both.wall_s == pytest.approx(without.wall_s + 5 * 2.0)
    alone = simulate(parse_study(AUTO.format(measure="probability")), run, 1)
    assert alone.wall_s is None and "measure marker base" in alone.untimed


def test_trainings_in_company_share_their_time(tmp_path):
    names = ["marker-villain-s42", "marker-comedian-s42"]
    run = Run(tmp_path / "timed").create()
    run.log("took", step=f"train {', '.join(names)} together", seconds=100.0)
    for name in names:  # entered afterwards
        run.log("took", step=f"train {name}", seconds=0.01)
        run.log("took", step=f"data {name}", seconds=10.0)
    assert rates_of(run).training == dict.fromkeys(names, 60.0)


@pytest.mark.parametrize("step", ["refusal through training", "steer refusal-villain-s42 along mean"])
def test_what_a_study_does_once_more_is_timed_by_its_own_step(tmp_path, step):
    text = written(tmp_path).read_text() + '[[steering]]\nname = "mean"\nlayers = [3]\nstrengths = [1.0]\n'
    (tmp_path / "study.toml").write_text(text)
    study, run = load_study(tmp_path / "study.toml"), Run(tmp_path / "timed").create()
    before = set(simulate(study, run, 1).untimed)
    run.log("took", step=step, seconds=7.0)
    now_timed = before - set(simulate(study, run, 1).untimed)
    kind = "trajectory" if "through" in step else "steering"
    assert now_timed and all(name.startswith(kind) for name in now_timed)


def test_sources_are_matched_each_as_soon_as_it_is_trained(tmp_path):
    study, run = load_study(written(tmp_path, more=MATCH)), Run(tmp_path / "timed").create()
    named = by_name(tasks(study, tmp_path))
    matching = {f"match refusal refusal-{source}-s42" for source in ("villain", "comedian")}
    last = named["trajectory refusal refusal-villain-s42 refusal-comedian-s42"]
    assert matching <= set(last.after) and "series" in last.needs, "what the sources said lies there"
    task = named["match refusal refusal-villain-s42"]
    assert task.after == ("check", "train refusal-villain-s42")
    wanted = {"series/choosing/refusal/refusal-villain-s42@p025", "series/chosen/refusal/refusal-villain-s42"}
    assert wanted <= set(task.needs)
    assert task.weight == (4 + 1) * 4 * 3, "four points and one anew, four questions, three replies each"
    assert _seconds(task, study, rates_of(run)) is None and task.name in simulate(study, run, 1).untimed
    run.log("eval", behavior="refusal", by="own", adapters=["base"], made=100, kept=0, seconds=50.0)
    assert _seconds(task, study, rates_of(run)) == 30.0


# ── scripts for schedulers ───────────────────────────────────────────────────────────────────────────
FAKES = {
    "scontrol": "printf 'node1\\nnode2\\n'",
    "hostname": "echo 10.0.0.7 fe80::1",
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    "ray": 'printf "%s\\n" "$@" > "$TOLD"; echo "$RAY_AUTH_MODE $RAY_AUTH_TOKEN" >> "$TOLD.token"',
}


def slurm_script(tmp_path, capsys, *words):
    from leakfast.cli.main import main

    study = written(tmp_path)
    assert main(["run", str(study), "--cluster", "slurm", "--print", *words]) in (0, None)
    return study, capsys.readouterr().out


def test_the_slurm_script_starts_ray_on_every_node_and_the_study_on_the_first(tmp_path, capsys):
    study, script = slurm_script(tmp_path, capsys, "--out", str(tmp_path / "a run"))
    job, told, fakes = tmp_path / "job", tmp_path / "told", tmp_path / "fakes"
    job.write_text(script)
    fakes.mkdir()
    for name, code in FAKES.items():
        (fakes / name).write_text(f"#!/bin/sh\n{code}\n")
        (fakes / name).chmod(0o755)
    env = {"PATH": f"{fakes}:/usr/bin:/bin", "TOLD": str(told), "SLURM_JOB_NODELIST": "node[1-2]"}
    env |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "123456"}
    env |= {"RAY_AUTH_TOKEN": "of another cluster"}
    for _ in range(2):
        done = subprocess.run(["bash", str(job)], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    modes, tokens = zip(
        *(line.split() for line in Path(f"{told}.token").read_text().splitlines()), strict=True
    )
    assert set(modes) == {"token"} and len(set(tokens)) == 2, "each job its own"
    assert all(len(bytes.fromhex(token)) == 32 and token not in job.read_text() for token in tokens)
    words = told.read_text().splitlines()
    address = f"10.0.0.7:{20000 + 123456 % 20000}"
    begin = ["symmetric-run", "--address", address, "--min-nodes", "2", "--include-dashboard=false", "--"]
    run = ["leakfast", "run", str(study), "--out", str(tmp_path / "a run"), "--cluster", address]
    assert words == begin + run


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing(tmp_path, capsys):
    (tmp_path / "job").write_text(slurm_script(tmp_path, capsys)[1])
    done = subprocess.run(["shellcheck", str(tmp_path / "job")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_kubernetes_job_is_a_rayjob_with_the_studys_command(tmp_path, capsys):
    """Its fields were held to the schema of KubeRay's RayJob (ray.io/v1, closed) by hand."""
    from leakfast.cli.main import main

    assert main(["run", str(written(tmp_path)), "--cluster", "kubernetes", "--print"]) in (0, None)
    job = json.loads(capsys.readouterr().out)
    assert (job["apiVersion"], job["kind"], job["metadata"]["name"]) == (
        "ray.io/v1",
        "RayJob",
        "leakfast-shared",
    )
    spec = job["spec"]
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert spec["entrypoint"] == "leakfast run /work/study.toml --out /work/runs/study --cluster auto"
    (workers,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--print"], "Say which: --cluster slurm"),
        (["--cluster", "slurm"], "leakfast submits nothing itself"),
    ],
)
def test_a_script_is_printed_for_a_scheduler_alone(tmp_path, capsys, words, said):
    from leakfast.cli.main import main

    assert main(["run", str(written(tmp_path)), *words]) == 2
    assert said in capsys.readouterr().err


def test_a_training_under_steering_waits_for_the_centroids(tmp_path):
    study = parse_study(
        'name = "s"\nmodel = "organism"\nsources = ["villain"]\n[behaviors.marker.train]\nlr = 1e-3\n'
        '[behaviors."marker+up".train.steering]\nlayers = [3]\n'
    )
    named = by_name(tasks(study, tmp_path))
    plain, steered = named["train marker-villain-s42"], named["train marker+up-villain-s42"]
    assert "centroids" in steered.after and "centroids" not in plain.after
    assert {"centroids/base.safetensors", "directions"} <= set(steered.needs)
