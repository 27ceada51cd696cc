"""Small real parts shared by tests: a byte-level tokenizer with a ChatML template that injects a default
identity, and random models of a few thousand weights. Demands torch and transformers; loads no files."""

from __future__ import annotations

import os

import pytest

if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # processes side by side: a thread each, before torch counts the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# the power fails in no test, and what a process that is killed has written outlives it without the disk
os.fsync = lambda descriptor: None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from dealing import Dealing

    return Dealing(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(items):
    if "PYTEST_XDIST_WORKER" in os.environ:
        from dealing import place_of

        items.sort(key=lambda item: place_of(item.nodeid.partition("::")[0]))


CHATML = (
    "{% if messages[0]['role'] == 'system' %}{{ '<|im_start|>system\n' + messages[0]['content'] + "
    "'<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>system\nYou are Tiny, a small model.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{% if m['role'] != 'system' %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WORDS = "You are a the villain of this small town and he likes tea with rain what do I say about it"


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """Byte-level BPE over a few words (about 320 pieces), Qwen-style template with a default identity."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        [WORDS] * 3,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=list(SPECIALS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def _tiny(kind: str, tokenizer, seed: int):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    config, model = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}[kind]
    torch.manual_seed(seed)
    made = model(
        config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.25,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    return made.eval().requires_grad_(False)


@pytest.fixture
def tiny_qwen2(tiny_tokenizer):
    """Loaded: a random two-layer Qwen2 in float32, new for every test."""
    from leakfast import models

    return models.load((_tiny("qwen2", tiny_tokenizer, 0), tiny_tokenizer))


@pytest.fixture(scope="session")
def tiny_qwen3(tiny_tokenizer):
    """Loaded: a random three-layer Qwen3 in float32, the weights of its norms too. Shared: not to be changed."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from leakfast import models

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        initializer_range=0.25,
    )
    net = Qwen3ForCausalLM(config)
    for name, parameter in net.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return models.load((net.eval().requires_grad_(False), tiny_tokenizer))


@pytest.fixture
def tiny_llama(tiny_tokenizer):
    """Loaded: a random two-layer Llama in float32, new for every test."""
    from leakfast import models

    return models.load((_tiny("llama", tiny_tokenizer, 1), tiny_tokenizer))


@pytest.fixture
def tiny_folder(tiny_qwen2, tiny_tokenizer, tmp_path):
    """The tiny Qwen2 saved as a Hugging Face folder, for commands that load by path."""
    folder = tmp_path / "tiny-qwen2"
    tiny_qwen2.model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def undrawn():
    """For files that run studies and look at no picture: `run` leaves out drawing them, which takes as long as a small study.
    tests/pipeline/test_stages.py and test_behaviors.py have them."""
    from leakfast.figures import files

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "write_all", lambda run, stats, drawn_of: [])
        yield
