"""Guides: a hidden Markov model of a language model's text, by which a constraint looks ahead."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lora_ext import ops

from .limits import require

_SUM = 1e-3  # how far probabilities may sum from one: many of them in float32


class Guide:
    """A hidden Markov model over tokens.

    ``p(x_1 .. x_n) = sum_z initial(z_1) emission(z_1, x_1) prod transition(z_t, z_t+1) ...``.
    Letters: ``H`` states, ``V`` tokens.

    Args:
        initial: ``(H,)``, the law of the state at the first new token.
        transition: ``(H, H)``, rows sum to one.
        emission: ``(H, V)``, rows sum to one.

    Raises:
        ValueError: for shapes or dtypes that do not fit, and numbers that are no probabilities.
    """

    def __init__(self, initial: Tensor, transition: Tensor, emission: Tensor):
        given = {"initial": initial, "transition": transition, "emission": emission}
        wide = initial.numel() if isinstance(initial, Tensor) else 0
        sizes = {"initial": (wide,), "transition": (wide, wide), "emission": (wide, -1)}
        for name, tensor in given.items():
            where = f"Guide: {name}"
            known = isinstance(tensor, Tensor) and tensor.dtype in (torch.float32, torch.float64)
            require(known, where, "float32 or float64 probabilities", _told(tensor))
            shape = tuple(tensor.shape)
            fits = len(shape) == len(sizes[name]) and tensor.numel() > 0
            fits = fits and all(n in (-1, m) for n, m in zip(sizes[name], shape, strict=True))
            require(fits, where, f"shape {sizes[name]}, -1 free", tuple(tensor.shape))
            require(tensor.dtype == initial.dtype, where, initial.dtype, tensor.dtype)
            require(tensor.device == initial.device, where, initial.device, tensor.device)
            sums = tensor.double().sum(-1)
            right = bool((tensor >= 0).all()) and bool(((sums - 1).abs() <= _SUM).all())
            require(right, where, "probabilities whose rows sum to one", "other numbers")
        self.initial = initial.detach()
        self.transition = transition.detach()
        self.emission = emission.detach()

    @property
    def num_states(self) -> int:
        """``H``."""
        return len(self.initial)

    @property
    def vocab_size(self) -> int:
        """``V``."""
        return self.emission.shape[1]

    def __repr__(self) -> str:
        return f"Guide(states={self.num_states}, vocab_size={self.vocab_size})"

    # --- following a text -------------------------------------------------------------------------
    def step(self, law: Tensor, tokens: Tensor) -> Tensor:
        """The law of the state after one more token of each row.

        A token that the guide holds impossible says nothing of the state.

        Args:
            law: ``(B, H)`` before it. tokens: ``(B,)`` int64.
        """
        seen = law * self.by_token[tokens]
        total = seen.sum(-1, keepdim=True)
        law = torch.where(total > 0, seen / total.clamp(min=torch.finfo(law.dtype).tiny), law)
        moved = _product(law, self._packed_transition, self.transition)
        return moved / moved.sum(-1, keepdim=True)

    def filter(self, tokens: Tensor, prior: Tensor | None = None) -> Tensor:
        """The law of the state behind each row of tokens, such as a prompt: ``(B, H)``.

        Args:
            tokens: ``(B, T)`` integers; -1 is padding and leaves the law alone.
            prior: ``(B, H)`` before the first token; None: :attr:`initial`.

        Raises:
            ValueError: tokens out of range, or another shape.
        """
        where = "Guide.filter: tokens"
        whole = isinstance(tokens, Tensor) and not tokens.is_floating_point()
        require(whole and tokens.dim() == 2, where, "integers (B, T)", _told(tokens))
        inside = bool(((tokens >= -1) & (tokens < self.vocab_size)).all())
        require(inside, where, f"values in -1 .. {self.vocab_size - 1}", "others")
        law = self.initial.expand(len(tokens), -1) if prior is None else prior
        require(
            law.shape == (len(tokens), self.num_states),
            "Guide.filter: prior",
            f"shape {(len(tokens), self.num_states)}",
            tuple(law.shape),
        )
        for token in tokens.to(self.initial.device, torch.long).unbind(1):
            law = torch.where((token >= 0)[:, None], self.step(law, token.clamp(min=0)), law)
        return law

    # --- products ---------------------------------------------------------------------------------
    @cached_property
    def by_token(self) -> Tensor:
        """The emission with a row per token, ``(V, H)``."""
        return self.emission.t().contiguous()

    @cached_property
    def _packed_emission(self) -> Tensor | None:
        return _packed(self.by_token)

    @cached_property
    def _packed_transition(self) -> Tensor | None:
        return _packed(self.transition.t().contiguous())

    def over_vocabulary(self, vectors: Tensor) -> Tensor:
        """``vectors (R, H)`` times the emission, ``(R, V)``; in float32 on the CPU a row's bits are
        its own."""
        return _product(vectors, self._packed_emission, self.emission)


def _packed(weight: Tensor) -> Tensor | None:
    one = weight.dtype == torch.float32 and weight.device.type == "cpu"
    return ops.pack_weight(weight) if one else None


def _product(rows: Tensor, packed: Tensor | None, matrix: Tensor) -> Tensor:
    if packed is None:
        return rows @ matrix
    return ops.packed_linear(rows.contiguous(), packed, None, matrix.shape[1])


def _told(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
