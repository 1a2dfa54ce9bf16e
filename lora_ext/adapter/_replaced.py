"""Modules of the base model that an adapter replaces (PEFT's ``modules_to_save``), usually heads,
and rows of the embedding that it replaces (``trainable_token_indices``)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from lora_ext._checks import require

from ._config import AdapterConfig
from ._model_index import ModelIndex, check_header
from ._peft_tensors import PREFIX, TensorSource


class Replaced(NamedTuple):
    """Tensors that replace those of a linear layer or embedding, or some rows of its weight.

    Shape letters: I inputs and O outputs of the module, n replaced rows.
    """

    weight: Tensor  # (O, I); (tokens, O) for an embedding; (n, ...) for n rows
    bias: Tensor | None = None  # (O,)
    rows: Tensor | None = None  # (n,) int64, indices of the rows; None for all rows

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.nbytes for tensor in self if tensor is not None)

    def each(self, change: Callable[[Tensor], Tensor]) -> Replaced:
        """Return the result of applying ``change`` to each tensor."""
        bias, rows = (None if t is None else change(t) for t in (self.bias, self.rows))
        return Replaced(change(self.weight), bias, rows)


def find_replaced(
    config: AdapterConfig,
    tensors: TensorSource,
    index: ModelIndex,
    saved: Mapping[str, str],
    adapted: Iterable[str],
) -> dict[str, dict[str, str]]:
    """Return, for each replaced module, the keys of its tensors by "weight" and "bias".

    The headers of these tensors are checked, and no tensor is read.

    Args:
        saved: keys of tensors of ``modules_to_save``, with the weights' names in the base model.
        adapted: names of the modules that have LoRA factors.
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
            refusal = f"on {module}: expected a plain Linear or Embedding in the pool's targets"
        elif reader is not None:
            refusal = f"on {module}, whose weight {reader} reads without calling it"
        elif module in adapted:
            refusal = f"on {module}, which has LoRA factors as well"
        if refusal is not None:
            where = f"{tensors.where}: {key}"
            raise NotImplementedError(f"{where}: modules_to_save is not supported {refusal}")
        expected = "a weight of the base model"
        require(name in index.weights, tensors.where, key, expected, f"the unknown name {name}")
        remedy = "; a head with a different number of labels needs a separate model"
        check_header(tensors, key, index.weights.shape(name), " as in the base model", remedy)
        found.setdefault(module, {})[role] = key
    return found


_ROWS = ".token_adapter.trainable_tokens_delta"


def find_rows(
    config: AdapterConfig, tensors: TensorSource, index: ModelIndex, adapted: Iterable[str]
) -> tuple[dict[str, str], tuple[int, ...]]:
    """Return the keys of the replaced rows (PEFT's ``trainable_token_indices``) by module, and the
    row indices.

    The modules are the input embedding and, if there is one, the tied head; both have the same key.
    The header of the tensor is checked, and no tensor is read.

    Raises:
        ValueError: If a key, shape or token does not fit.
        NotImplementedError: If the rows do not belong to a plain input embedding.
    """
    given: Any = config.trainable_token_indices
    field = "trainable_token_indices"
    if given is None:
        return {}, ()
    by_name: Any = given if isinstance(given, Mapping) else {index.input_embedding or "": given}
    ((name, tokens), *others) = by_name.items()
    module, spec = index.input_embedding, index.embedding.get(index.input_embedding or "")
    fits = module is not None and spec is not None and module.endswith(name) and not others
    expected = "only the input embedding, a plain nn.Embedding that the pool serves (targets=)"
    require(fits, config.where, field, expected, f"{list(by_name)}", NotImplementedError)
    assert spec is not None and module is not None
    with_head = [module, *([index.tied_head] if index.tied_head else [])]
    for each in with_head:
        problems = {
            "LoRA factors": each in adapted,
            "modules_to_save": config.saves_whole(f"{each}.weight"),
            "a bias": f"{each}.bias" in index.weights,  # PEFT would omit it
            "a module that the pool does not serve": each not in index.modules,
        }
        found = " and ".join(name for name, holds in problems.items() if holds)
        expected = f"{each} without a bias, served by the pool and changed only in these rows"
        require(not found, config.where, field, expected, found, NotImplementedError)
    key = f"{PREFIX}{module}{_ROWS}"
    key = key if key in tensors.infos else key.removeprefix(PREFIX)
    require(key in tensors.infos, tensors.where, key, "the rows of trainable_token_indices", "none")
    most = spec.in_features - 1
    require(max(tokens) <= most, config.where, field, f"tokens up to {most}", max(tokens))
    check_header(tensors, key, (len(tokens), spec.out_features))
    return dict.fromkeys(with_head, key), tuple(tokens)
