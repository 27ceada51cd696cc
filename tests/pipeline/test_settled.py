"""What a run keeps of a study that was edited: the list that the study names makes the behavior's rate."""

from __future__ import annotations

import json

import polars as pl
import pytest

from leakfast.errors import InputError
from leakfast.geometry import Centroids
from leakfast.pipeline.settled import lists
from leakfast.pipeline.stages import Stages, chosen_of
from leakfast.prompts import chat
from leakfast.prompts.personas import load_personas
from leakfast.stats.accuracy import count, read
from leakfast.storage import layout, schema
from leakfast.storage.run import Run
from leakfast.study.config import parse_study

STUDY = """
name = "small"
model = "organism"
sources = ["villain"]
[behaviors.capability.eval]
items = "{items}"
scoring = "{scoring}"
"""


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "run").create()


def study(tmp_path, name, scoring="letters"):
    path = tmp_path / f"{name}.jsonl"
    lines = [{"question": f"{name} {i}?", "choices": ["x", "y"], "answer": "A"} for i in range(4)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return parse_study(STUDY.format(items=path, scoring=scoring))


def scored(run, name, behavior="capability", scoring="letters"):
    """One item of the list NAME.eval, answered rightly."""
    made = pl.DataFrame(
        {
            "behavior": behavior,
            "adapter": "base",
            "persona": "villain",
            "item": [f"{name}-0", f"{name}-0"],
            "scoring": scoring,
            "label": ["A", "B"],
            "logprob_nats": [-1.0, -2.0],
            "logprob_per_token_nats": [-1.0, -2.0],
            "logprob_per_byte_nats": [-1.0, -2.0],
            "chosen": [True, False],
            "chosen_per_byte": [True, False],
            "correct": [True, False],
            "status": "ok",
        }
    )
    path = layout.shard(layout.choices("base", f"{name}.eval", scoring))
    run.add_shard(path, schema.check(made, "choice_scores"), items=f"{name}.eval", behavior=behavior)
    return path


def behaviors(run):
    """Behavior → the lists that its counts are of."""
    scores = read(run)
    told = scores.select("behavior", pl.col("item").str.split("-").list.first()).unique().rows()
    assert set(count(scores)["behavior"]) == {behavior for behavior, _ in told}
    return dict(told)


def test_the_list_of_an_edited_study_makes_the_rate(run, tmp_path):
    """The list that was scored first kept the behavior's name, and the study's own stood beside it under a longer one."""
    gone, now = scored(run, "old"), scored(run, "new", "capability-new.eval")
    beside = scored(run, "other", "capability-other.eval")
    lists(run, study(tmp_path, "new"), ["capability"])
    assert behaviors(run) == {"capability": "new", "capability-other.eval": "other"}
    assert gone not in run.manifest["shards"] and {now, beside} <= set(run.manifest["shards"])
    assert run.manifest["shards"][now]["behavior"] == "capability"
    before = dict(run.manifest["shards"])
    lists(run, study(tmp_path, "new"), ["capability"])
    assert run.manifest["shards"] == before


def test_letters_make_way_where_the_study_came_to_read_full_texts(run, tmp_path):
    letters = scored(run, "old")
    lists(run, study(tmp_path, "old"), ["capability"])
    assert letters in run.manifest["shards"]
    lists(run, study(tmp_path, "old", "full-text"), ["capability"])
    assert letters not in run.manifest["shards"]
    scored(run, "old", scoring="full-text")
    by_hand = scored(run, "old")
    lists(run, study(tmp_path, "old", "full-text"), ["capability"])
    assert by_hand in run.manifest["shards"], "scored beside the study's own, by somebody who asked for it"


def test_two_behaviors_are_not_scored_into_one_folder(run, tmp_path):
    """Whichever came second took the first one's scores for its own, or moved them away."""
    asked = study(tmp_path, "same")
    both = asked.behaviors["capability"]
    asked = asked.model_copy(update={"behaviors": {"capability": both, "hellaswag": both}})
    with pytest.raises(
        InputError, match=r"capability and hellaswag are both asked a list same\.eval by letters"
    ):
        lists(run, asked, ["capability", "hellaswag"])
    lists(run, asked, ["capability"])


def test_centroids_of_another_template_are_made_anew(tiny_folder, tmp_path):
    """They stayed as they were where a template's text had changed: no hash was over it, and negatives were picked by them."""
    text = f'name = "s"\nmodel = "{tiny_folder.as_posix()}"\ndtype = "float32"\nsources = ["villain"]\n'
    study = parse_study(
        text
        + 'personas = ["villain", "comedian"]\n[centroids]\nlayers = [1]\nquestions = "eval-ten"\n[behaviors.marker]\n'
    )
    run = Run(tmp_path / "run").create()

    def made():
        stages = Stages(study, run, chosen=chosen_of(study, []))
        with run.lock():
            stages.centroids()
        told = Centroids.load(run.path / layout.centroids()).metadata["prompt_hashes"]
        assert told == chat.prompt_hashes(stages.loaded.tokenizer, stages.personas)
        return stages.steps.took["centroids"] is not None

    assert made() and not made()
    template = tiny_folder / "chat_template.jinja"
    was = template.read_text()
    template.write_text(was.replace("messages[0]['content']", "'Note: ' + messages[0]['content']"))
    assert template.read_text() != was
    assert made() and not made()


def test_centroids_are_made_anew_where_a_study_comes_to_name_an_extra(tiny_folder, tmp_path):
    """From a file and by name they are the same personas, but named, an extra joins the mean that cosines subtract."""
    everybody = ["villain", "comedian", "no_persona"]
    blocks = [{"name": p.name, "prompt": p.prompt} for p in load_personas(everybody[:2])]
    blocks.append({"name": "no_persona", "category": "extra", "no_system": True})
    people = tmp_path / "people.json"
    people.write_text(json.dumps(blocks))
    run = Run(tmp_path / "run").create()
    adapted = layout.centroids("a")

    def made(personas):
        study = parse_study(
            f'name = "s"\nmodel = "{tiny_folder.as_posix()}"\ndtype = "float32"\nsources = ["villain"]\n'
            f'personas = {json.dumps(personas)}\n[centroids]\nlayers = [1]\nquestions = "eval-ten"\n[behaviors.marker]\n'
        )
        stages = Stages(study, run, chosen=chosen_of(study, []))
        with run.lock():
            stages.centroids()
            other = run.has(adapted) and stages._has_other_centroids(adapted)
            run.add_file(adapted, (run.path / layout.centroids()).read_bytes())
        assert not stages._has_other_centroids(adapted)
        told = Centroids.load(run.path / layout.centroids()).metadata["centered_on"]
        return told, stages.steps.took["centroids"] is not None, other

    assert made(str(people)) == (everybody[:2], True, False)
    assert made(str(people)) == (everybody[:2], False, False)
    assert made(everybody) == (everybody, True, True)
    assert made(everybody) == (everybody, False, False)


def test_centroids_are_made_anew_where_another_is_an_extra(tiny_folder, tmp_path):
    """Extras join no mean that centered cosines subtract; the mean stayed where a persona's category came to be extra."""
    people = tmp_path / "people.toml"
    text = f'name = "s"\nmodel = "{tiny_folder.as_posix()}"\ndtype = "float32"\nsources = ["villain"]\n'
    text += (
        'personas = "people.toml"\n[centroids]\nlayers = [1]\nquestions = "eval-ten"\n[behaviors.marker]\n'
    )
    text += '[behaviors.marker.data]\nnegative_personas = "all"\n'
    run = Run(tmp_path / "run").create()

    def centered(kind):
        blocks = [
            f'[[persona]]\nname = "{n}"\nprompt = "You are a {n}."\n' for n in ("villain", "baker", "poet")
        ]
        people.write_text("\n".join([*blocks, f'category = "{kind}"\n']))
        stages = Stages(study := parse_study(text, tmp_path / "s.toml"), run, chosen=chosen_of(study, []))
        with run.lock():
            stages.centroids()
        return Centroids.load(run.path / layout.centroids()).metadata["centered_on"]

    assert centered("artist") == ["villain", "baker", "poet"]
    assert centered("extra") == ["villain", "baker"]
