"""A loaded tokenizer against its own tokenizer.json: is text read as the model was trained to read it? Demands the
folder or hub id it was loaded from; leaves naming and fetching models to models.py.

The rule. tokenizer.json is the authority wherever it is there. The fast classes that nearly every model was trained
with took the file as it is; newer transformers rebuild some classes (Qwen2Tokenizer, LlamaTokenizer, …) from the
file's vocabulary and merges alone, with a normalizer, pre-tokenizer and decoder of the class's own. Where those are
not the file's, the file is loaded as it is. `legacy` in tokenizer_config.json changes nothing in this: it told the
slow class alone what to do. What the folder itself says beside the file counts too: tokens that it adds, flags of its
tokens, `fix_mistral_regex`. Where it contradicts the file (`add_prefix_space`, a token's id), or is known to be
unsure (Mistral's pattern), nobody here can tell what training used, and it is refused. Special tokens that an encode
may put around a text are not looked at: prompts are encoded without."""

from __future__ import annotations

import json
import logging
import tempfile
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leakfast.errors import ModelError
from leakfast.prompts.rendering import configure, rendering_of
from leakfast.prompts.tokenizer_probes import Difference, canonical, first_difference, prefixes

log = logging.getLogger(__name__)

FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
_MISTRAL = {"mistral", "mistral3", "ministral", "ministral3", "pixtral", "voxtral"}
_LEFT_ALONE = "olmo2"  # an architecture whose tokenizers transformers and vLLM take as their file is
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# as the file → as its class reads
_put_aside: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_asked: weakref.WeakKeyDictionary[Any, dict[str, bool]] = weakref.WeakKeyDictionary()
_folders: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
# until this process ends: an engine may outlive the tokenizer
_kept: list[tempfile.TemporaryDirectory[str]] = []
_said: set[tuple[str, str]] = set()


@dataclass(frozen=True)
class TokenizerFile:
    """tokenizer.json of a model. own: as the tokenizers library reads it; settings: tokenizer_config.json; named:
    tokens that the folder's other files name; model_type: of config.json."""

    place: str
    path: Path
    own: Any
    settings: dict[str, Any]
    named: frozenset[str]
    model_type: str
    revision: str | None = None

    def checked(self, tokenizer: Any, given: bool = False, quiet: bool = False) -> Any:
        """`tokenizer`, or the file as it is where the two read text differently and the file is what training used.

        given: the tokenizer came from the caller, who may have added tokens or a template, which stay. quiet: a
        replacement is told at debug level. Raises ModelError where it cannot be told what training used."""
        found = self.difference(tokenizer, given)
        if found is None:
            return self._sure_of_ids(self._sure_of_pattern(tokenizer))
        self._refuse_contradictions(found)
        as_file = self._as_it_is(tokenizer, given)
        left = self.difference(as_file, given)
        if left is not None:
            raise self._refused(
                f"is not what its {SETTINGS} makes of it ({left})",
                f"Make the tokens of {SETTINGS} and {FILE} the same, or delete the other token files of the folder",
            )
        as_file = self._sure_of_ids(self._sure_of_pattern(as_file))
        name = type(tokenizer).__name__
        if (self.place, name) not in _said:
            _said.add((self.place, name))
            log.log(
                logging.DEBUG if quiet else logging.WARNING if found.text else logging.INFO,
                "tokenizer: %s would be read by %s, which is not its %s (%s); the file is used as it is, as in training",
                self.place,
                name,
                FILE,
                found,
            )
        _put_aside[as_file] = tokenizer
        return as_file

    def difference(self, tokenizer: Any, given: bool = False) -> Difference | None:
        """Where `tokenizer` and the file part; None where they read every text alike."""
        from transformers import TokenizersBackend

        if not isinstance(tokenizer, TokenizersBackend):
            return Difference(f"{type(tokenizer).__name__} knows no {FILE}")
        wrong = self._tokens(tokenizer, given)
        if wrong:
            return Difference(wrong)
        reference = self._reference(tokenizer)
        parts = _parts(tokenizer.backend_tokenizer, reference)
        probe = first_difference(tokenizer, reference)
        if probe is not None:
            return Difference(" and ".join(parts) or "merges", *probe)
        return Difference(" and ".join(parts)) if parts else None

    def _tokens(self, tokenizer: Any, given: bool) -> str:
        """What is wrong with the tokenizer's added tokens beside the file's; "" where nothing is."""
        own = self.own.get_added_tokens_decoder()
        mine = tokenizer.added_tokens_decoder
        for number, token in own.items():
            if token.content != getattr(mine.get(number), "content", None):
                return f"token {token.content!r} is not at {number}"
        for number, token in mine.items():
            known = self.own.token_to_id(token.content)
            if known is not None and known != number:
                return f"token {token.content!r} at {number} is {known} in the file"
            if number not in own and not given and token.content not in self.named:
                return f"token {token.content!r} at {number} is the class's own"
        return ""

    def _reference(self, tokenizer: Any) -> Any:
        """The file, with what the folder says beside it: tokens that it adds or gives other flags, a mended pattern."""
        from tokenizers import Tokenizer

        own = self.own.get_added_tokens_decoder()
        added = sorted(tokenizer.added_tokens_decoder.items())
        more = [token for number, token in added if _flags(token) != _flags(own.get(number))]
        backend, mended = tokenizer.backend_tokenizer, _asked_to_mend(tokenizer)
        if not more and not mended and backend.encode_special_tokens == self.own.encode_special_tokens:
            return self.own
        reference = Tokenizer.from_str(self.own.to_str())
        for token in more:
            (reference.add_special_tokens if token.special else reference.add_tokens)([token])
        if mended:
            reference.pre_tokenizer = backend.pre_tokenizer
        reference.encode_special_tokens = backend.encode_special_tokens
        return reference

    def _refuse_contradictions(self, found: Difference) -> None:
        """ModelError where the folder says otherwise than its file, so that either may be what training used."""
        said = self.settings.get("add_prefix_space")
        puts = prefixes(canonical(self.own.normalizer)) or prefixes(canonical(self.own.pre_tokenizer))
        if isinstance(said, bool) and said != puts:
            does = "puts a space before a text" if puts else "puts no space before a text"
            raise self._refused(
                f"says add_prefix_space = {str(said).lower()}, but {FILE} {does} ({found})",
                f"Set add_prefix_space in {SETTINGS} to {str(puts).lower()} if training read the file as it is, or save "
                "the tokenizer that was used in training again",
            )

    def _as_it_is(self, tokenizer: Any, given: bool) -> Any:
        """The file itself under the folder's settings, with what `tokenizer` has beyond them: named special tokens that
        the file knows, and, of one that was given, its tokens and template."""
        as_file = self._loaded()
        if given:
            number_of = as_file.backend_tokenizer.token_to_id
            added = sorted(tokenizer.added_tokens_decoder.items())
            as_file.add_tokens([token for _, token in added if number_of(token.content) is None])
            as_file.chat_template = tokenizer.chat_template
            as_file.model_max_length = tokenizer.model_max_length
            configure(as_file, rendering_of(tokenizer))
        as_file.padding_side = tokenizer.padding_side
        for name in _NAMED:
            value = getattr(tokenizer, name, None)
            known = value is not None and as_file.backend_tokenizer.token_to_id(str(value)) is not None
            if known and (given or getattr(as_file, name, None) is None):
                setattr(as_file, name, value)
        return as_file

    def _sure_of_pattern(self, tokenizer: Any) -> Any:
        """Mistral's models were published with a pattern that is not the one they were trained with. Where the file has
        it and the folder does not say which to use, ModelError."""
        # transformers' own finding
        unsure = getattr(tokenizer.backend_tokenizer, "fix_mistral_regex", None) is False
        stated = tokenizer.init_kwargs.get("fix_mistral_regex") is not None
        if self.model_type not in _MISTRAL or not unsure or stated:
            return tokenizer
        mended = self._loaded(fix_mistral_regex=True).backend_tokenizer
        if canonical(mended.pre_tokenizer) == canonical(tokenizer.backend_tokenizer.pre_tokenizer):
            return tokenizer
        raise self._refused(
            "has a pattern that Mistral's own models were not trained with, and its settings do not say which to use",
            f'Put "fix_mistral_regex": true into {SETTINGS} of a local copy for a model of Mistral\'s, or false for one '
            "that was trained further with the file as it is",
        )

    def _sure_of_ids(self, tokenizer: Any) -> Any:
        """Tokens are where the settings say that they are."""
        stated = self.settings.get("added_tokens_decoder")
        for number, token in stated.items() if isinstance(stated, dict) else ():
            for content in _contents(token):
                found = tokenizer.backend_tokenizer.token_to_id(content)
                if str(found) != str(number):
                    raise self._refused(
                        f"has {content!r} at {found}, but {SETTINGS} at {number}",
                        f"Make the two files of a local copy the same, or take added_tokens_decoder out of {SETTINGS}",
                    )
        return tokenizer

    def _loaded(self, **more: Any) -> Any:
        """The file itself under the folder's settings."""
        from transformers import TokenizersBackend

        return TokenizersBackend.from_pretrained(
            self.place,
            revision=self.revision or "main",
            local_files_only=True,
            trust_remote_code=False,
            **more,
        )

    def _refused(self, given: str, type_next: str) -> ModelError:
        return ModelError(
            f"tokenizer: {self.path.name} of {self.place} {given}. Needed: the tokenizer that the model was trained "
            f"with, and nobody here can tell which that is. {type_next}."
        )


def find(place: str, revision: str | None = None) -> TokenizerFile | None:
    """The tokenizer.json of a folder, or of a hub id as far as it was fetched before. None where there is none: then the
    class reads its own vocabulary files, and nothing can be compared. ModelError where it cannot be read."""
    settings = _json(_fetched(place, SETTINGS, revision))
    path = _fetched(place, _file_name(settings), revision)
    if path is None:
        log.debug("tokenizer: %s has no %s, so its class is taken at its word", place, FILE)
        return None
    with _Read(place, path):
        from tokenizers import Tokenizer

        own = Tokenizer.from_file(str(path))
        own.no_truncation()
        own.no_padding()
    if getattr(own.model, "dropout", None):
        raise ModelError(
            f"tokenizer: {path.name} of {place} leaves out merges by chance (dropout {own.model.dropout:g}), so that one "
            f"text has many readings. Needed: one. Set model.dropout in {path.name} to null."
        )
    tokens = {k: v for k, v in settings.items() if k.endswith(("_token", "_tokens", "_decoder"))}
    named = set(_contents(tokens))
    for name in ("special_tokens_map.json", "added_tokens.json"):
        more = _json(_fetched(place, name, revision))
        named.update(more if name == "added_tokens.json" else _contents(more))
    kind = str(_json(_fetched(place, "config.json", revision)).get("model_type", ""))
    return TokenizerFile(place, path, own, settings, frozenset(named), kind, revision)


def of_pair(tokenizer: Any) -> Any:
    """A tokenizer that the caller made, checked against the file it came from where that is on this machine; as it is
    where there is none, or where its vocabulary is another's (trained anew, or not from there at all)."""
    from transformers import TokenizersBackend

    place = str(getattr(tokenizer, "name_or_path", "") or "")
    if not place or not isinstance(tokenizer, TokenizersBackend):
        return tokenizer
    try:
        file = find(place)
    except OSError:  # no folder, and no name of the hub's
        file = None
    if file is None:
        return tokenizer
    mine, its = tokenizer.get_vocab(), file.own.get_vocab()
    if any(mine.get(token) != number for token, number in its.items()):
        log.debug("tokenizer: the one given has another vocabulary than %s, which it names", place)
        return tokenizer
    return file.checked(tokenizer, given=True)


def replaced(tokenizer: Any) -> bool:
    """Whether `tokenizer` is a file that was taken in place of a class's reading."""
    return tokenizer in _put_aside


def reading(tokenizer: Any, key: str, read: Callable[[Any], Any]) -> list[str]:
    """What a request's hash is to say of the tokenizer: nothing, but where a file was taken in place of a class's reading
    and what `read` makes of the two is not the same. Then what an earlier version made of it is of other tokens, and is
    made again. Asked once a `key`."""
    aside = _put_aside.get(tokenizer)
    if aside is None:
        return []
    how = rendering_of(tokenizer)
    known, key = _asked.setdefault(tokenizer, {}), f"{key} {how}"
    if key not in known:
        configure(aside, how)
        known[key] = read(tokenizer) != read(aside)
    return [FILE] if known[key] else []


def saved(tokenizer: Any) -> str | None:
    """A folder from which other libraries load `tokenizer` as the file reads, kept until this process ends; None where
    nothing was replaced, so that the model's own folder will do."""
    if tokenizer not in _put_aside:
        return None
    if tokenizer not in _folders:
        folder = tempfile.TemporaryDirectory(prefix="leakfast-tokenizer-")
        _kept.append(folder)
        tokenizer.save_pretrained(folder.name)
        (Path(folder.name) / "config.json").write_text(json.dumps({"model_type": _LEFT_ALONE}))
        _folders[tokenizer] = folder.name
    return _folders[tokenizer]


def _fetched(place: str, name: str, revision: str | None) -> Path | None:
    """A file of a folder or hub id; None where there is none."""
    from transformers.utils import cached_file

    if Path(place).is_dir():
        path = Path(place) / name
        return path if path.is_file() else None
    found = cached_file(
        place,
        name,
        revision=revision or "main",
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return Path(found) if found else None


def _file_name(settings: dict[str, Any]) -> str:
    """The file's name for this version of transformers, as transformers chooses it."""
    from transformers.tokenization_utils_base import get_fast_tokenizer_file

    return get_fast_tokenizer_file(settings.get("fast_tokenizer_files") or [])


def _json(path: Path | None) -> dict[str, Any]:
    """A JSON object; empty where there is no file, or where transformers is to say what is wrong with it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


class _Read:
    """What the tokenizers library raises inside, a plain Exception, is about the file."""

    def __init__(self, place: str, path: Path) -> None:
        self.place, self.path = place, path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if not isinstance(error, Exception):
            return False
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"tokenizer: {self.path.name} of {self.place} cannot be read: {line}. Needed: a file that the installed "
            "tokenizers library knows. Fetch or save the tokenizer again."
        ) from error


def _contents(settings: Any) -> Iterator[str]:
    """Every token that settings name, as a text or as {"content": …}."""
    if isinstance(settings, str):
        yield settings
    elif isinstance(settings, dict) and isinstance(settings.get("content"), str):
        yield settings["content"]
    elif isinstance(settings, dict | list):
        for value in settings.values() if isinstance(settings, dict) else settings:
            yield from _contents(value)


def _parts(backend: Any, own: Any) -> list[str]:
    """Names of the components that are not the file's."""
    found = []
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        if canonical(getattr(backend, name)) != canonical(getattr(own, name)):
            found.append(name.replace("_", "-"))
    options = (
        "byte_fallback fuse_unk ignore_merges unk_token continuing_subword_prefix end_of_word_suffix dropout"
    )
    mine, its = (
        [type(m.model), *(getattr(m.model, option, None) or None for option in options.split())]
        for m in (backend, own)
    )
    return [*found, *(["model options"] if mine != its else [])]


def _asked_to_mend(tokenizer: Any) -> bool:
    """Whether the folder, or who loaded it, asks for the mended pattern of Mistral's models."""
    return getattr(tokenizer, "init_kwargs", {}).get("fix_mistral_regex") is True


def _flags(token: Any) -> tuple[Any, ...] | None:
    if token is None:
        return None
    return (token.content, token.single_word, token.lstrip, token.rstrip, token.normalized, token.special)
