"""What a frame of predictors is asked for, and the hash of it. Demands a tokenizer for the hash; runs no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from leakfast.errors import InputError
from leakfast.geometry import centered_on, parse_layers
from leakfast.measure.choices.scores import longest
from leakfast.prompts import chat
from leakfast.storage.disk import hash_of
from leakfast.study.predictors import FAMILIES

if TYPE_CHECKING:
    from leakfast.models.loading import Loaded
    from leakfast.prompts.personas import Persona
    from leakfast.study.predictors import PredictorConfig

METHOD = 2  # goes up when a predictor comes to mean something else


@dataclass(frozen=True)
class Request:
    """Personas, questions (as centroids.compute takes them), layers (as geometry.parse_layers does), and the replies that
    output is compared on: `replies` a persona and question, drawn of the unadapted model at temperature 1 and top_p 1 with
    `seed`, read as far as `reply_tokens`. center_extras: whether extras join the mean that centered cosines subtract.

    families: which of FAMILIES are made, in any order. positions, statements: what geometry is also made of (`recipes`): states
    at places of the prompt as prompts.positions names them, and differences between "I am X" and "I am not X"."""

    personas: Sequence[Persona]
    questions: Any = "eval"
    layers: Any = "all"
    reply_tokens: int = 40
    replies: int = 1
    seed: int = 42
    center_extras: bool = False
    families: Sequence[str] = FAMILIES
    positions: Sequence[str | int] = ()
    statements: bool = False

    def __post_init__(self) -> None:
        if len(self.personas) < 2:
            raise InputError(
                f"predictors: {len(self.personas)} persona asked, but a source and a bystander are needed. Add to --personas."
            )
        for name in ("reply_tokens", "replies"):
            if getattr(self, name) < 1:
                option = name.replace("_", "-")
                raise InputError(
                    f"predictors: --{option} {getattr(self, name)} given, but at least 1 is needed. Use --{option} 1."
                )

        if "geometry" not in self.families and (self.positions or self.statements):
            raise InputError(
                "predictors: positions or statements asked, but without the family geometry, which they are of. Use "
                "--families all, or leave them out."
            )

    @classmethod
    def of(cls, cfg: PredictorConfig, personas: Sequence[Persona], **more: Any) -> Request:
        """What a study's table asks of these personas; more: seed, center_extras, and what goes before the table."""
        from leakfast.prompts.personas import load_questions

        asked = {
            "questions": load_questions(cfg.questions),
            "layers": cfg.layers,
            "reply_tokens": cfg.reply_tokens,
            "replies": cfg.replies,
            "families": cfg.made,
            "positions": cfg.positions,
            "statements": cfg.statements,
        }
        return cls(personas, **{**asked, **more})

    @property
    def texts(self) -> list[str]:
        return list(getattr(self.questions, "questions", self.questions))

    def layers_of(self, loaded: Loaded) -> list[int]:
        return parse_layers(self.layers, loaded.n_layers, loaded.name)

    def centered_on(self) -> list[str]:
        return centered_on(self.personas, self.center_extras)

    def drawn_hash(self, loaded: Loaded) -> str:
        """Of everything that the replies follow from, but who draws them."""
        from leakfast.generation.transformers import further_stop_ids

        ids = [chat.ids_hash(one) for one in chat.render_grid(loaded.tokenizer, self.personas, self.texts)]
        told = chat.recorded(loaded.tokenizer)
        names = [one.name for one in self.personas]
        ends = further_stop_ids(loaded)
        return hash_of(
            loaded.fingerprint,
            loaded.dtype,
            names,
            self.texts,
            ids,
            told,
            self.reply_tokens,
            self.replies,
            self.seed,
            *([ends] if ends else []),
        )

    def hash(self, loaded: Loaded) -> str:
        """Of everything that the frame follows from."""
        people = [(one.name, one.kind, one.prompt, list(one.related_to)) for one in self.personas]
        own = [] if sorted(self.families) == sorted(FAMILIES) else [sorted(self.families)]
        own += [[list(self.positions), self.statements]] if self.positions or self.statements else []
        # earlier versions cut words at every letter beyond a to z
        own += ["words"] if not all((one.prompt or "").isascii() for one in self.personas) else []
        return hash_of(
            METHOD, self.drawn_hash(loaded), people, self.layers_of(loaded), sorted(self.centered_on()), *own
        )

    def too_long(self, loaded: Loaded) -> dict[str, str]:
        """Persona → why the model cannot be asked as it: its longest prompt and `reply_tokens` do not fit the context."""
        room, found = longest(loaded) - self.reply_tokens, {}
        grid = chat.render_grid(loaded.tokenizer, self.personas, self.texts)
        q = len(self.texts)
        for place, one in enumerate(self.personas):
            most = max(len(grid[place * q + k]) for k in range(q))
            if most > room:
                found[one.name] = (
                    f"a prompt of {most} tokens and a reply of {self.reply_tokens} do not fit the model's context"
                )
        return found
