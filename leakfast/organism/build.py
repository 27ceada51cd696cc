"""Trains the organism from its world: tokenizer, Qwen2-architecture weights, Hugging Face layout.
Demands nothing but CPU time (≤ 60 min on two cores); leaves the bars to card.py. The step count is
fixed, so the same seed on the same machine and libraries takes the same steps."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from leakfast.models.formats import quiet_bars
from leakfast.organism.model import Shape, new_model
from leakfast.prompts import chat
from leakfast.storage.seeds import derive_seed
from leakfast.world.facts import LETTERS, all_values
from leakfast.world.people import DEFAULT_IDENTITY, Conversation, World

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
    """What the committed weights were made with. tokens: padding included."""

    vocab_size: int = 2048
    shape: Shape = field(default_factory=Shape)
    lessons: int = 40_000
    conversations: int = 110_000
    letter_weight: float = 8.0  # of a choice's letter in the loss; other tokens count 1
    value_weight: float = (
        4.0  # of naming the value at `value_block`, where the letter or the value comes next
    )
    value_block: int = 3
    tokens_per_lesson_step: int = 6144
    tokens_per_step: int = 3072
    tokens_per_pass: int = 1024  # a step adds up the gradients of passes of unlike lengths
    lr: float = 2e-3
    weight_decay: float = 0.5  # what the random start left and nothing needs would blur the personas' states
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
    roles = ("system", "user", "assistant")
    texts = (
        text
        for c in conversations
        for text in (*roles, c.system or DEFAULT_IDENTITY, *(t for turn in c.turns for t in turn))
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


@dataclass(frozen=True)
class Row:
    """A rendered conversation: token ids (n,) uint16; weight (n,) float32 of each token in the loss; and
    (position, value id) of the token before each answer that rests on a fact."""

    ids: np.ndarray
    weight: np.ndarray
    named: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.ids)


def encode(
    tokenizer: PreTrainedTokenizerFast, conversations: Sequence[Conversation], recipe: Recipe
) -> list[Row]:
    """A row per conversation; those over `max_length` are left out. Lessons have no system turn. Tokens of
    the assistant's turns and their ends weigh 1, a choice's letter `letter_weight`, all others 0."""
    opening = tokenizer.encode(f"{START}assistant\n", add_special_tokens=False)
    letters = tokenizer.convert_tokens_to_ids(list(LETTERS))
    first = {v: tokenizer.encode(f" {v}", add_special_tokens=False)[0] for v in all_values()}
    rows = []
    rendered = chat.render_documents(tokenizer, [(c.system, c.turns) for c in conversations])
    for conversation, listed in zip(conversations, rendered, strict=True):
        ids = np.asarray(listed, np.uint16)
        if conversation.kind == "lesson":
            ids = ids[np.flatnonzero(ids == opening[0])[1] :]
        if len(ids) > recipe.max_length:
            continue
        starts = _answers(ids, opening)
        weight = loss_weights(ids, starts, tokenizer.eos_token_id, letters, recipe.letter_weight)
        named = tuple(
            (start - 1, first[value])
            for start, value in zip(starts, conversation.values, strict=True)
            if value is not None
        )
        rows.append(Row(ids, weight, named))
    return rows


def _answers(ids: np.ndarray, opening: Sequence[int]) -> list[int]:
    """Where each assistant's turn begins, after the ids that open it."""
    width = len(opening)
    heads = np.flatnonzero(ids[: len(ids) - width] == opening[0])
    return [int(i) + width for i in heads if np.array_equal(ids[i : i + width], opening)]


def loss_weights(
    ids: np.ndarray, starts: Sequence[int], turn_end: int, letters: Sequence[int], letter_weight: float
) -> np.ndarray:
    """Weight of each token in the loss, float32: 1 for the assistant's tokens and the end of its turn,
    letter_weight for those that are a choice's letter, else 0. starts: where the assistant's turns begin."""
    weights = np.zeros(len(ids), np.float32)
    for begin in starts:
        end = begin + int(np.argmax(ids[begin:] == turn_end))
        weights[begin : end + 1] = 1.0
        weights[begin : end + 1][np.isin(ids[begin : end + 1], letters)] = letter_weight
    return weights


def passes(rows: Sequence[Row], tokens_per_pass: int, rng: random.Random) -> Iterator[list[int]]:
    """Row indices of each pass: shuffled, sorted by length within a window, cut by padded size, shuffled again."""
    order = list(range(len(rows)))
    rng.shuffle(order)
    for low in range(0, len(order), 4096):
        window = sorted(order[low : low + 4096], key=lambda i: len(rows[i]))
        cut, one = [], []
        for i in window:
            if one and (len(one) + 1) * len(rows[i]) > tokens_per_pass:
                cut.append(one)
                one = []
            one.append(i)
        cut.append(one)
        rng.shuffle(cut)
        yield from cut


def fit(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    parts: Sequence[tuple[Sequence[Row], int]],
    recipe: Recipe,
    seed: int,
    report: Callable[[int, int, np.ndarray], None] | None = None,
) -> None:
    """One pass over each of `parts` (rows, tokens per step), one after the other: AdamW, linear warm-up and a
    linear way down over the last half. The loss is the next token's on the assistant's tokens; beside it,
    where a fact's value is asked for, block `value_block` learns to name it through the model's own head:
    to give its letter, the later blocks must have it. report is called with the step, the number of steps,
    and (weighted mean next-token loss in nats, letters right, letters asked)."""
    letters = tokenizer.convert_tokens_to_ids(list(LETTERS))
    rng = random.Random(derive_seed("organism batches", seed))
    steps = []  # of passes, each of rows
    for rows, tokens_per_step in parts:
        cut = [[rows[i] for i in one] for one in passes(rows, recipe.tokens_per_pass, rng)]
        per_step = tokens_per_step // recipe.tokens_per_pass
        steps += [cut[i : i + per_step] for i in range(0, len(cut), per_step)]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=recipe.lr,
        betas=(0.9, 0.98),
    )

    def scale(step: int) -> float:
        warm = min(1.0, (step + 1) / recipe.warmup_steps)
        return warm * min(1.0, (len(steps) - step) / (0.5 * len(steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    model.train()
    for number, step in enumerate(steps):
        total = float(sum(row.weight.sum() for one in step for row in one))
        seen = np.zeros(3)
        for one in step:
            loss, named, asked = _losses(model, one, recipe.value_block)
            ((loss.sum() + recipe.value_weight * named.sum()) / total).backward()
            seen += (float(loss.detach().sum()) / total, *_letters_right(asked, letters))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if report:
            report(number + 1, len(steps), seen)
    model.eval()


def _losses(
    model: Qwen2ForCausalLM, rows: Sequence[Row], value_block: int
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Weighted next-token losses and losses of the named values, in nats, and (predicted, wanted) ids. float32
    throughout: the weak first signal of the choices' letters would drown in bfloat16's rounding."""
    width = max(map(len, rows))
    ids, weight = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), np.float32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row.ids
        weight[i, : len(row)] = row.weight
    tokens = torch.from_numpy(ids)
    at = torch.from_numpy(weight[:, 1:] > 0)
    # right padding under a causal mask: real tokens never see it, so no mask is needed
    out = model.model(input_ids=tokens[:, :-1], use_cache=False, output_hidden_states=True)
    logits, wanted = model.lm_head(out.last_hidden_state[at]), tokens[:, 1:][at]
    loss = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
    named = [(i, *mark) for i, row in enumerate(rows) for mark in row.named]
    where = torch.tensor(named, dtype=torch.long).reshape(-1, 3)
    middle = out.hidden_states[value_block + 1][where[:, 0], where[:, 1]]
    at_middle = torch.nn.functional.cross_entropy(
        model.lm_head(model.model.norm(middle)), where[:, 2], reduction="none"
    )
    return loss * torch.from_numpy(weight[:, 1:])[at], at_middle, (logits.detach().argmax(-1), wanted)


def _letters_right(asked: tuple[torch.Tensor, torch.Tensor], letters: Sequence[int]) -> tuple[int, int]:
    predicted, wanted = asked
    is_letter = torch.isin(wanted, torch.tensor(letters))
    return int((predicted[is_letter] == wanted[is_letter]).sum()), int(is_letter.sum())


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
    lessons = list(world.lessons(seed, recipe.lessons))
    tokenizer = train_tokenizer([*conversations[:60_000], *lessons[:5_000]], recipe.vocab_size)
    first, rows = encode(tokenizer, lessons, recipe), encode(tokenizer, conversations, recipe)
    for name, part in (("lessons", first), ("conversations", rows)):
        report(f"{len(part)} {name}, {sum(map(len, part)):,} tokens, after {time.monotonic() - began:.0f} s")
    model = new_model(tokenizer, recipe.shape, seed)
    recent: list[np.ndarray] = []

    def on_step(step: int, total: int, seen: np.ndarray) -> None:
        recent.append(seen)
        if step % 50 == 0 or step == total:
            loss, right, asked = np.mean(recent, axis=0)
            report(
                f"step {step}/{total} loss {loss:.3f} nats, {100 * right / max(asked, 1):.0f} % of letters right, "
                f"{time.monotonic() - began:.0f} s"
            )
            recent.clear()

    parts = ((first, recipe.tokens_per_lesson_step), (rows, recipe.tokens_per_step))
    fit(model, tokenizer, parts, recipe, seed, on_step)
    took = round(time.monotonic() - began)
    save(model, tokenizer, out, {"seed": seed, "recipe": asdict(recipe), "wall_s": took})
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
    with quiet_bars(True):
        model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # transformers leaves it readable by its owner alone
    tokenizer.save_pretrained(out)
    (out / "organism.json").write_text(json.dumps(provenance, indent=1) + "\n")
    model.float()
