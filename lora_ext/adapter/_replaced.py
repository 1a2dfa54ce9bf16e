"""Whole modules that an adapter brings along (PEFT's ``modules_to_save``): heads, as a rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from lora_ext._checks import require

from ._config import AdapterConfig
from ._model_index import ModelIndex, check_header
from ._peft_tensors import PREFIX, TensorSource


class Replaced(NamedTuple):
    """What stands in the place of a linear layer's or an embedding's own tensors, or of some rows
    of its weight."""

    weight: Tensor  # (O, I); of an embedding (tokens, O); of n rows (n, ...)
    bias: Tensor | None = None  # (O,)
    rows: Tensor | None = None  # (n,) int64: which they are; None is all

    @property
    def nbytes(self) -> int:
        """Bytes of all three."""
        return sum(tensor.nbytes for tensor in self if tensor is not None)

    def each(self, change: Callable[[Tensor], Tensor]) -> Replaced:
        """The same of other tensors, which ``change`` makes of these."""
        bias, rows = (None if t is None else change(t) for t in (self.bias, self.rows))
        return Replaced(change(self.weight), bias, rows)


def find_replaced(
    config: AdapterConfig,
    tensors: TensorSource,
    index: ModelIndex,
    saved: Mapping[str, str],
    adapted: Iterable[str],
) -> dict[str, dict[str, str]]:
    """The modules that an adapter replaces, by name, and their keys by ``weight`` and ``bias``. All
    headers are checked, and no tensor is read.

    Args:
        saved: keys that lie in modules of ``modules_to_save``, with the weights' names in the base
            model. adapted: modules that have LoRA factors.
    """
    lacking = [w for w in index.weights if config.saves_whole(w) and w not in saved.values()]
    if lacking:
        expected = f"every weight of the modules that {config.where} names in modules_to_save"
        raise ValueError(f"{tensors.where}: expected {expected}, found none for {lacking[0]}")
    found: dict[str, dict[str, str]] = {}
    for key, name in saved.items():
        module, _, role = name.rpartition(".")
        spec = index.modules.get(module)
        reader = index.bypassed.get(module)
        refusal = None
        if spec is None or not spec.plain or role not in ("weight", "bias"):
            refusal = "here: expected whole Linear and Embedding modules in the pool's targets="
        elif reader is not None:
            refusal = f"on {module}, whose weight {reader} reads without calling it"
        elif module in adapted:
            refusal = f"on {module}, which has LoRA factors as well"
        if refusal is not None:
            where = f"{tensors.where}: {key}"
            raise NotImplementedError(f"{where}: modules_to_save is not supported {refusal}")
        expected = "weights that the base model has"
        require(name in index.weights, tensors.where, key, expected, "another")
        remedy = "; a head with another number of labels needs a model of its own"
        check_header(tensors, key, index.weights.shape(name), " as in the base model", remedy)
        found.setdefault(module, {})[role] = key
    return found


_ROWS = ".token_adapter.trainable_tokens_delta"


def find_rows(
    config: AdapterConfig, tensors: TensorSource, index: ModelIndex, adapted: Iterable[str]
) -> tuple[dict[str, str], tuple[int, ...]]:
    """Keys of rows that stand in the place of the input embedding's, by the modules that have them
    (PEFT's ``trainable_token_indices``: a tied head has them too), and which rows. All headers are
    checked, and no tensor is read.

    Raises:
        ValueError: a key, shape or token that does not fit. NotImplementedError: rows of another
            module than a plain input embedding.
    """
    given: Any = config.trainable_token_indices
    field = "trainable_token_indices"
    if given is None:
        return {}, ()
    by_name: Any = given if isinstance(given, Mapping) else {index.input_embedding or "": given}
    ((name, tokens), *others) = by_name.items()
    module, spec = index.input_embedding, index.embedding.get(index.input_embedding or "")
    fits = module is not None and spec is not None and module.endswith(name) and not others
    expected = "the input embedding, a plain nn.Embedding that the pool serves (targets=), alone"
    require(fits, config.where, field, expected, f"{list(by_name)}", NotImplementedError)
    assert spec is not None and module is not None
    with_head = [module, *([index.tied_head] if index.tied_head else [])]
    for each in with_head:
        plain = each not in adapted and not config.saves_whole(f"{each}.weight")
        plain = plain and f"{each}.bias" not in index.weights  # PEFT would leave it out
        alone, found = plain and each in index.modules, "more, or none that the pool serves"
        expected = f"these rows of {each} and nothing else of it, not a bias either"
        require(alone, config.where, field, expected, found, NotImplementedError)
    key = f"{PREFIX}{module}{_ROWS}"
    key = key if key in tensors.infos else key.removeprefix(PREFIX)
    require(key in tensors.infos, tensors.where, key, "the rows of trainable_token_indices", "none")
    most = spec.in_features - 1
    require(max(tokens) <= most, config.where, field, f"tokens up to {most}", max(tokens))
    check_header(tensors, key, (len(tokens), spec.out_features))
    return dict.fromkeys(with_head, key), tuple(tokens)
