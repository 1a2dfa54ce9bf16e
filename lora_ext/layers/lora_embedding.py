"""LoraEmbedding: an embedding with trainable low-rank adapters."""

from __future__ import annotations

import itertools
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lora_ext._checks import require
from lora_ext._torch import linear
from lora_ext.kinds import normed
from lora_ext.rows import Names

from ._lora_layer import LoraLayer
from .base._weight import EmbeddingWeight

#: Attributes of ``nn.Embedding`` that are arguments of ``F.embedding``.
_SETTINGS = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")


class LoraEmbedding(LoraLayer):
    """PEFT's embedding layer: ``y[t] = base(x)[t] + embed_scale * scaling * B A[:, x[t]]``.

    The adapter reads one column of A per token instead of multiplying A by a one-hot vector.
    Parameters have PEFT's names: ``base_layer.weight (V, O)``, ``lora_embedding_A.<name> (r, V)``,
    ``lora_embedding_B.<name> (O, r)``, ``lora_magnitude_vector.<name>.weight (O,)``, with ``V``
    tokens in the vocabulary, ``O`` features and rank ``r``. If the base layer scales its output
    (attribute ``embed_scale``, as in Gemma), the update is scaled as well.

    Adapters are selected as in :class:`lora_ext.nn.LoraLinear`; the tokens are the rows.

    Args:
        base_layer: embedding, an ``nn.Embedding`` or an instance of a subclass.
        adapter_name: name of the first adapter, which becomes active.
        r: rank of the first adapter.
        options: other arguments of :meth:`add_adapter`. ``init_lora_weights=True`` selects PEFT's
            initialisation of embeddings: A is zero, and B is drawn from N(0, 1). As in PEFT,
            dropout is accepted without effect, because token ids cannot be dropped.

    Raises:
        ValueError: If the base layer is not an embedding, ``lora_bias`` is set, or
            :meth:`add_adapter` raises a ValueError.

    Sources: LoRA (Hu et al. 2021); PEFT.
    """

    lora_embedding_A: nn.ParameterDict
    lora_embedding_B: nn.ParameterDict

    def __init__(
        self, base_layer: nn.Module, adapter_name: str = "default", r: int = 8, **options: Any
    ):
        fits = isinstance(base_layer, nn.Embedding)
        require(fits, "LoraEmbedding", "base_layer", "nn.Embedding", type(base_layer).__name__)
        super().__init__(base_layer, adapter_name, r, fan_in_fan_out=True, **options)

    def forward(self, x: Tensor, adapter_ids: Tensor | Names = None) -> Tensor:
        """Map token ids ``(...)`` to features ``(..., O)``.

        Args:
            x: int64 or int32 tensor of token ids.
            adapter_ids: adapters as in :meth:`lora_ext.nn.LoraLinear.forward`, one per token or per
                sequence.

        Raises:
            ValueError: If the ids or names do not match the rows or the adapters, or if they are
                given while adapters are merged.
        """
        names, rows = self._participants(x.shape, x.device, adapter_ids)
        y = self.base_layer(x)
        if not names:
            return y
        if rows is None:
            total = y
            for name in names:
                total = self._add(name, x, total)
            return total.to(y.dtype)
        tokens, flat = x.reshape(-1), y.reshape(-1, self.out_features)  # (T,), (T, O)
        ids, weights = rows.ids, rows.weights
        ids = ids.view(len(tokens), *ids.shape[1:] or (1,))  # (T, K)
        for k, slot in itertools.product(range(ids.shape[1]), range(len(rows.used))):
            own = (ids[:, k] == slot).nonzero()[:, 0]
            weight = None if weights is None else weights.view(ids.shape)[own, k, None]
            part = self._add(names[rows.used[slot]], tokens[own], flat[own], weight)
            flat = flat.index_copy(0, own, part.to(flat.dtype))
        return flat.view(y.shape)

    def _add(self, name: str, x: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return ``y`` plus one adapter's update; if the adapter has a magnitude, scale the sum.

        The update is multiplied by ``weight (T, 1)``, which is None for a DoRA adapter.
        """
        a, b = self.lora_embedding_A[name], self.lora_embedding_B[name]
        base: Any = self.base_layer
        how = {setting: getattr(base, setting) for setting in _SETTINGS}
        update = linear(F.embedding(x, a.t(), **how), b) * self.scaling[name]  # (..., O)
        scale = getattr(base, "embed_scale", None)
        if isinstance(scale, Tensor):
            where, found = "LoraEmbedding", f"shape {tuple(scale.shape)}"
            require(scale.numel() == 1, where, "base_layer.embed_scale", "a scalar", found)
            scale = scale.to(update.dtype)
        for factor in (scale, weight):
            if factor is not None:
                update = update * factor
        if name not in self.lora_magnitude_vector:
            return y + update
        of_weight = self.base_weight.matrix(), a, b, self.scaling[name]
        return normed(self._magnitude(name), *of_weight) * (y + update)

    # Overrides of LoraLayer

    _of_tokens = True

    @property
    def base_weight(self) -> EmbeddingWeight:
        """View of the base layer's weight as a matrix ``(O, V)`` for one-hot vectors."""
        return EmbeddingWeight(self.base_layer)
