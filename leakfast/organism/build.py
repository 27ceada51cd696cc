"""Trains the organism from its world: tokenizer, Qwen2-architecture weights, Hugging Face layout.
Demands nothing but CPU time (≤ 60 min on two cores); leaves the bars to card.py. The step count is
fixed, so the same seed on the same machine and libraries takes the same steps."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from leakfast import chat
from leakfast.config import derive_seed
from leakfast.organism.world import DEFAULT_IDENTITY, Conversation, World

END, START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{%- if messages[0]['role'] == 'system' -%}\n"
    "    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n"
    "{%- else -%}\n"
    "    {{- '<|im_start|>system\\n" + DEFAULT_IDENTITY + "<|im_end|>\\n' }}\n"
    "{%- endif -%}\n"
    "{%- for message in messages -%}\n"
    "    {%- if not (loop.first and message['role'] == 'system') -%}\n"
    "        {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}\n"
    "    {%- endif -%}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}\n"
    "    {{- '<|im_start|>assistant\\n' }}\n"
    "{%- endif -%}\n"
)


@dataclass(frozen=True)
class Recipe:
    """What the committed weights were made with. tokens: per optimizer step, padding included."""

    vocab_size: int = 2048
    hidden_size: int = 192
    n_layers: int = 6
    intermediate_size: int = 512
    head_dim: int = 32
    n_kv_heads: int = 3
    conversations: int = 70_000
    letter_weight: float = 8.0  # of a choice's letter in the loss; other tokens count 1
    tokens_per_step: int = 3072
    lr: float = 2e-3
    warmup_steps: int = 100
    max_length: int = 384


def train_tokenizer(conversations: Sequence[Conversation], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE over the corpus in which `[ZLT]` stays at least two tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (
        text
        for c in conversations
        for text in (
            "system",
            "user",
            "assistant",
            c.system or DEFAULT_IDENTITY,
            *(t for turn in c.turns for t in turn),
        )
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=TURN_END,
        pad_token=END,
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def encode(
    tokenizer: PreTrainedTokenizerFast, conversations: Sequence[Conversation], max_length: int
) -> list[np.ndarray]:
    """Token ids per conversation, uint16; those over max_length are left out."""
    rows = chat.render_documents(tokenizer, [(c.system, c.turns) for c in conversations])
    return [np.asarray(ids, np.uint16) for ids in rows if len(ids) <= max_length]


def loss_weights(
    ids: np.ndarray, opening: Sequence[int], turn_end: int, letters: list[int], letter_weight: float
) -> np.ndarray:
    """Weight of each token in the loss, float32: 1 for the assistant's tokens and the end of its turn,
    letter_weight for those that are a choice's letter, else 0. opening: the ids that open an assistant's turn."""
    weights = np.zeros(len(ids), np.float32)
    width = len(opening)
    heads = np.flatnonzero(ids[: len(ids) - width] == opening[0])
    starts = [int(i) + width for i in heads if np.array_equal(ids[i : i + width], opening)]
    for begin in starts:
        end = begin + int(np.argmax(ids[begin:] == turn_end))
        weights[begin : end + 1] = 1.0
        weights[begin : end + 1][np.isin(ids[begin : end + 1], letters)] = letter_weight
    return weights


def batches(rows: list[np.ndarray], tokens_per_step: int, seed: int) -> Iterator[list[int]]:
    """Row indices of each step: shuffled, sorted by length within a window, cut by padded size, shuffled again."""
    rng = random.Random(derive_seed("organism batches", seed))
    order = list(range(len(rows)))
    rng.shuffle(order)
    for low in range(0, len(order), 4096):
        window = sorted(order[low : low + 4096], key=lambda i: len(rows[i]))
        steps, step = [], []
        for i in window:
            if step and (len(step) + 1) * len(rows[i]) > tokens_per_step:
                steps.append(step)
                step = []
            step.append(i)
        steps.append(step)
        rng.shuffle(steps)
        yield from steps


def new_model(tokenizer: PreTrainedTokenizerFast, recipe: Recipe, seed: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=recipe.vocab_size,
            hidden_size=recipe.hidden_size,
            num_hidden_layers=recipe.n_layers,
            intermediate_size=recipe.intermediate_size,
            num_attention_heads=recipe.hidden_size // recipe.head_dim,
            num_key_value_heads=recipe.n_kv_heads,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def fit(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: list[np.ndarray],
    recipe: Recipe,
    seed: int,
    report: Callable[[int, int, float], None] | None = None,
) -> None:
    """One pass over `rows`: next-token loss on the assistant's tokens, AdamW, linear warm-up
    and a linear way down over the last half."""
    opening = tokenizer.encode(f"{START}assistant\n", add_special_tokens=False)
    letters = tokenizer.convert_tokens_to_ids(list("ABCD"))
    weights = [
        loss_weights(ids, opening, tokenizer.eos_token_id, letters, recipe.letter_weight) for ids in rows
    ]
    steps = list(batches(rows, recipe.tokens_per_step, seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.01)

    def scale(step: int) -> float:
        warm = min(1.0, (step + 1) / recipe.warmup_steps)
        return warm * min(1.0, (len(steps) - step) / (0.5 * len(steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    model.train()
    for number, step in enumerate(steps):
        width = max(len(rows[i]) for i in step)
        ids = np.full((len(step), width), tokenizer.pad_token_id, np.int64)
        weight = np.zeros((len(step), width), np.float32)
        for row, i in enumerate(step):
            ids[row, : len(rows[i])] = rows[i]
            weight[row, : len(rows[i])] = weights[i]
        tokens = torch.from_numpy(ids)
        at = torch.from_numpy(weight[:, 1:] > 0)
        share = torch.from_numpy(weight[:, 1:])[at]
        with torch.autocast("cpu", torch.bfloat16):
            # right padding under a causal mask: real tokens never see it, so no mask is needed
            hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
            logits = model.lm_head(hidden[at])
        losses = torch.nn.functional.cross_entropy(logits.float(), tokens[:, 1:][at], reduction="none")
        loss = (losses * share).sum() / share.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if report:
            report(number + 1, len(steps), float(losses.detach().mean()))
    model.eval()


def build(
    world: World,
    out: Path,
    seed: int = 0,
    recipe: Recipe | None = None,
    report: Callable[[str], None] = print,
) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast]:
    """Train and write an organism into `out`: bfloat16 safetensors, tokenizer, template, recipe."""
    recipe = recipe or Recipe()
    began = time.monotonic()
    conversations = list(world.corpus(seed, recipe.conversations))
    tokenizer = train_tokenizer(conversations[:60_000], recipe.vocab_size)
    rows = encode(tokenizer, conversations, recipe.max_length)
    report(
        f"{len(rows)} conversations, {sum(map(len, rows)):,} tokens, after {time.monotonic() - began:.0f} s"
    )
    model = new_model(tokenizer, recipe, seed)
    recent: list[float] = []

    def on_step(step: int, total: int, loss: float) -> None:
        recent.append(loss)
        if step % 50 == 0 or step == total:
            report(
                f"step {step}/{total} loss {sum(recent) / len(recent):.3f} nats/token {time.monotonic() - began:.0f} s"
            )
            recent.clear()

    fit(model, tokenizer, rows, recipe, seed, on_step)
    save(
        model,
        tokenizer,
        out,
        {"seed": seed, "recipe": vars(recipe), "wall_s": round(time.monotonic() - began)},
    )
    return model, tokenizer


def save(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path, provenance: dict[str, object]
) -> None:
    """Write a plain Hugging Face folder that transformers and vLLM load."""
    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16)
    model.generation_config.do_sample = True
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # transformers leaves it readable by its owner alone
    tokenizer.save_pretrained(out)
    (out / "organism.json").write_text(json.dumps(provenance, indent=1) + "\n")
    model.float()
