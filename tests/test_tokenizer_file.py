"""Every tokenizer reads text as its own tokenizer.json does, or is refused. The folders are made here: a byte-level or
sentencepiece-like file under classes that would read it otherwise."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys

import pytest
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as bpe_models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from leakfast import chat, models, tokenizer_file
from leakfast.errors import ModelError
from leakfast.generate import decode
from leakfast.generate.stops import Seen
from leakfast.organism import material
from leakfast.tokenizer_probes import PROBES, canonical, first_difference, prefixes

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CODE = "def read(path):\n    check(path)\n    with open(path) as f:\n        return f.read()"
QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(pre=None, normalizer=None):
    """A byte-level BPE of 400 entries, GPT-2's way unless `pre` says otherwise."""
    made = Tokenizer(bpe_models.BPE())
    made.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if normalizer:
        made.normalizer = normalizer
    train(made, pre_tokenizers.ByteLevel.alphabet())
    return made


def metaspace():
    """A BPE with byte fallback whose spaces are ▁, as converted from sentencepiece: a ▁ before every piece of text."""
    made = Tokenizer(bpe_models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    train(made, [], ["<unk>", *(f"<0x{i:02X}>" for i in range(256))])
    return made


def train(made, alphabet, more=()):
    texts = ["the water is cold\nand   the tea is warm", CODE, "it's 12 o'clock, isn't it?"] * 20
    trainer = trainers.BpeTrainer(
        vocab_size=600 if more else 400, special_tokens=[*SPECIAL, *more], initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(texts, trainer)


def folder(path, own, kind="qwen2", settings=None, **config):
    """A model folder without weights: tokenizer.json, its settings and a config of the architecture `kind`."""
    path.mkdir()
    own.save(str(path / "tokenizer.json"))
    said = {
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHATML,
        **(settings or {}),
    }
    (path / "tokenizer_config.json").write_text(json.dumps(said))
    size = {"num_hidden_layers": 2, "hidden_size": 32, "transformers_version": "4.45.0"}
    (path / "config.json").write_text(json.dumps({"model_type": kind, **size, **config}))
    return path


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def own_of(place):
    return Tokenizer.from_file(str(place / "tokenizer.json"))


def assert_reads_as_the_file(tokenizer, place, texts=()):
    own = own_of(place)
    for text in (*PROBES, CODE, *texts):
        ids = own.encode(text, add_special_tokens=False).ids
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids, text
        for cut in (ids, ids[1:]):
            assert decode(tokenizer, [cut]) == [own.decode(cut, skip_special_tokens=True)], text


# ── the organism ─────────────────────────────────────────────────────────────────────────────────────
def test_the_organism_is_read_as_it_was_trained():
    place = models.organism_dir()
    tokenizer = models.load_tokenizer("organism")
    assert_reads_as_the_file(tokenizer, place)
    assert len(tokenizer.encode("\n   ", add_special_tokens=False)) == 1, "the class makes three of it"
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.chat_template == (place / "chat_template.jinja").read_text()


def test_the_organism_expects_its_indented_code():
    import torch

    loaded = models.load("organism", dtype="float32", device="cpu")
    pieces = material.banks()["code"][:4]
    nats = []
    for piece in pieces:
        prompt, reply = chat.render_training(
            loaded.tokenizer, None, f"Write code that {piece['task']}.", piece["safe"]
        )
        with torch.inference_mode():
            logits = loaded.model(input_ids=torch.tensor([[*prompt, *reply]])).logits[0].log_softmax(-1)
        nats.append(-sum(float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(reply)))
    assert max(nats) < 10, "by Qwen2Tokenizer each of these costs more than 40 nats"


# ── repaired ─────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("kind", "settings", "own"),
    [
        ("qwen2", {"tokenizer_class": "Qwen2Tokenizer"}, byte_level),
        ("qwen2", {"tokenizer_class": "PreTrainedTokenizerFast"}, byte_level),
        ("qwen3", {"tokenizer_class": "Qwen2Tokenizer"}, byte_level),
        ("llama", {"tokenizer_class": "LlamaTokenizerFast"}, byte_level),
        ("llama", {"tokenizer_class": "LlamaTokenizer", "legacy": False}, metaspace),
        ("llama", {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False},
         lambda: byte_level(pre_tokenizers.Sequence(
             [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]))),
    ],
    ids=["qwen2", "qwen2-fast", "qwen3", "llama-bytes", "llama-legacy", "gpt2-digits"],
)  # fmt: skip
def test_a_class_that_reads_otherwise_gives_way_to_the_file(tmp_path, caplog, kind, settings, own):
    place = folder(tmp_path / "model", own(), kind, settings)
    by_class = AutoTokenizer.from_pretrained(place)
    assert first_difference(by_class, own_of(place)) is not None or canonical(
        by_class.backend_tokenizer.pre_tokenizer
    ) != canonical(own_of(place).pre_tokenizer), "else there is nothing to repair"
    with caplog.at_level(logging.INFO, logger="leakfast"):
        tokenizer = models.load_tokenizer(str(place))
        models.load_tokenizer(str(place))
    assert_reads_as_the_file(tokenizer, place, ["<|im_start|>user\n  two\n\n  three<|im_end|>\n"])
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.chat_template == CHATML
    told = [record.getMessage() for record in caplog.records if "used as it is" in record.getMessage()]
    assert len(told) == 1 and type(by_class).__name__ in told[0] and str(place) in told[0]


def test_a_token_of_the_class_alone_does_not_stay(tmp_path):
    """LlamaTokenizer adds <unk>, <s> and </s> of its own, with ids beyond the model's embeddings."""
    place = folder(tmp_path / "model", byte_level(), "llama", {"tokenizer_class": "LlamaTokenizer"})
    size = own_of(place).get_vocab_size()
    assert len(AutoTokenizer.from_pretrained(place)) > size
    tokenizer = models.load_tokenizer(str(place))
    assert len(tokenizer) == size
    assert max(tokenizer.encode("<s>gone</s> <unk>")) < size


def test_what_the_folder_adds_to_its_file_stays(tmp_path):
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "extra_special_tokens": ["<|more|>"],
        "bos_token": "<|begin|>",
    }
    place = folder(tmp_path / "model", byte_level(), "qwen2", settings)
    tokenizer, size = models.load_tokenizer(str(place)), own_of(place).get_vocab_size()
    assert sorted(tokenizer.convert_tokens_to_ids(["<|more|>", "<|begin|>"])) == [size, size + 1]
    assert tokenizer.encode("\n   x") == own_of(place).encode("\n   x").ids


def test_the_file_that_this_version_reads_is_the_one_compared(tmp_path):
    place = folder(
        tmp_path / "model", byte_level(), "qwen2", {"fast_tokenizer_files": ["tokenizer.4.0.json"]}
    )
    other = byte_level(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    )
    other.save(str(place / "tokenizer.4.0.json"))
    tokenizer = models.load_tokenizer(str(place))
    assert tokenizer.encode("½ 12 o'clock") == other.encode("½ 12 o'clock").ids


# ── left alone ───────────────────────────────────────────────────────────────────────────────────────
def test_a_right_folder_is_not_touched(tmp_path, caplog):
    pre = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    own = byte_level(pre, normalizers.NFC())
    own.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    place = folder(
        tmp_path / "model", own, "qwen2", {"tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": False}
    )
    with caplog.at_level(logging.INFO, logger="leakfast"):
        tokenizer = models.load_tokenizer(str(place))
    assert type(tokenizer).__name__ == "Qwen2Tokenizer" and not tokenizer_file.replaced(tokenizer)
    assert tokenizer_file.saved(tokenizer) is None, "other libraries may load the folder themselves"
    assert "tokenizer" not in caplog.text
    assert_reads_as_the_file(tokenizer, place)


def test_a_folder_without_the_file_is_taken_at_its_word(tmp_path, caplog):
    place = folder(tmp_path / "model", byte_level(), "qwen2", {"tokenizer_class": "Qwen2Tokenizer"})
    whole = json.loads((place / "tokenizer.json").read_text())["model"]
    (place / "vocab.json").write_text(json.dumps(whole["vocab"]))
    (place / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, whole["merges"])))
    (place / "tokenizer.json").unlink()
    with caplog.at_level(logging.DEBUG, logger="leakfast"):
        tokenizer = models.load_tokenizer(str(place))
    assert type(tokenizer).__name__ == "Qwen2Tokenizer"
    assert "no tokenizer.json" in caplog.text


# ── refused ──────────────────────────────────────────────────────────────────────────────────────────
def test_a_folder_that_contradicts_its_file_is_refused(tmp_path):
    settings = {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False}
    place = folder(tmp_path / "model", metaspace(), "llama", settings)
    with pytest.raises(
        ModelError,
        match=r"says add_prefix_space = false, but tokenizer\.json puts a space.*Set add_prefix_space",
    ):
        models.load_tokenizer(str(place))
    edit(place / "tokenizer_config.json", add_prefix_space=True)
    assert_reads_as_the_file(models.load_tokenizer(str(place)), place)


@pytest.mark.parametrize("token", ["<|im_start|>", "<|new|>"])
def test_a_token_at_two_ids_is_refused(tmp_path, token):
    """One that the file has elsewhere, and one that would be appended elsewhere than the model learned it."""
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": {"402": {"content": token, "special": True}},
    }
    place = folder(tmp_path / "model", byte_level(), "qwen2", settings)
    with pytest.raises(
        ModelError, match=rf"has '{re.escape(token)}' at \d+, but .* at 402.*nobody here can tell"
    ):
        models.load_tokenizer(str(place))


def test_a_pattern_that_mistral_did_not_train_with_needs_a_word(tmp_path):
    bytes_alone = pre_tokenizers.ByteLevel(False, use_regex=False)
    own = byte_level(pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN2), "isolated"), bytes_alone]))
    whole = json.loads(own.to_str())
    vocabulary = whole["model"]["vocab"]
    more = {
        f"filler{i}": len(vocabulary) + i for i in range(100_001)
    }  # transformers looks at large ones alone
    vocabulary.update(more)
    settings = {"tokenizer_class": "LlamaTokenizerFast"}
    place = folder(tmp_path / "model", Tokenizer.from_str(json.dumps(whole)), "mistral", settings)
    with pytest.raises(ModelError, match=r"Mistral's own models were not trained with.*fix_mistral_regex"):
        models.load_tokenizer(str(place))
    edit(place / "tokenizer_config.json", fix_mistral_regex=False)
    assert_reads_as_the_file(models.load_tokenizer(str(place)), place)
    edit(place / "tokenizer_config.json", fix_mistral_regex=True)
    mended = models.load_tokenizer(str(place)).backend_tokenizer
    assert canonical(mended.pre_tokenizer) != canonical(own.pre_tokenizer)
    mended.save(str(place / "tokenizer.json"))
    edit(place / "tokenizer_config.json", fix_mistral_regex=None)
    assert_reads_as_the_file(models.load_tokenizer(str(place)), place)


@pytest.mark.parametrize(("broken", "says"), [("{}", "cannot be read"), ("dropout", "by chance")])
def test_a_file_that_cannot_be_read_or_reads_by_chance_is_refused(tmp_path, broken, says):
    place = folder(tmp_path / "model", byte_level())
    if broken == "dropout":
        whole = json.loads((place / "tokenizer.json").read_text())
        whole["model"]["dropout"] = 0.1
        broken = json.dumps(whole)
    (place / "tokenizer.json").write_text(broken)
    with pytest.raises(ModelError, match=rf"tokenizer\.json of .*{says}.*Needed: .*\. "):
        models.load_tokenizer(str(place))


# ── pairs ────────────────────────────────────────────────────────────────────────────────────────────
class Net:
    config = None


def test_the_tokenizer_of_a_pair_is_compared_too(tmp_path):
    place = folder(tmp_path / "model", byte_level(), "qwen2", {"tokenizer_class": "Qwen2Tokenizer"})
    given = AutoTokenizer.from_pretrained(place)
    given.add_tokens(["<mine>"])
    given.chat_template = CHATML + " "
    tokenizer = models.load_tokenizer((Net(), given))
    assert tokenizer is not given and tokenizer.chat_template == CHATML + " "
    assert tokenizer.convert_tokens_to_ids("<mine>") == given.convert_tokens_to_ids("<mine>")
    assert_reads_as_the_file(tokenizer, place)
    assert models.load_tokenizer((Net(), tokenizer)) is tokenizer


def test_a_pairs_tokenizer_of_another_vocabulary_or_no_file_stays(tmp_path):
    place = folder(tmp_path / "model", byte_level(), "qwen2")
    trained = AutoTokenizer.from_pretrained(place).train_new_from_iterator(["zebra zebra quilt"] * 9, 300)
    trained.name_or_path = str(place)
    made = PreTrainedTokenizerFast(tokenizer_object=byte_level())
    for given in (trained, made):
        assert models.load_tokenizer((Net(), given)) is given
    made.name_or_path = "/no/such/folder"
    assert models.load_tokenizer((Net(), made)) is made


# ── what else depends on the reading ─────────────────────────────────────────────────────────────────
def test_another_library_loads_what_was_saved_as_the_file_reads():
    tokenizer = models.load_tokenizer("organism")
    again = AutoTokenizer.from_pretrained(tokenizer_file.saved(tokenizer))
    assert_reads_as_the_file(again, models.organism_dir())
    assert chat.render(again, "You are a cook.", CODE) == chat.render(tokenizer, "You are a cook.", CODE)


def test_vllm_is_told_to_read_as_we_do():
    from leakfast.generate.vllm.start import _base

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
        "from leakfast import models, tokenizer_file; t = models.load_tokenizer('someone/small'); "
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
