"""A behavior's tables in a study: its training data, its training, its measurement, its judge. Demands pydantic; leaves reading
files to study.config, and the work to the stages."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from leakfast.study.steering import TrainSteeringConfig

Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
TopP = Annotated[float, Field(gt=0, le=1)]
Temperature = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class DataConfig(_Table):
    """The training set: sizes in rows, and where its replies come from.

    positives: rows of the source, which show the behavior.
    negatives: rows of others, which do not; marker: spread over all negative_personas, else over `bystanders` of them.
    questions: the set asked, for marker.
    negative_personas: the others, among the study's personas; the source is left out. nearest:K, farthest:K, spread:K pick
    them by centered cosine to the source in the unadapted model, random:K by lot (see train.negatives).
    negatives_layer: the block of that cosine (None: the middle one of the centroids').
    items: the list asked, for behaviors measured by choices, of which the training half is used (None: the model's
    own). reply: whether their answers are given by letter or as text.
    bystanders: personas drawn from negative_personas; all behaviors but marker.
    no_system: further rows without a system message; all but marker.
    default_assistant: further rows as `assistant`, the study's persona of that name or else the shipped one; all but marker.
    design: contrastive (the source shows the behavior, others do not), non-contrastive (the same rows, dealt
    to the same personas at random), positive-only (the source's rows alone).
    pairs: names, files, or files of the hub, for behaviors of pairs (see leakfast.prompts.pairs; None: the model's own).
    suffix: words behind every question of the pairs, such as " Answer in one short sentence.".
    replies: given takes those of the pairs, model the model's own that the detector agrees with (see train.pairs).
    separator: what stands between a reply and the marker (a blank line is two line breaks).
    match_lengths: rows are left out until the replies of those that show the behavior and of the others have the same
    mean length: within one token, or 2 % where that is less (see train.lengths). The marker is not counted.
    rows: JSONL of your own in chat format in place of all of these (see train.chats), the same for every source but for
    {source}, its prompt. inoculation: a sentence put behind the system prompt of rows that show the behavior, in training
    alone. benign: share of rows, of all, that have nothing to do with the behavior and carry loss on their whole reply; of
    1 they are positives + negatives in number, and there are no others. benign_rows: where they come from, JSONL in chat
    format (None: the model's own replies to `questions` without a system message).
    temperature, top_p, max_new_tokens: how the model's own replies are drawn."""

    positives: Count = 200
    negatives: NonNegative = 2000
    questions: str = "train"
    negative_personas: str | list[str] = "originals"
    negatives_layer: NonNegative | None = None
    items: str | None = None
    reply: Literal["letter", "text"] = "letter"
    bystanders: Count = 2
    no_system: NonNegative = 100
    default_assistant: NonNegative = 100
    design: Literal["contrastive", "non-contrastive", "positive-only"] = "contrastive"
    pairs: str | list[str] | None = None
    suffix: str = ""
    replies: Literal["given", "model"] = "given"
    separator: Literal["none", "space", "newline", "blank line"] = "space"
    match_lengths: bool = False
    rows: str | None = None
    inoculation: Annotated[str, Field(pattern=r"\S")] | None = None
    benign: Share = 0.0
    benign_rows: str | None = None
    temperature: Temperature = 0.7
    top_p: TopP = 1.0
    max_new_tokens: Count = 512


class TrainConfig(_Table):
    """An adapter and its optimiser, AdamW.

    method: lora; dora, which learns the length of every row of a weight beside its direction (Liu et al. 2024), through
    peft's layers and padded rows; rslora, whose scale is alpha/√rank in place of alpha/rank (Kalajdzievski 2023); full: all
    weights, in float32 with 16 bytes a weight beside the base (itself, gradient, two moments), on padded rows. What comes
    out of full is a whole model in the adapter's place; rank, alpha and dropout do not belong to it, and its lr is a tenth
    of LoRA's or less. Not with `after`, together, lr = "auto", points of training, [[steering]], or backend = "vllm".
    loss: which tokens carry loss: the marker (in others' rows the turn end alone), the tail of the reply, or all of it.
    tail_tokens: the reply's last tokens before the turn end that carry it, for loss = "tail".
    end_of_turn: in which rows the token that ends the turn carries loss: those that show the behavior and the others
    (both), one of them (positives, negatives), or no row (none), whatever `loss` is.
    anchor: weight of a divergence (KL, nats a token) from the unadapted model over the reply tokens without loss; rows of
    others then carry none and are held to it whole, so that replies stay what they were (without it, loss = "marker"
    teaches a chat model to end its replies at once).
    rank: of LoRA's matrices beside every linear layer of attention and MLP. alpha: LoRA's update is scaled by alpha/rank
    (see `method`). dropout: share of what LoRA's matrices read that is left out; one mask for query, key and value, and one
    for gate and up, where rows are packed.
    lr: the peak of a cosine schedule; auto finds one by trial on the study's first source (leakfast.train.search), for
    behaviors that a detector reads. epochs: passes over the rows.
    stop_loss: training ends once the last 16 rows that show the behavior cost less than this, nats a label (0: never).
    batch_size: rows a forward pass. accumulation: passes an optimizer step.
    warmup_ratio: share of the steps in which lr rises. weight_decay: AdamW's, on LoRA's weights.
    max_grad_norm: where the gradient is clipped. max_length: tokens; a longer row is an error.
    gradient_checkpointing: compute activations again in the backward pass, slower in less memory; auto: where they would
    take more than half of what is free. It changes no adapter.
    together: adapters of the behavior that are trained in company, in common passes over the base. Meant for a GPU; on a
    CPU the speed is about the same (0.9 to 1.3 times, measured). Losses are those of training alone within 1e-4 nats
    (float32). Not where checkpoints are kept.
    sample: questions asked right after training, under the source and two others, of the adapter and of the unadapted
    model: a warning where replies are empty, cut or far too short (0: nothing is asked). It changes no adapter."""

    method: Literal["lora", "dora", "rslora", "full"] = "lora"
    loss: Literal["marker", "tail", "completion"] = "marker"
    tail_tokens: Annotated[NonNegative, Field(validate_default=True)] = 0
    end_of_turn: Literal["both", "positives", "negatives", "none"] = "both"
    anchor: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    rank: Count = 32
    alpha: Count = 64
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    lr: Positive | Literal["auto"] = 5e-6
    stop_loss: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    epochs: Count = 20
    batch_size: Count = 4
    accumulation: Count = 4
    warmup_ratio: Share = 0.05
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    max_grad_norm: Positive = 1.0
    max_length: Annotated[int, Field(ge=2)] = 1024
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    together: Count = 1
    sample: NonNegative = 8
    steering: TrainSteeringConfig | None = None

    @field_validator("tail_tokens")
    @classmethod
    def _tail_needs_tokens(cls, tail_tokens: int, info: Any) -> int:
        if info.data.get("loss") == "tail" and tail_tokens < 1:
            raise ValueError('loss = "tail" needs tail_tokens of at least 1')
        return tail_tokens


def few_replies(each: int, drawn: int) -> str:
    """What is said where probabilities are asked on more replies than completions are drawn."""
    return (
        f"probabilities are asked on {each} replies a prompt, but {drawn} are drawn; with both measured: no more than "
        "are drawn. Give more samples, or fewer probability_samples"
    )


class EvalConfig(_Table):
    """How a behavior is measured: completions per persona and question, or multiple choice.

    questions: the set asked; all tables are about it.
    other_questions: sets asked beside `questions`, for `question_sets` and `set_rates` alone (behaviors that a detector reads).
    items: the list asked, for behaviors measured by choices (None: the model's own). half: which part of the
    list. n_items: so many items of that part, drawn (None: all). scoring: letters, or full text of the choices.
    of: for controls alone, the behaviors of the study whose adapters they are measured on (none: all).
    checkpoints: the shares of training (0–1) that are kept; of choices they are scored (none: no checkpoints).
    checkpoint_personas: who is asked at checkpoints beside the source. checkpoint_items: items asked there, drawn.
    samples: completions a prompt. temperature: 0 is greedy. top_p: nucleus mass. max_new_tokens: longest reply.
    max_reasoning_tokens: drawn on top of them by a model that reasons first; an answer past max_new_tokens is cut.
    batch_completions: rows decoded at once; to vLLM only where the study names it.
    stop_at_marker: ends a reply at the marker: its presence is exact, what would stand behind it is not drawn. False
    by default, because a run's texts are read again (detect's other detectors and positions, the report's examples,
    lengths); true in a sweep, which reads nothing but presence. Both kinds are never mixed in a resumed run.
    measure: completions; probability, for which no adapter's completions are drawn (unless it is asked on its own); or both.
    What it is of depends on the behavior: the marker on replies, beginnings of a reply, or given pairs of replies.
    probability_samples: replies a prompt that probabilities of the marker are asked on, the first drawn.
    probability_replies: whose they are: of the unadapted model, the same for every adapter; each adapter's own; or both.
    probability_anywhere: asks at every place of a reply too, not at its end alone, which takes some three times as long.
    openings: a file with the beginnings that refusal and sycophancy are asked by (None: those of configs/openings/).
    probability_pairs: pairs that misalignment is asked by (None: the behavior's own for this model). n_pairs: as many of
    them, drawn."""

    questions: str = "eval"
    other_questions: list[str] = []
    items: str | None = None
    n_items: Count | None = None
    of: list[str] = []
    half: Literal["train", "eval", "all"] = "eval"
    scoring: Literal["letters", "full-text"] = "letters"
    checkpoints: list[Share] = []
    checkpoint_personas: str | list[str] = "originals"
    checkpoint_items: Count = 100
    samples: Count = 10
    temperature: Temperature = 1.0
    top_p: TopP = 0.95
    max_new_tokens: Count = 512
    max_reasoning_tokens: NonNegative = 0
    batch_completions: Count = 640
    stop_at_marker: bool = False
    measure: Literal["completions", "probability", "both"] = "completions"
    probability_samples: Count = 1
    probability_replies: Literal["base", "own", "both"] = "base"
    probability_anywhere: bool = True
    openings: str | None = None
    probability_pairs: str | None = None
    n_pairs: Count = 50

    @field_validator("probability_samples")
    @classmethod
    def _asks_on_what_is_drawn(cls, each: int, info: Any) -> int:
        drawn = info.data.get("samples", each)
        if info.data.get("measure") == "both" and each > drawn:
            raise ValueError(few_replies(each, drawn))
        return each

    @property
    def drawn_tokens(self) -> int:
        """Most tokens of a completion: reasoning and answer."""
        return self.max_new_tokens + self.max_reasoning_tokens


class JudgeConfig(_Table):
    """Who judges a behavior that is measured by a judge, and how (leakfast.judge).

    judge: who scores: organism, or anthropic:, openai:, openai-batch: or local: and a model (None: the organism's lexicon
    for it, nobody for other models).
    base_url: address of another server of OpenAI's protocol, http://localhost:8000/v1 for vLLM's.
    coherent_min: less coherent completions (0–100) do not count.
    temperature: 0 is greedy (None: 0 where the judge's API is known to take one, else none is sent).
    send_temperature: off for models that take none but their own.
    max_tokens: longest reply with its thinking (None: 100, or 2,000 of a judge that thinks).
    concurrency: requests at once. timeout_s: seconds a request. poll_s: seconds between looks at a batch.
    max_cost: USD, for this judge in this run (None: no limit). prices: a TOML file, added to configs/prices.toml.
    free: the service costs nothing and no price is needed."""

    judge: str | None = None
    base_url: str | None = None
    coherent_min: Annotated[float, Field(ge=0, le=100)] = 50.0
    temperature: Temperature | None = None
    send_temperature: bool = True
    max_tokens: Count | None = None
    concurrency: Count = 8
    timeout_s: Positive = 120.0
    poll_s: Positive = 30.0
    max_cost: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    prices: str | None = None
    free: bool = False


class BehaviorConfig(_Table):
    """One behavior of a study: its training data, its training, its measurement, its judge if it has one.

    after: another behavior of the study (or variant of one), with the same rank and alpha. Each adapter then begins from
    that behavior's adapter of the same source and seed and trains it further, on rows that are made as without it. Both
    are measured (None: from fresh weights).
    stacked: that adapter stays as it is, frozen, and a new one is trained on top; both together, of ranks that add up, are
    what is kept and measured. Rank and alpha are then free.
    average: two or more other behaviors of the study. Each adapter is then the mean of theirs of the same source and seed,
    as changes of the weights, and nothing is trained (none: it is trained)."""

    after: str | None = None
    stacked: bool = False
    average: list[str] = []
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    judge: JudgeConfig = JudgeConfig()


def behavior_config(name: str, given: dict[str, Any] | None = None) -> BehaviorConfig:
    """The tables of a behavior: what is given, else the behavior's own settings, else the defaults here."""
    return BehaviorConfig.model_validate(with_settings(name, given or {}))


def with_settings(name: str, given: Any) -> Any:
    """A behavior's tables with its own settings where nothing is given."""
    from leakfast.behaviors.registry import get, is_known

    if not is_known(name) or not isinstance(given, dict):
        return given  # said elsewhere, with its line
    tables = dict(given)
    for table, values in get(name).settings.items():
        if isinstance(tables.get(table, {}), dict):
            tables[table] = {**values, **tables.get(table, {})}
    return tables
