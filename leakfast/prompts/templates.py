"""Chat templates: the only place that renders one. How it is asked (arguments, where a persona goes), how it begins an
assistant's turn against what its generation prompt writes, how it ends one. Demands a Hugging Face tokenizer; leaves
token ids to chat.py."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leakfast.errors import InputError, ModelError, WrongModelError
from leakfast.prompts import conversation
from leakfast.prompts.conversation import prefill_of
from leakfast.prompts.personas import TEMPLATE_DEFAULT
from leakfast.prompts.reasoning import PAIRS
from leakfast.prompts.rendering import Rendering, rendering_of

if TYPE_CHECKING:
    from datetime import date

log = logging.getLogger("leakfast.chat")

PINNED_DATE = (2024, 7, 26)  # templates that print today's date are given this one instead
PROBE = "Zq7 what is asked here?"
SPEAKER = "Zq7 who speaks here."
ANSWER = "Zq7 what is answered here."
_ANSWERED = {"role": "assistant", "content": ANSWER}


# ── how a reply begins and ends ──────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class Opening:
    """What stands between the generation prompt and a reply, so that the reply stands where the template puts its own.

    kind: equal, nothing does; header, the template writes more before a reply (a channel, an empty reasoning block);
    closed, the generation prompt opens a reasoning block, which is closed; space, blanks alone; longer, the generation
    prompt goes on beyond the template's own turn. cut: what is taken off the generation prompt's end, add: what is put
    there; lead: blanks that a reply itself begins with. follows: the reply then stands exactly where
    the template puts its own. after: what the template writes after a reply."""

    kind: str
    generation: str
    own: str
    cut: str = ""
    add: str = ""
    lead: str = ""
    follows: bool = True
    after: str = ""

    @property
    def said(self) -> str:
        """The difference in words, "" where there is none."""
        if self.kind == "equal":
            return ""
        told = f"its generation prompt ends in {self.generation[-40:]!r}, its own replies stand after {self.own[-40:]!r}"
        does = {
            "header": f"{self.add!r} is put before replies",
            "closed": f"the block is closed with {self.add!r} before replies",
            "space": f"replies are trained with the {self.lead!r} before them",
            "longer": "replies are trained after the generation prompt as it is",
        }[self.kind]
        return f"{told}; {does}"


_checked: weakref.WeakKeyDictionary[Any, tuple[str, Rendering, Opening]] = weakref.WeakKeyDictionary()


def check(tokenizer: Any) -> Opening:
    """Once per tokenizer, template and rendering: a system text and a user text reach the model, two renderings are
    equal, and a reply's place is the template's own. Returns that place; a difference is said in the log.

    Raises ModelError for a template that cannot be used, with the reason."""
    template, how = template_of(tokenizer), rendering_of(tokenizer)
    known = _checked.get(tokenizer)
    if known is not None and known[:2] == (template, how):
        return known[2]
    for name, _ in how.template_kwargs:
        if not re.search(rf"\b{re.escape(name)}\b", template):
            raise ModelError(
                f"chat: template_kwargs names {name}, which the chat template of {name_of(tokenizer)} never reads. "
                "Needed: a name that it does (enable_thinking in Qwen3's). Correct it, or leave it out."
            )
    text = raw_text(tokenizer, messages(tokenizer, SPEAKER, PROBE))
    if SPEAKER not in text and how.system_role == "system":
        raise refused(
            tokenizer, "it drops the system message", "a template that has a system role", roles=True
        )
    if PROBE not in text or SPEAKER not in text:
        raise refused(tokenizer, "it drops the user's message", "a template that prints a text as it is")
    if text != raw_text(tokenizer, messages(tokenizer, SPEAKER, PROBE)):
        raise refused(tokenizer, "it renders one conversation in two ways", "a template without chance in it")
    if "strftime_now" in template:
        log.warning(
            "chat: the template of %s prints today's date; it is given %s always", name_of(tokenizer), _date()
        )
    found = _opening(tokenizer, SPEAKER)
    _check_without_system(tokenizer, found)
    if found.said:
        more = ""
        if how.reasoning == "open" and found.add:
            more = '; completions begin at the generation prompt itself (reasoning = "open")'
        log.warning("chat: the template of %s: %s%s", name_of(tokenizer), found.said, more)
    _checked[tokenizer] = template, how, found
    return found


def _opening(tokenizer: Any, system: Any) -> Opening:
    """Where the template puts a reply, and what its generation prompt lacks of that."""
    asked = messages(tokenizer, system, PROBE)
    prompt, bare = (raw_text(tokenizer, asked, generation) for generation in (True, False))
    before, answered, after = raw_text(tokenizer, [*asked, _ANSWERED], False).rpartition(ANSWER)
    if not answered:
        raise refused(tokenizer, "it drops the assistant's message", "a template that prints it as it is")
    apart = (i for i, (a, b) in enumerate(zip(prompt, before, strict=False)) if a != b)
    same = next(apart, min(len(prompt), len(before)))
    mine, own = prompt[same:], before[same:]
    told = {"generation": prompt, "own": before, "after": after}
    if not mine and not own:
        return Opening("equal", **told)
    if prompt == bare and own.strip():
        raise refused(
            tokenizer,
            f"its generation prompt adds nothing, while its own replies stand after {own[-40:]!r}",
            "a template that writes the reply's header where add_generation_prompt is true",
        )
    opened = [closer for opener, closer in PAIRS if prompt.rstrip().endswith(opener)]
    if opened and opened[0] in own:
        return Opening("closed", cut=mine, **_split(own), **told)
    if opened and not own:
        line = "" if prompt.endswith("\n") else "\n"
        return Opening("closed", add=f"{line}\n{opened[0]}\n\n", follows=False, **told)
    if not mine:
        parts = _split(own)
        return Opening("header" if parts["add"] else "space", **parts, **told)
    if not own or not (mine.strip() or own.strip()):
        return Opening("longer", follows=False, **told)
    raise refused(
        tokenizer,
        f"its generation prompt ends in {mine[-40:]!r} where its own replies stand after {own[-40:]!r}",
        "a generation prompt that begins an assistant's turn as the template does",
    )


def _split(own: str) -> dict[str, str]:
    """What belongs to the prompt, and the blanks at its end that tokenizers join with the reply's first word."""
    add = own.rstrip(" \t")
    return {"add": add, "lead": own[len(add) :]}


def _check_without_system(tokenizer: Any, found: Opening) -> None:
    """A conversation without a system message begins a reply in the same way."""
    other = _opening(tokenizer, None)
    if (other.kind, other.cut, other.add, other.lead) != (found.kind, found.cut, found.add, found.lead):
        raise refused(
            tokenizer,
            f"it begins a reply otherwise where there is no system message ({other.own[-30:]!r})",
            "a template that begins every reply alike",
        )


def prompt_text(tokenizer: Any, system: Any, user: str, *, reply: bool = False) -> str:
    """The text of one prompt, up to where a completion begins; with `reply`, up to where what is trained or scored as
    the reply begins (the same unless the rendering leaves reasoning open). A question's prefill ends either (see
    conversation.Question)."""
    opening = check(tokenizer)
    text = raw_text(tokenizer, messages(tokenizer, system, user))
    begun = prefill_of(user) and reply_text(tokenizer, prefill_of(user))
    if begun and rendering_of(tokenizer).reasoning == "open":
        raise InputError(
            f'chat: a prefill ({begun[:40]!r}) given with reasoning = "open", where a reply does not begin at the prompt\'s '
            'end. Use reasoning = "closed", or a question set without a prefill.'
        )
    if not (opening.cut or opening.add) or not (reply or rendering_of(tokenizer).reasoning == "closed"):
        return text + begun
    if not text.endswith(opening.cut):
        raise refused(
            tokenizer, f"its generation prompt does not end in {opening.cut!r} every time", "one that does"
        )
    return text[: len(text) - len(opening.cut)] + opening.add + begun


def reply_text(tokenizer: Any, reply: str) -> str:
    """A reply with the white space that the template puts before it, unless it begins with some already."""
    return reply if reply[:1].isspace() else check(tokenizer).lead + reply


def turn_end_id(tokenizer: Any) -> int:
    """Id of the special token with which the template ends an assistant's turn: the first after a reply, or, where a
    last reply has nothing after it, the first of the next turn."""
    rest = check(tokenizer).after
    if not rest.strip():
        more = [*messages(tokenizer, SPEAKER, PROBE), _ANSWERED, {"role": "user", "content": PROBE}]
        rest = raw_text(tokenizer, more, False).rpartition(ANSWER)[2]
    ids = tokenizer(rest.lstrip(), add_special_tokens=False)["input_ids"]
    if not ids or ids[0] not in tokenizer.added_tokens_decoder:
        raise refused(
            tokenizer,
            f"after an assistant's reply it writes {rest[:20]!r}, which does not begin with a special token",
            "a template that ends a reply with an end-of-turn token",
        )
    return ids[0]


def default_system(tokenizer: Any) -> str | None:
    """What the template says as the system message when a conversation has none; None if it says nothing."""
    check(tokenizer)
    user = {"role": "user", "content": PROBE}
    try:
        shown = raw_text(tokenizer, [{"role": "system", "content": SPEAKER}, user])
    except ModelError:
        return None  # it has no system role, and the persona goes into the user turn
    before, _, after = shown.partition(SPEAKER)
    text = raw_text(tokenizer, [user])
    if not (text.startswith(before) and text.endswith(after)) or len(text) < len(before) + len(after):
        return None
    return text[len(before) : len(text) - len(after)]


def recorded(tokenizer: Any) -> dict[str, Any]:
    """What cards, metadata and hashes hold of how prompts are rendered beside the template's text: settings that are not
    the default, and what stands before a reply where that is not the generation prompt. Empty otherwise."""
    opening, said = check(tokenizer), rendering_of(tokenizer).described()
    changed = {name: getattr(opening, name) for name in ("cut", "add", "lead") if getattr(opening, name)}
    return {**said, **({"opening": changed} if changed else {})}


def opens_reasoning(tokenizer: Any) -> bool:
    """Whether completions begin inside a reasoning block that the prompt opened."""
    text = prompt_text(tokenizer, None, PROBE).rstrip()
    return any(text.endswith(opener) for opener, _ in PAIRS)


# ── templates of adapters ────────────────────────────────────────────────────────────────────────────
_warned: set[tuple[str, str, str]] = set()  # (adapter, model, warning): each is said once


def carries_another(tokenizer: Any, folder: str | Path, *, bare: bool = False) -> bool:
    """Whether the folder holds a chat template that renders the same conversation otherwise than the tokenizer's (bare: or a
    prompt without a system message)."""
    theirs = _carried(Path(folder))
    if theirs is None or theirs == template_of(tokenizer):
        return False
    return _renders_otherwise(tokenizer, theirs, bare=bare)


def warn_of_adapter(tokenizer: Any, folder: str | Path, card: Any = None) -> list[str]:
    """Say, once an adapter, where it was trained with another template than the one at hand, or under other settings of
    rendering; returns what was said. What the folder holds of a template is compared by what it renders."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    found = []
    theirs = _carried(Path(folder))
    if carries_another(tokenizer, folder):
        found.append(
            "carries another chat template than the model's, which renders the same conversation otherwise; the "
            "model's is used. If it was trained with its own, put that beside the model's tokenizer"
        )
    said = ((card.recipe if card is not None else None) or {}).get("rendering")
    if said is not None:
        mine = rendering_of(tokenizer).described()
        for name in ("template_kwargs", "system_role"):
            if said.get(name) != mine.get(name):
                found.append(
                    f"was trained with {name} {said.get(name) or 'at its default'}, but is measured with "
                    f"{mine.get(name) or 'the default'}. Give --{name.replace('_', '-')} as in training"
                )
        if "template" in said and said["template"] != template_hash(tokenizer) and theirs is None:
            found.append("was trained with another chat template than the model has now")
    for words in found:
        key = (str(Path(folder).resolve()), name_of(tokenizer), words)
        if key not in _warned:
            _warned.add(key)
            log.warning("adapter: %s %s", folder, words)
    return found


def _carried(folder: Path) -> str | None:
    """The chat template that an adapter's folder holds, None without one."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    try:
        told = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    except ValueError:
        return None
    template = told.get("chat_template") if isinstance(told, dict) else None
    return template if isinstance(template, str) else None


def _renders_otherwise(tokenizer: Any, template: str, *, bare: bool = False) -> bool:
    """Whether another template renders a prompt or a conversation to another text (bare: a prompt without a system message
    too); one that fails does."""
    asked = messages(tokenizer, SPEAKER, PROBE)
    texts = [(asked, True), ([*asked, _ANSWERED], False)]
    for some, generation in [*texts, *([(messages(tokenizer, None, PROBE), True)] if bare else [])]:
        try:
            if raw_text(tokenizer, some, generation) != raw_text(tokenizer, some, generation, template):
                return True
        except ModelError:
            return True
    return False


# ── rendering ────────────────────────────────────────────────────────────────────────────────────────
def messages(tokenizer: Any, system: Any, user: str) -> list[dict[str, str]]:
    """System and user message of one prompt, the turns before it between them, by the tokenizer's rendering. Raises
    ValueError for empty texts."""
    if not user.strip():
        raise ValueError("a prompt needs a user text that is not empty")
    if system is None or system is TEMPLATE_DEFAULT:
        return conversation.messages(None, user)
    if not isinstance(system, str) or not system.strip():
        raise ValueError(f"system must be a text, None or TEMPLATE_DEFAULT, not {system!r}")
    return conversation.messages(system, user, rendering_of(tokenizer).system_role)


def raw_text(
    tokenizer: Any, some: list[dict[str, str]], generation_prompt: bool = True, template: str | None = None
) -> str:
    """What the template makes of messages, as it is. template: another one's text. Raises ModelError."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            some,
            tokenize=False,
            add_generation_prompt=generation_prompt,
            strftime_now=_pinned_date,
            chat_template=template,
            **dict(rendering_of(tokenizer).template_kwargs),
        )
    except TemplateError as error:
        roles = " → ".join(message["role"] for message in some)
        raise refused(
            tokenizer,
            f"it refuses the roles {roles}: {error}",
            "a template that takes a system message",
            roles=some[0]["role"] == "system",
        ) from error


def template_of(tokenizer: Any) -> str:
    """The chat template's text. Raises WrongModelError where there is none."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise WrongModelError(
            f"chat: the tokenizer of {name_of(tokenizer)} has no chat template, but leakfast talks to chat "
            "models. Use its instruction-tuned version, or save a chat_template.jinja beside the tokenizer."
        )
    return tokenizer.get_chat_template()


def template_hash(tokenizer: Any) -> str:
    """SHA-256 (hex) of the chat template's text."""
    return hashlib.sha256(template_of(tokenizer).encode()).hexdigest()


def refused(tokenizer: Any, given: str, needed: str, *, roles: bool = False) -> ModelError:
    """The error for a template that cannot be used. roles: a persona in the user turn may be a way."""
    into_user = 'Put personas into the user turn (system_role = "user" in a study, --system-role user), use'
    way = into_user if roles else "Use"
    return ModelError(
        f"chat: the chat template of {name_of(tokenizer)} cannot be used: {given}. Needed: {needed}. "
        f"{way} another model, or put a chat_template.jinja of your own into a local copy of it."
    )


def name_of(tokenizer: Any) -> str:
    """The model that the tokenizer was loaded for."""
    return getattr(tokenizer, "name_or_path", "") or "this model"


def _pinned_date(pattern: str) -> str:
    return _date().strftime(pattern)


def _date() -> date:
    from datetime import date

    return date(*PINNED_DATE)
