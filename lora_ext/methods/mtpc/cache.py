"""Keys and values of a decoded batch in buffers with room for what is to come."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def roomy_cache(room: int) -> Any:
    """A transformers cache whose layers write new keys and values into buffers that they keep.

    transformers' own copies a layer's whole past to append to it, at every pass. Here ``keys`` and
    ``values`` of a layer are views of buffers; one that is full grows to twice its size.

    Args:
        room: slots that a layer has from the beginning, at least 1.
    """
    from transformers.cache_utils import Cache, DynamicLayer

    class RoomyLayer(DynamicLayer):
        _buffers: tuple[Tensor, Tensor] | None = None

        def update(
            self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
        ) -> tuple[Tensor, Tensor]:
            first = not self.is_initialized
            start = 0 if first else self.get_seq_length()
            end = start + key_states.shape[-2]
            if first:
                self.lazy_initialization(key_states, value_states)
            if first or self._buffers is None or self._buffers[0].shape[-2] < end:
                size = max(room, end if start == 0 else 2 * end)
                grown = [
                    t.new_empty(*t.shape[:-2], size, t.shape[-1])
                    for t in (key_states, value_states)
                ]
                if start:
                    grown[0][..., :start, :], grown[1][..., :start, :] = self.keys, self.values
                self._buffers = grown[0], grown[1]
            keys, values = self._buffers
            keys[..., start:end, :], values[..., start:end, :] = key_states, value_states
            self.keys, self.values = keys[..., :end, :], values[..., :end, :]
            return self.keys, self.values

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            self._buffers = None  # they hold other rows

    return Cache(layer_class_to_replicate=RoomyLayer)
