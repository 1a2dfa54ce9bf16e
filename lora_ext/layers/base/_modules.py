"""Modules of a base model that can have adapters, identified without importing transformers."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from lora_ext.rows import PoolLayer

# These modules read the weights of their linear children instead of calling them, either always or
# on torch's fast path for evaluation. An adapter on such a child would be ignored.
READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)

CONV1D = ("Conv1D", "transformers.pytorch_utils")  # name and module of the class


def linear_size(module: nn.Module) -> tuple[int, int] | None:
    """Return the input and output features of a base layer for linear adapters.

    The result is None if ``module`` is not such a layer.

    A base layer is transformers' ``Conv1D``, or any module without adapters that has
    ``in_features`` and ``out_features``, for example a layer of a quantiser. It may have no
    ``weight``. A module that contains base layers counts as a base layer only if it also stores
    integers: HQQ's layer stores integers and contains the original layer.
    """
    for base in type(module).__mro__:
        if base.__name__ == "Conv1D" and base.__module__.startswith("transformers."):
            rows, columns = module.weight.shape  # pyright: ignore[reportGeneralTypeIssues]
            return rows, columns  # pyright: ignore[reportReturnType]
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    adapted = isinstance(module, PoolLayer) or "base_layer" in module._modules
    if adapted or not all(isinstance(size, int) for size in sizes):
        return None
    if not isinstance(module, nn.Linear) and any(linear_size(m) for m in module.children()):
        own = itertools.chain(module.parameters(recurse=False), module.buffers(recurse=False))
        return sizes if any(not tensor.is_floating_point() for tensor in own) else None  # pyright: ignore[reportReturnType]
    return sizes  # pyright: ignore[reportReturnType]


def linear_sizes(modules: Mapping[str, nn.Module]) -> dict[str, tuple[int, int]]:
    """Return :func:`linear_size` by name for all base layers that are not inside a base layer."""
    found: dict[str, tuple[int, int]] = {}
    outer = None
    for name, module in modules.items():
        size = linear_size(module)
        if size is not None and not (outer and name.startswith(outer)):
            found[name], outer = size, f"{name}."
    return found


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the names and modules of a model, except the factors of adapters.

    For a layer of an adapter pool, this yields the base layer.
    """
    factors: set[nn.Module] = set()
    for name, module in model.named_modules():
        for store in ("lora_A", "lora_B"):
            if isinstance(held := getattr(module, store, None), nn.Module):
                factors.update(held.modules())
        base = module.base if isinstance(module, PoolLayer) else module
        if base not in factors:
            yield name, base


def head_names(model: nn.Module) -> tuple[str | None, str | None]:
    """Return the names of the output head and of the classifier, or None for a missing one.

    PEFT's "all-linear" excludes the head. If there is no head and the task is "SEQ_CLS", PEFT
    excludes the classifier.
    """
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    candidates = (getattr(model, name, None) for name in ("score", "classifier"))
    classifier = next((module for module in candidates if module is not None), None)
    names = {id(module): name for name, module in model.named_modules()}
    return names.get(id(head)), names.get(id(classifier))


# -------------------------------------------------------------------------------------------------
# Layers that are bypassed

# Attributes of a weight that do not depend on its values. Code that reads only these attributes
# does not bypass a layer.
_METADATA = frozenset({"dtype", "device", "shape", "is_meta", "ndim"})

# Children that these classes of transformers call in some models and bypass in other models, by
# reading their weights.
_BY_SETTING = {
    "FalconMambaMixer": ("dt_proj",),
    "JambaMambaMixer": ("dt_proj",),
    "BloomAttention": ("dense",),
    "BloomMLP": ("dense_4h_to_h",),
    "LSHSelfAttention": ("query_key", "value"),  # bypassed during generation with a cache
}


def bypassed(parent: nn.Module) -> frozenset[str]:
    """Return the names of the children that a module bypasses by reading their weights.

    For example, Mamba reads the weight of ``dt_proj``. If such a child were replaced, the new
    module would never be called.
    """
    kind = type(parent)
    found = _read_and_not_called(kind)
    by_setting = _BY_SETTING.get(kind.__name__, ())
    if "Mamba" in kind.__name__ and hasattr(getattr(parent, "config", None), "_is_quantized"):
        by_setting = ()
    if kind.__name__.startswith("Bloom"):
        exact = getattr(parent, "pretraining_tp", 1) > 1 and getattr(parent, "slow_but_exact", 0)
        by_setting = by_setting if exact else ()
    return found.union(by_setting)


@functools.cache
def _read_and_not_called(kind: type) -> frozenset[str]:
    """Return the children of a class whose weight is read in its methods (``self.child.weight``).

    Children with a bare ``self.child`` in any method are excluded, since they may be called.
    """
    methods = [method for _, method in inspect.getmembers(kind, inspect.isfunction)]
    methods = [inspect.unwrap(m) for m in methods if not m.__module__.startswith("torch.nn.")]
    read: set[str] = set()
    for method in methods:
        names = method.__code__.co_names  # excludes names used in nested functions
        if "weight" in names and not any(w in method.__name__ for w in ("init", "tie")):
            read.update(child for child, name in _uses(method) if name == "weight")
    for method in methods if read else ():
        if not read.isdisjoint(method.__code__.co_names):
            read.difference_update(child for child, name in _uses(method) if name is None)
    return frozenset(read)


def _uses(method: Any) -> Iterator[tuple[str, str | None]]:
    """Yield each ``child`` of ``self.child`` in a method's source, and the attribute read from it.

    The second item is the name of the attribute that is read from the child, such as "weight"; or
    "metadata" if only metadata of that attribute is read, such as its dtype or class; or None for
    a bare ``self.child``, which is called or passed to a function.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, TypeError, SyntaxError):  # the source is not available
        return
    above = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)):
            continue
        if node.value.id != "self" or not isinstance(node.ctx, ast.Load):
            continue
        outer = above[node]
        if not isinstance(outer, ast.Attribute):
            yield node.attr, None
            continue
        use = above[outer]
        meta = isinstance(use, ast.Attribute) and use.attr in _METADATA
        meta |= isinstance(use, ast.Call) and getattr(use.func, "id", "") in ("isinstance", "len")
        yield node.attr, "metadata" if meta else outer.attr
