"""Constraints from what people write: texts, words, regular expressions, JSON schemas."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_ext._checks import integer

from . import _algebra, _any_json, _keywords, _regex
from ._algebra import Automaton
from ._limits import DEFAULT, Clock, Limits
from ._vocabulary import vocabulary_of

if TYPE_CHECKING:
    from typing_extensions import Self

_MOST_KEPT = 64
_kept: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
_kept_lock = threading.Lock()


class Written:
    """What :class:`~lora_ext.control.Constraint` can be made from, given a tokenizer.

    A constraint is built once and kept by its content and vocabulary. Those that outlines-core
    builds raise ImportError without it, with the line that installs it.
    """

    @classmethod
    def _of(
        cls, what: str, automaton: Automaton, eos: tuple[int, ...], clock: Clock, part: str
    ) -> Self:
        raise NotImplementedError

    @classmethod
    def choice(
        cls,
        texts: Sequence[str],
        tokenizer: Any,
        *,
        vocab_size: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        limits: Limits = DEFAULT,
    ) -> Self:
        """Exactly one of the texts, in any way that tokens spell it.

        Args:
            texts: at least one.
            tokenizer: of transformers.
            vocab_size: ``V`` of the model, where it has more ids than the tokenizer.
            eos_token_id: what ends a text; None: the tokenizer's own.
            limits: of states, bytes and seconds.

        Raises:
            ValueError: for no texts, or an unusable tokenizer.
            ConstraintTooLarge: above the limits.
        """
        how = tokenizer, vocab_size, eos_token_id, limits
        return cls._spelled("choice", (texts,), _keywords.choice, *how)

    @classmethod
    def keywords(
        cls,
        tokenizer: Any,
        all_of: Sequence[str | Sequence[str]] = (),
        none_of: Sequence[str] = (),
        *,
        vocab_size: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        limits: Limits = DEFAULT,
    ) -> Self:
        """Return texts that contain all of some words and none of others.

        A word is contained if its letters stand in the text one behind the other, whatever tokens
        spell them and whatever stands around them: "dog" is contained in "a dog" and in "dogma".

        Args:
            tokenizer, vocab_size, eos_token_id, limits: as :meth:`choice` takes and refuses them.
            all_of: words, or lists of words of which one must occur.
            none_of: words that must not occur.

        Raises:
            ValueError: for an empty word, and words that rule each other out.
        """
        how = tokenizer, vocab_size, eos_token_id, limits
        return cls._spelled("keywords", (all_of, none_of), _keywords.keywords, *how)

    @classmethod
    def regex(
        cls,
        pattern: str,
        tokenizer: Any,
        *,
        vocab_size: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        limits: Limits = DEFAULT,
    ) -> Self:
        r"""Return texts that match a regular expression from end to end, however tokens spell them.

        The syntax is that of Rust's regex crate, without ``\b``, and with ``^`` and ``$`` at the
        beginning and end of the whole text alone, where they say nothing.
        A text with a NUL byte matches nothing. Needs the extra ``control``.

        Args:
            pattern: the expression.
            tokenizer, vocab_size, eos_token_id, limits: as :meth:`choice` takes and refuses them.

        Raises:
            ValueError: for something that is no expression.
        """
        how = tokenizer, vocab_size, eos_token_id, limits
        return cls._spelled("regex", (pattern,), _regex.pattern, *how)

    @classmethod
    def json_schema(
        cls,
        schema: dict[str, Any] | str,
        tokenizer: Any,
        *,
        vocab_size: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        limits: Limits = DEFAULT,
    ) -> Self:
        """Return JSON texts of a schema, with at most one space between their parts.

        Properties come in the order of the schema, and no others come. ``date`` and ``date-time``
        are held to their shape, not to the calendar. Needs the extra ``control``.

        Args:
            schema: as a dictionary or as JSON.
            tokenizer, vocab_size, eos_token_id, limits: as :meth:`regex` takes them.

        Raises:
            NotImplementedError: for a word that the automaton would not hold to, by its name, such
                as ``minimum`` or ``uniqueItems``; and for values of ``enum`` and ``const`` that
                would be written as others: numbers of more digits than a double's product keeps,
                names with a letter that means something in an expression.
            ValueError: for something that is no schema.
        """
        how = tokenizer, vocab_size, eos_token_id, limits
        return cls._spelled("json_schema", (schema,), _regex.json_schema, *how)

    @classmethod
    def json_object(
        cls,
        tokenizer: Any,
        *,
        depth: int = _any_json.DEPTH,
        vocab_size: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        limits: Limits = DEFAULT,
    ) -> Self:
        """Return JSON objects of any content, with at most one space between their parts.

        Args:
            tokenizer, vocab_size, eos_token_id, limits: as :meth:`choice` takes and refuses them.
            depth: objects and arrays inside each other, the outer object included, at least 1;
                every further one doubles the states.
        """
        integer("json_object", "depth", depth, 1)
        how = tokenizer, vocab_size, eos_token_id, limits
        return cls._spelled("json_object", (depth,), _any_json.json_object, *how)

    @classmethod
    def _spelled(
        cls,
        what: str,
        content: tuple[Any, ...],
        build: Callable[..., Automaton],
        tokenizer: Any,
        vocab_size: int | None,
        eos_token_id: int | Sequence[int] | None,
        limits: Limits,
    ) -> Self:
        """Return the constraint of an automaton over bytes, kept by what it was built from."""
        vocabulary = vocabulary_of(what, tokenizer, vocab_size, eos_token_id)
        content = tuple(map(_settled, content))
        told = hashlib.blake2b(repr(content).encode(), digest_size=24).digest()
        key = (what, told, vocabulary.key, limits)
        with _kept_lock:
            if (found := _kept.get(key)) is not None:
                _kept.move_to_end(key)
                return found
        clock = Clock(what, limits)
        byte = _algebra.minimal(build(*content, clock), clock)
        part = f"{len(byte.table)} states over bytes times the vocabulary"
        tokens = _algebra.over_tokens(byte, vocabulary.tokens, clock, part)
        made = cls._of(what, tokens, vocabulary.eos, clock, part)
        with _kept_lock:
            _kept[key] = made
            while len(_kept) > _MOST_KEPT:
                _kept.popitem(last=False)
        return made


def _settled(content: Any) -> Any:
    """Return plain lists, whose ``repr`` shows all that they hold; that of iterators, arrays and
    tables does not."""
    if isinstance(content, (str, bytes, Mapping)) or not isinstance(content, Iterable):
        return content
    return [_settled(part) for part in content]
