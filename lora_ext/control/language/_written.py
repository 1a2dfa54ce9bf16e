"""Constraints from texts, words, regular expressions and JSON schemas."""

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
    """Constructors of :class:`~lora_ext.control.Constraint` that need a tokenizer.

    Constraints are cached by their content and vocabulary. Constructors that need outlines-core
    raise ImportError if it is not installed; the message contains the command that installs it.
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
        """Return the constraint that allows exactly the given texts, in any tokenization.

        Args:
            texts: Allowed texts, at least one.
            tokenizer: Tokenizer of transformers.
            vocab_size: Number of ids of the model, if it has more than the tokenizer.
            eos_token_id: Token or tokens that end a text; None for those of the tokenizer.
            limits: Limits of states, bytes and seconds.

        Raises:
            ValueError: If there is no text, or the tokenizer is not supported.
            ConstraintTooLarge: If the constraint exceeds the limits.
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
        """Return the constraint that a text contains all words of one list and none of another.

        A word may occur as any substring of the text, in any tokenization: "a dog" and "dogma" both
        contain "dog".

        Args:
            tokenizer: See :meth:`choice`.
            all_of: Words that must occur. An item may be a list of words, of which at least one
                must occur.
            none_of: Words that must not occur.
            vocab_size: See :meth:`choice`.
            eos_token_id: See :meth:`choice`.
            limits: See :meth:`choice`.

        Raises:
            ValueError: If a word is empty, or no text can satisfy both lists.
            ConstraintTooLarge: If the constraint exceeds the limits.
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
        r"""Return the constraint that a whole text matches a regular expression.

        The syntax is that of Rust's regex crate, without ``\b``. ``^`` and ``$`` are only allowed
        at the beginning and end of the whole text, where they have no effect. A text with a NUL
        byte does not match any expression. Requires the extra ``control`` (outlines-core).

        Args:
            pattern: Regular expression.
            tokenizer: See :meth:`choice`.
            vocab_size: See :meth:`choice`.
            eos_token_id: See :meth:`choice`.
            limits: See :meth:`choice`.

        Raises:
            ValueError: If the expression is invalid.
            ConstraintTooLarge: If the constraint exceeds the limits.
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
        """Return the constraint that a text is JSON that satisfies a schema.

        The parts of the JSON are separated by at most one space. Properties must have the order of
        the schema, and other properties are not allowed. For ``date`` and ``date-time``, only the
        format is enforced, not the calendar. Requires the extra ``control`` (outlines-core).

        Args:
            schema: JSON schema, as a dictionary or as JSON text.
            tokenizer: See :meth:`choice`.
            vocab_size: See :meth:`choice`.
            eos_token_id: See :meth:`choice`.
            limits: See :meth:`choice`.

        Raises:
            NotImplementedError: If an automaton cannot enforce a keyword, such as ``minimum`` or
                ``uniqueItems``; the message names it. Also if outlines-core would change a value of
                ``enum`` or ``const``: a number with too many digits, or a property name with a
                special character of regular expressions.
            ValueError: If the schema is invalid.
            ConstraintTooLarge: If the constraint exceeds the limits.
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
        """Return the constraint that a text is a JSON object, with any content.

        The parts of the JSON are separated by at most one space.

        Args:
            tokenizer: See :meth:`choice`.
            depth: Largest number of nested objects and arrays, including the outer object, at least
                1. Each level doubles the number of states.
            vocab_size: See :meth:`choice`.
            eos_token_id: See :meth:`choice`.
            limits: See :meth:`choice`.
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
        """Build the constraint of the automaton over bytes that ``build`` returns, or load it from
        the cache.
        """
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
    """Convert nested iterables to lists, because ``repr`` abbreviates arrays and iterators."""
    if isinstance(content, (str, bytes, Mapping)) or not isinstance(content, Iterable):
        return content
    return [_settled(part) for part in content]
