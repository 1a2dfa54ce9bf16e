"""Verifier: a causal language model that processes several tokens per pass and can remove some of
these tokens from its cache, in which memory is reserved for later tokens.

Shape letters: ``B`` rows, ``Q`` tokens per row in a pass, ``K`` tokens in a window, ``D`` hidden
width, ``V`` vocabulary.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext._checks import require
from lora_ext.rows import activated_forward, select_rows

from .tail import DraftTail


def roomy_cache(room: int) -> Any:
    """Return a transformers cache with layers that write new keys and values into preallocated
    buffers.

    transformers' own cache copies all earlier keys and values of a layer at every pass. Here,
    ``keys`` and ``values`` of a layer are views of buffers that have room for ``room`` tokens at
    first. A full buffer is replaced by one of twice the size.
    """
    from transformers.cache_utils import Cache, DynamicLayer

    class RoomyLayer(DynamicLayer):
        buffers: tuple[Tensor, Tensor] | None = None

        def update(
            self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
        ) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            start = self.get_seq_length()
            end = start + key_states.shape[-2]
            if self.buffers is None or not self.fits(end):
                past = self.keys, self.values
                size = max(room, 2 * end if start else end)
                states = key_states, value_states
                keys, values = (t.new_empty(*t.shape[:-2], size, t.shape[-1]) for t in states)
                for buffer, before in zip((keys, values), past, strict=True):
                    if start and before is not None:
                        buffer[..., :start, :] = before
                self.buffers = keys, values
            keys, values = self.buffers
            keys[..., start:end, :], values[..., start:end, :] = key_states, value_states
            self.keys, self.values = keys[..., :end, :], values[..., :end, :]
            return self.keys, self.values

        def fits(self, end: int) -> bool:
            """Return whether the buffers have room for ``end`` tokens, and ``keys`` is still a view
            of its buffer."""
            assert self.buffers is not None
            own = self.keys is not None and self.keys.data_ptr() == self.buffers[0].data_ptr()
            return own and self.buffers[0].shape[-2] >= end

    return Cache(layer_class_to_replicate=RoomyLayer)


def run_trunk(model: Any, tail: DraftTail | None, **inputs: Any) -> tuple[Tensor, Tensor]:
    """Run the model once.

    Return the verifier's logits ``(B, Q, V)`` and the hidden states of the draft path
    ``(B, Q, D)``: the input of the LM head, or with a tail the output of its layers.
    """
    hidden: list[Tensor] = []

    def before_lm_head(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        # With a tail, only the first half of the rows, the verifier's, enters the LM head.
        states, drafting = (args[0], args[0]) if tail is None else args[0].chunk(2)
        hidden.append(drafting)
        return (states, *args[1:])

    rows = len(inputs["input_ids"])
    doubled = contextlib.nullcontext() if tail is None else tail.beside_the_verifier(rows)
    with model.get_output_embeddings().register_forward_pre_hook(before_lm_head), doubled:
        logits = model(**inputs).logits
    return logits, hidden[0]


def cache_argument(model: Any) -> str:
    """Return the cache argument's name in the model's forward; names depend on the version of
    transformers."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class Trunk:
    """Sequences of a batch, each with its own length, and the model's cache for them.

    If only some rows reject a token at the end, the token stays in the cache, and the attention
    masks of these rows hide it. Positions are counted per row. The results of a row are therefore
    the same as without other rows, up to rounding.

    Args:
        model: language model of the :class:`SpeculativeDecoder`.
        tail: :class:`DraftTail` of the decoder, or None.
        input_ids: prompts ``(B, S)`` of the call.
        mask: attention mask ``(B, S)`` of the prompts.
        room: number of tokens that may follow a prompt. Later tokens share the last position and
            are never used.

    Attributes:
        logits: ``(B, V)``, logits of the last token of the prompt or of :meth:`advance`.
        hidden: ``(B, D)``, hidden state of the last kept token in the draft path.
        passes: number of passes after the prompt.

    Raises:
        ValueError: If padding is not on the left, or the model has a sliding window or an attention
            that computes positions from the length of the cache (MPT).
    """

    def __init__(
        self, model: Any, tail: DraftTail | None, input_ids: Tensor, mask: Tensor, room: int
    ):
        _check(model, input_ids, mask)
        self.model, self.tail = model, tail
        self.cache = roomy_cache(input_ids.shape[1] + room)
        named = inspect.signature(model.forward).parameters
        self._cache_argument = cache_argument(model)
        self.mask = mask.long()  # (B, number of tokens in the cache)
        self.length = self.mask.sum(1)  # (B,) number of kept tokens
        self.last = self.length + room - 1
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        prompt = {"logits_to_keep": 1} if "logits_to_keep" in named else {}
        logits, hidden = self._run(input_ids, positions, **prompt)
        self.logits, self.hidden = logits[:, -1], hidden[:, -1]
        self._states = hidden[:, -1:]  # (B, K + 1, D): before the last window and in it
        self.passes = 0

    def advance(self, tokens: Tensor) -> None:
        """Append one token per row, ``(B,)``."""
        logits, states = self._feed(tokens[:, None])
        self._forget(torch.ones_like(tokens))
        self.logits, self.hidden = logits[:, 0], states[:, 0]

    def feed(self, tokens: Tensor, pending: Tensor | None = None) -> Tensor:
        """Run the model over a window.

        Args:
            tokens: the window, ``(B, K)``.
            pending: ``(B,)``, one decided token per row that the model processes before the window.
                If None, the logits for the first token of the window are those in :attr:`logits`,
                which :meth:`keep` does not update. These logits may be out of date if that token is
                already decided, since verification then ignores the logits.

        Returns:
            ``(B, K + 1, V)``, the logits for the tokens of the window and for the token after it.
        """
        if pending is None:
            logits, states = self._feed(tokens)
            self._states = torch.cat([self.hidden[:, None], states], 1)
            return torch.cat([self.logits[:, None], logits], 1)
        logits, self._states = self._feed(torch.cat([pending[:, None], tokens], 1))
        return logits

    def keep(self, kept: Tensor) -> None:
        """Remove all but the first ``kept (B,)`` tokens of the window of the last :meth:`feed`. A
        pending token is always kept."""
        self._forget(kept + self._fed + 1 - self._states.shape[1])
        self.hidden = self._states[torch.arange(len(kept), device=kept.device), kept]

    def _feed(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Run the model over tokens ``(B, Q)``; return what :func:`run_trunk` returns."""
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        positions = torch.minimum(self.length[:, None] + steps, self.last[:, None])
        self.mask = torch.cat([self.mask, torch.ones_like(tokens)], 1)
        self._fed = tokens.shape[1]
        self.passes += 1
        return self._run(tokens, positions)

    def _forget(self, kept: Tensor) -> None:
        """Remove all but the first ``kept (B,)`` tokens of the last pass."""
        fed = self._fed
        most = int(kept.max())
        if most < fed:
            self.cache.crop(most - fed)  # a negative argument removes tokens at the end
        slots = self.mask.shape[1] - fed
        steps = torch.arange(most, device=kept.device)
        self.mask = torch.cat([self.mask[:, :slots], (steps < kept[:, None]).long()], 1)
        self.length = self.length + kept

    def select(self, rows: Tensor) -> None:
        """Keep only the rows with these indices."""
        batch = len(self.length)
        for layer in self.cache.layers:
            both = len(layer.keys) == 2 * batch  # rows of the verifier, then those of the tail
            layer.batch_select_indices(torch.cat([rows, rows + batch]) if both else rows)
        select_rows(rows, batch)  # also keeps only these rows' adapters
        self.mask, self.length, self.last = self.mask[rows], self.length[rows], self.last[rows]
        self.logits, self.hidden = self.logits[rows], self.hidden[rows]

    def _run(self, ids: Tensor, positions: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
        rows, length = ids.shape
        past, kept = self.mask.shape[1] - length, more.get("logits_to_keep", 0)
        more |= {"attention_mask": self.mask, "position_ids": positions, "use_cache": True}
        more[self._cache_argument] = self.cache
        with activated_forward(ids, rows, length, past, kept):
            return run_trunk(self.model, self.tail, input_ids=ids, **more)


def _check(model: Any, input_ids: Tensor, attention_mask: Tensor) -> None:
    where = "SpeculativeDecoder"
    config = model.config
    shape = tuple(input_ids.shape)
    fits = len(shape) == 2 and 0 not in shape and not input_ids.is_floating_point()
    require(fits, where, "input_ids", "integers of shape (B, S)", f"{shape} {input_ids.dtype}")
    found = tuple(attention_mask.shape)
    require(found == shape, where, "attention_mask", f"shape {shape}", found)
    mask = attention_mask.bool()
    fits = bool(mask[:, -1].all()) and not bool((mask[:, :-1] & ~mask[:, 1:]).any())
    found = "" if fits else f"zeros after a token: {mask.long().tolist()!r:.200}"
    require(fits, where, "attention_mask", "prompts padded on the left", found)
    alibi = getattr(getattr(config, "attn_config", None), "alibi", False)
    found = f"ALiBi, which counts rejected tokens, too ({config.model_type})"
    require(not alibi, where, "model", "one that uses position_ids", found)
    kinds = getattr(config, "layer_types", None) or ()
    window = getattr(config, "sliding_window", None)
    fits = all("full" in kind for kind in kinds) and (window is None or kinds)
    found = sorted(set(kinds)) or f"a sliding window of {window}"
    require(fits, where, "model", "full attention in all layers", found)
