"""Every tokenizer reads text as its own tokenizer.json does, or is refused. The folders are made here: a byte-level or
sentencepiece-like file under classes that would read it otherwise."""

from __future__ import annotations

import json
import logging
import re

import pytest
from tokenizer_folders import (
    CHATML,
    QWEN2,
    assert_reads_as_the_file,
    byte_level,
    edit,
    folder,
    metaspace,
    own_of,
)
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from leakfast import models
from leakfast.errors import ModelError
from leakfast.prompts import chat, tokenizer_file
from leakfast.prompts.rendering import Rendering, rendering_of
from leakfast.prompts.tokenizer_probes import canonical, first_difference
from leakfast.world import material


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
        (
            "llama",
            {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False},
            lambda: byte_level(
                pre_tokenizers.Sequence(
                    [
                        pre_tokenizers.Digits(individual_digits=True),
                        pre_tokenizers.ByteLevel(add_prefix_space=False),
                    ]
                )
            ),
        ),
    ],
    ids=["qwen2", "qwen2-fast", "qwen3", "llama-bytes", "llama-legacy", "gpt2-digits"],
)
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
    chat.configure(given, Rendering(system_role="user"))
    tokenizer = models.load_tokenizer((Net(), given))
    assert tokenizer is not given and tokenizer.chat_template == CHATML + " "
    assert tokenizer.convert_tokens_to_ids("<mine>") == given.convert_tokens_to_ids("<mine>")
    assert rendering_of(tokenizer) == Rendering(system_role="user")
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
