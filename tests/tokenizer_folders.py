"""Model folders without weights, made here for tests of how tokenizers are read: a byte-level or sentencepiece-like
tokenizer.json beside settings of any class."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as bpe_models

from leakfast.generation.frames import decode
from leakfast.prompts.tokenizer_probes import PROBES

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
        vocab_size=600 if more else 400,
        special_tokens=[*SPECIAL, *more],
        initial_alphabet=alphabet,
        show_progress=False,
    )
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
