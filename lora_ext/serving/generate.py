"""Methods of a transformers model that :func:`lora_ext.attach` overrides: a block's rows stay those
of the batch, and what cannot be served is refused. They find their model through ``self``, in a
copy of it too."""

from __future__ import annotations

import contextlib
from typing import Any

from lora_ext.pool import AdapterPool
from lora_ext.rows import (
    Names,
    PoolLayer,
    generation_scope,
    of_call,
    pool_handle,
    repeat_rows,
    select_rows,
)

from .continuous import continuous_hooks
from .media import media_noted
from .names import names_of_call, refuse_singular


def hooks(pool: AdapterPool, default: str | None) -> dict[str, Any]:
    """What stands in for the methods of these names, where a model has them."""
    return {
        **_generate(pool, default),
        **_whisper(pool),
        **continuous_hooks(pool, default),
        "resize_token_embeddings": _resize_token_embeddings,
    }


def _generate(pool: AdapterPool, default: str | None) -> dict[str, Any]:
    handle = pool_handle(pool)

    def generate(self: Any, *args: Any, adapter_names: Names = None, **kwargs: Any) -> Any:
        refuse_singular("generate", kwargs)
        adapter_names = names_of_call(adapter_names, pool, default)
        with contextlib.ExitStack() as stack:
            if adapter_names is not None:
                stack.enter_context(of_call(adapter_names, pool=pool))
            stack.enter_context(generation_scope())
            stack.enter_context(media_noted(self, args, kwargs))
            own = self.__dict__.get("_lora_ext_own_generate")  # of a repository's custom_generate
            return own(*args, **kwargs) if own else type(self).generate(self, *args, **kwargs)

    def _prepare_encoder_decoder_kwargs_for_generation(self: Any, *args: Any, **kwargs: Any) -> Any:
        # The encoder runs once per input. Whisper generates several times in one call.
        repeat_rows(handle, 1)
        return type(self)._prepare_encoder_decoder_kwargs_for_generation(self, *args, **kwargs)

    def _expand_inputs_for_generation(
        self: Any, expand_size: int = 1, *args: Any, **kwargs: Any
    ) -> Any:
        expanded = type(self)._expand_inputs_for_generation(self, expand_size, *args, **kwargs)
        repeat_rows(handle, expand_size)
        return expanded

    found = generate, _prepare_encoder_decoder_kwargs_for_generation, _expand_inputs_for_generation
    return {hook.__name__: hook for hook in found}


def _whisper(pool: AdapterPool) -> dict[str, Any]:
    """Whisper repeats its inputs for returned sequences before the encoder, and drops the
    recordings that have ended."""
    handle = pool_handle(pool)

    def _expand_variables_for_generation(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = kwargs["batch_size"]
        expanded = type(self)._expand_variables_for_generation(self, *args, **kwargs)
        rows = expanded[1]
        select_rows([row * batch // rows for row in range(rows)], batch)
        return expanded

    def _maybe_reduce_batch(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = kwargs["batch_idx_map"]
        reduced = type(self)._maybe_reduce_batch(*args, **kwargs)
        repeat_rows(handle, 1)
        if len(reduced[2]) < len(before):
            select_rows([before.index(row) for row in reduced[2]], len(before))
        return reduced

    found = _expand_variables_for_generation, _maybe_reduce_batch
    return {hook.__name__: hook for hook in found}


def _resize_token_embeddings(self: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(self.get_input_embeddings(), PoolLayer) or isinstance(
        self.get_output_embeddings(), PoolLayer
    ):
        raise RuntimeError(
            "resize_token_embeddings: expected embeddings that are not attached, found those of "
            "an attached model, which its pool knows by their sizes; detach the model, resize it, "
            "and make a new pool"
        )
    return type(self).resize_token_embeddings(self, *args, **kwargs)
