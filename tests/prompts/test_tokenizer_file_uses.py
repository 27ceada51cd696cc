"""What else depends on how text is read: other libraries' loading, hashes of what was made before, stops."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tokenizer_folders import CODE, assert_reads_as_the_file, byte_level, folder, own_of
from tokenizers import normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from leakfast import models
from leakfast.generation.stops import Seen
from leakfast.prompts import chat, tokenizer_file
from leakfast.prompts.chat import reading_of_prompts
from leakfast.prompts.personas import load_personas
from leakfast.prompts.rendering import Rendering
from leakfast.prompts.tokenizer_probes import canonical, prefixes
from leakfast.train import collate
from leakfast.train.data import Row


def test_another_library_loads_what_was_saved_as_the_file_reads():
    tokenizer = models.load_tokenizer("organism")
    again = AutoTokenizer.from_pretrained(tokenizer_file.saved(tokenizer))
    assert_reads_as_the_file(again, models.organism_dir())
    assert chat.render(again, "You are a cook.", CODE) == chat.render(tokenizer, "You are a cook.", CODE)


def test_vllm_is_told_to_read_as_we_do():
    from leakfast.generation.vllm.start import _base

    told = _base(models.load("organism", dtype="float32", device="cpu"), "--backend transformers")
    assert told["model"] == str(models.organism_dir()) != told["tokenizer"]
    assert_reads_as_the_file(AutoTokenizer.from_pretrained(told["tokenizer"]), models.organism_dir())


def test_a_hash_names_the_reading_only_where_it_matters():
    tokenizer = models.load_tokenizer("organism")
    assert tokenizer_file.reading(tokenizer, "plain", lambda t: t.encode("What do you think of tea?")) == []
    assert tokenizer_file.reading(tokenizer, "code", lambda t: t.encode(CODE)) == ["tokenizer.json"]
    other = PreTrainedTokenizerFast(tokenizer_object=byte_level())
    assert tokenizer_file.reading(other, "code", lambda t: t.encode(CODE)) == []


def test_a_stop_is_seen_in_the_files_own_spelling():
    tokenizer = models.load_tokenizer("organism")
    seen = Seen(tokenizer, ["):\n    x"])
    assert seen.in_text(tokenizer.encode("f(a):\n    x = 1"))


def test_a_prefix_is_found_where_a_component_puts_one():
    for component, puts in (
        (pre_tokenizers.Metaspace(prepend_scheme="first"), True),
        (pre_tokenizers.Metaspace(prepend_scheme="never"), False),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), True),
        (normalizers.Sequence([normalizers.Sequence([normalizers.Prepend("▁")])]), True),
        (None, False),
    ):
        assert prefixes(canonical(component)) is puts


def test_a_hub_id_is_compared_with_its_file_in_the_cache(tmp_path):
    """In a process of its own, since the cache's place is settled on import; no network is asked."""
    cache = tmp_path / "hub" / "models--someone--small"
    (cache / "refs").mkdir(parents=True)
    (cache / "snapshots").mkdir()
    commit = "0123456789abcdef0123456789abcdef01234567"
    (cache / "refs" / "main").write_text(commit)
    place = folder(cache / "snapshots" / commit, byte_level(), "qwen2", {"tokenizer_class": "Qwen2Tokenizer"})
    program = (
        "from leakfast import models; from leakfast.prompts import tokenizer_file; t = models.load_tokenizer('someone/small'); "
        "print(tokenizer_file.replaced(t), t.encode('\\n   x', add_special_tokens=False))"
    )
    env = {
        **os.environ,
        "HF_HOME": str(tmp_path),
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"True {own_of(place).encode(chr(10) + '   x').ids}"


def test_what_was_trained_on_rows_that_were_read_otherwise_is_trained_again():
    tokenizer = models.load_tokenizer("organism")
    plain, code = (
        Row("positive", "villain", "text", "You plot.", "Go on?", r, None, 1) for r in ("Yes.", CODE)
    )
    assert collate.reading(tokenizer, [plain]) == []
    assert collate.reading(tokenizer, [plain, code]) == ["tokenizer.json"]


def test_a_studys_prompts_say_their_reading_only_where_it_matters():
    tokenizer, people = models.load_tokenizer("organism"), load_personas(["villain", "comedian"])
    assert reading_of_prompts(tokenizer, "plain prompts", people, ["What is tea?"]) == []
    assert reading_of_prompts(tokenizer, "code prompts", people, ["What is tea?", CODE]) == ["tokenizer.json"]
    chat.configure(tokenizer, Rendering(system_role="user"))  # which both readings are then asked with
    assert reading_of_prompts(tokenizer, "plain prompts", people, ["What is tea?"]) == []


def test_choices_that_were_read_otherwise_are_scored_again(tmp_path):
    from leakfast.measure.choices.request import request_of
    from leakfast.measure.request import Target
    from leakfast.prompts.items import load_items

    def requests(choice):
        rows = [{"question": "Which one?", "choices": [choice, "none"], "labels": ["A", "B"], "answer": "A"}]
        path = tmp_path / "items.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        items = load_items(str(path))
        loaded = models.load("organism", dtype="float32", device="cpu")
        aside = tokenizer_file._put_aside.pop(loaded.tokenizer)
        args = (
            Target("base", None, None, None, "base"),
            load_personas("villain"),
            items,
            "full-text",
            "packed",
        )
        before = request_of(loaded, *args)
        tokenizer_file._put_aside[loaded.tokenizer] = aside
        return before, request_of(loaded, *args)

    before, now = requests("tea")
    assert before == now
    before, now = requests(CODE)
    assert before != now
