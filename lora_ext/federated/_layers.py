"""Selection of the layers that are trained in a client's model, and copies of the layers' factors
to and from the CPU.

Shape letters: r rank, I inputs and O outputs of a module.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lora_ext._checks import choice, instance, require
from lora_ext.adapter import PREFIX, Key, parse_key
from lora_ext.layers import (
    LayerGroups,
    adapted_layers,
    adapter_parameters,
    block_name,
    kind_of_layer,
)

from ._plan import PATTERN, LayerNotFound, LayerPlan, Pair, check_layers, layer_pairs

Mode = Literal["train", "eval"]
Others = Literal["frozen", "disabled"]


@dataclass(eq=False, repr=False)
class LoraLayerManager:
    """Manager of the adapter's layers in the model of a federated client.

    A layer consists of all the adapter's parameters in one block of the model. A *planned* layer is
    trained. A *frozen* layer applies its adapter, but its parameters require no gradients. A
    *disabled* layer computes only its base layer. The gradients of frozen and disabled layers are
    set to None, so that an optimizer's weight decay does not change the parameters. Modules of the
    adapter outside all blocks are always frozen. The base model's parameters and ``model.training``
    do not change.

    Args:
        model: model with layers of :mod:`lora_ext.nn` or PEFT, before or after ``from_peft``.
        pattern: regular expression for module names; its first group is the index of the layer.
        adapter: name of the adapter to train.
        frozen_dropout: whether frozen layers apply their dropout, as in PEFT.

    Attributes:
        num_layers: number of layers, L.
        modules: for each layer, the names of its modules in the base model.
        blocks: for each layer, the name of its block in the model.
        lowest_trainable: index of the lowest trained layer; None if no layer is trained, or if
            :meth:`apply` has not been called.

    Raises:
        LayerNotFound: If the pattern matches no module of the adapter; if the indices have gaps; or
            if two blocks have the same index.
        ValueError: If the model has no such adapter; or if a layer has scaled outputs, a bias,
            an embedding or routed experts, which payloads do not support.

    Source: Fed-HeLLo (arXiv 2506.12213), local training of the planned layers.
    """

    model: nn.Module
    pattern: str = PATTERN
    adapter: str = "default"
    _: KW_ONLY
    frozen_dropout: bool = True

    def __post_init__(self) -> None:
        adapter, pattern, model = self.adapter, self.pattern, self.model
        self.lowest_trainable: int | None = None
        found: dict[str, Any] = dict(adapted_layers(model, adapter))
        self._groups = LayerGroups(model, adapter, "module")
        state: dict[str, Tensor] = {}
        blocks: dict[str, str] = {}  # name of a module in the base model -> block
        self._layers: dict[str, Any] = {}
        for name, layer in found.items():
            block = block_name(f"{name}.lora_A.weight", pattern)
            if block is None:
                continue
            _check_carried(name, layer, adapter)
            module = name.removeprefix(PREFIX)
            blocks[module], self._layers[module] = block, layer
            for role, store in (("A.weight", layer.lora_A), ("B.weight", layer.lora_B)):
                state[Key(module, role, None).in_file] = store[adapter].weight
        self._pairs = layer_pairs("LoraLayerManager", state, pattern)
        self.num_layers = check_layers("LoraLayerManager", {p.layer for p in self._pairs})
        self.modules = tuple(
            tuple(p.module for p in self._pairs if p.layer == layer)
            for layer in range(self.num_layers)
        )
        self.blocks = tuple(
            _one_block(i, {blocks[m] for m in ms}) for i, ms in enumerate(self.modules)
        )
        # Layers are compared by identity, since names may have prefixes. Layers outside all blocks
        # have no pair, and get None.
        own = {id(self._layers[p.module]): p.layer for p in self._pairs}
        self._layer_of = [(layer, own.get(id(layer))) for layer in found.values()]
        dropouts = [layer.lora_dropout[adapter] for layer in found.values()]
        self._dropout = [d.p if isinstance(d, nn.Dropout) else None for d in dropouts]

    def apply(self, plan: LayerPlan, mode: Mode = "train", others: Others = "frozen") -> None:
        """Set which layers are trained, frozen or disabled, until the next call.

        Args:
            plan: the layers to train. The plan's ranks are only checked. To train a layer at a
                smaller rank, load factors of that rank with :meth:`load_slice`, which sets all
                further ranks to zero. These ranks stay zero in training.
            mode: "train" to train the planned layers, "eval" to freeze them.
            others: state of the layers outside the plan, "frozen" (Fed-HeLLo) or "disabled"
                (LEGEND).

        Raises:
            ValueError: If the model lacks a layer or a rank; if ``mode`` or ``others`` is unknown;
                or if the adapter is merged into the base weight, or not active in a planned layer.
                No layer is changed in this case.
        """
        where = "LoraLayerManager.apply"
        choice(where, "mode", mode, get_args(Mode))
        choice(where, "others", others, get_args(Others))
        self._check_plan(where, plan)
        trained = set(plan.layers) if mode == "train" else set()
        for layer, index in self._layer_of:
            apart = self.adapter not in layer.merged_adapters
            require(apart, where, "model", "an adapter that is not merged", "a merged adapter")
            active = index not in trained or self.adapter in layer.active_adapters
            require(active, where, "model", f"{self.adapter!r} to be active", layer.active_adapters)
        on = [i is None or i in plan.layers or others == "frozen" for _, i in self._layer_of]
        self._groups.set_mask(on)
        for (layer, index), p in zip(self._layer_of, self._dropout, strict=True):
            for parameter in adapter_parameters(layer, self.adapter):
                parameter.requires_grad_(index in trained)
                if index not in trained:
                    parameter.grad = None  # otherwise, an optimizer would still use it
            if p is not None:
                keeps = index in trained or self.frozen_dropout
                layer.lora_dropout[self.adapter].p = p if keeps else 0.0
        self.lowest_trainable = min(trained, default=None)

    @contextlib.contextmanager
    def boundary(self) -> Iterator[None]:
        """Return a context manager that disables gradients below the lowest trained layer.

        Each block below that layer runs under ``no_grad``, even if the block's inputs require
        gradients. Activations are stored only for the other blocks, and the backward pass ends at
        that layer. Modules before and between the lower blocks get no gradients either. If no layer
        is trained, all blocks run under ``no_grad``. Checkpointing of the upper blocks must not be
        reentrant: a reentrant checkpoint computes no gradients if no input requires gradients.
        """
        lowest = self.num_layers if self.lowest_trainable is None else self.lowest_trainable
        without = _WithoutGraph()
        with contextlib.ExitStack() as hooks:
            for block in map(self.model.get_submodule, self.blocks[:lowest]):
                hooks.enter_context(block.register_forward_pre_hook(without.enter))
                # ``always_call`` restores the gradient mode even if the forward raises.
                leave = block.register_forward_hook(without.leave, always_call=True)
                hooks.enter_context(leave)
            hooks.callback(without.end)
            yield

    def state_slice(
        self, layers: Sequence[int] | None = None, ranks: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """Copy the factors of some layers to the CPU.

        Args:
            layers: indices of the layers; None for all layers.
            ranks: for each layer, the number of rows of A and columns of B to copy; None for all.

        Returns:
            A ``(r, I)`` and B ``(O, r)`` by their names in PEFT's files.

        Raises:
            ValueError: If the layers and ranks are not a valid :class:`LayerPlan`, or the model
                lacks a layer or a rank.
            TypeError: If an index or a rank is not an integer.
        """
        plan = LayerPlan(tuple(range(self.num_layers)) if layers is None else layers, ranks)  # pyright: ignore[reportArgumentType]
        self._check_plan("LoraLayerManager.state_slice", plan)
        found: dict[str, Tensor] = {}
        for pair in self._pairs:
            if pair.layer in plan.layers:
                a, b = self._factors(pair)
                rank = plan.rank_of(pair.layer, a.shape[0])
                found[pair.a] = a[:rank].cpu().clone()
                found[pair.b] = b[:, :rank].cpu().clone()
        return found

    @torch.no_grad()
    def load_slice(self, state: Mapping[str, Tensor], strict: bool = True) -> None:
        """Copy factors into the model; factors of a smaller rank are padded with zeros.

        If row j of A and column j of B are both zero, their gradients are zero. Training an adapter
        of rank 8 that is padded to rank 16 is therefore the same as training it at rank 8. The
        adapter's scale does not change.

        Args:
            state: factors from :meth:`state_slice`; names may lack ``base_model.model.``.
            strict: whether to raise for names that are not factors of a layer, and for layers of
                which ``state`` contains only some modules. False skips such names and modules.

        Raises:
            KeyError: If a module lacks one of its two factors.
            ValueError: If a name, shape or dtype does not fit the model, or if a module is missing.
                The model is not changed in this case.
        """
        where = "LoraLayerManager.load_slice"
        by_module = {pair.module: pair for pair in self._pairs}
        found: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            parsed = parse_key(key)
            known = parsed is not None and parsed.module in by_module
            if parsed is None or not known or parsed.role not in ("A.weight", "B.weight"):
                require(not strict, where, key, "the name of a factor in the model", "another name")
                continue
            axis = 0 if parsed.role == "A.weight" else 1
            shape = list(self._factors(by_module[parsed.module])[axis].shape)
            floating = isinstance(value, Tensor) and value.is_floating_point()
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            require(floating, where, key, "a floating-point tensor", kind)
            own = list(value.shape)
            fits = len(own) == len(shape) and 0 < own[axis] <= shape[axis]
            fits = fits and own[:axis] + own[axis + 1 :] == shape[:axis] + shape[axis + 1 :]
            require(fits, where, key, f"shape {shape}, or with a smaller rank", own)
            found.setdefault(parsed.module, {})[parsed.role] = value
        for module, halves in found.items():
            require(len(halves) >= 2, where, module, "lora_A and lora_B", [*halves], KeyError)
            a, b = halves["A.weight"], halves["B.weight"]
            require(a.shape[0] == b.shape[1], where, module, "equal ranks", (a.shape, b.shape))
        touched = {by_module[module].layer for module in found}
        missing = [p.module for p in self._pairs if p.layer in touched and p.module not in found]
        require(not (strict and missing), where, "state", f"factors of {missing[:3]}", "none")
        for module, halves in found.items():
            a, b = self._factors(by_module[module])
            rank = halves["A.weight"].shape[0]
            a.zero_()[:rank].copy_(halves["A.weight"])
            b.zero_()[:, :rank].copy_(halves["B.weight"])

    def _factors(self, pair: Pair) -> tuple[Tensor, Tensor]:
        layer = self._layers[pair.module]
        a, b = (store[self.adapter].weight.detach() for store in (layer.lora_A, layer.lora_B))
        return a, b

    def _check_plan(self, where: str, plan: LayerPlan) -> None:
        instance(where, "plan", plan, LayerPlan)
        for layer in plan.layers:
            expected = f"layers below {self.num_layers}"
            require(layer < self.num_layers, where, "plan.layers", expected, layer)
        for pair in self._pairs:
            if pair.layer in plan.layers:
                full = self._factors(pair)[0].shape[0]
                rank = plan.rank_of(pair.layer, full)
                expected = f"at most {full}, the rank of {pair.module}"
                require(rank <= full, where, "plan.ranks", expected, rank)


class _WithoutGraph:
    """Hooks that disable gradients before the forward of a block, and restore them after it."""

    def __init__(self) -> None:
        # One stack of previous settings per thread, since two threads may run one model.
        self._before = threading.local()
        self._ended = False

    def __deepcopy__(self, _memo: Any) -> _WithoutGraph:
        return self  # copies of the model share this object, so that `end` disables their hooks

    def end(self) -> None:
        """Disable the hooks, including those on copies of the model."""
        self._ended = True

    def enter(self, *_: Any) -> None:
        # A stack, since a checkpoint may rerun a block within another block's forward.
        stack: list[bool] = self._before.__dict__.setdefault("stack", [])
        stack.append(torch.is_grad_enabled())
        torch.set_grad_enabled(self._ended and stack[-1])

    def leave(self, *_: Any) -> None:
        torch.set_grad_enabled(self._before.stack.pop())


@contextlib.contextmanager
def forwards(replaced: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Return a context manager in which the ``forward`` of modules is replaced."""
    # Only instance attributes are restored, such as those that accelerate sets. For other modules,
    # deleting the attribute restores the class's forward.
    before = {module: module.__dict__.get("forward") for module in replaced}
    try:
        for module, forward in replaced.items():
            module.forward = forward
        yield
    finally:
        for module, own in before.items():
            module.__dict__.pop("forward", None)
            if own is not None:
                module.forward = own


@contextlib.contextmanager
def assigned(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Return a context manager in which an attribute of an object is replaced."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _one_block(layer: int, names: set[str]) -> str:
    expected = f"one block of index {layer}"
    found = f"{sorted(names)}; name the stack in the pattern, as in r'decoder\\.layers\\.(\\d+)\\.'"
    require(len(names) <= 1, "LoraLayerManager", "pattern", expected, found, LayerNotFound)
    return names.pop()


def _check_carried(name: str, layer: Any, adapter: str) -> None:
    where = f"LoraLayerManager: {name}"
    found = None
    kind = kind_of_layer(layer, adapter)
    if not kind.sums:
        found = kind.title
    elif layer.lora_bias[adapter]:
        found = "a bias"
    elif adapter not in layer.lora_A:
        found = f"parameters of a {type(layer).__name__}"
    elif getattr(layer, "num_experts", 1) > 1:  # The rows of A are grouped by expert, not by rank.
        found = f"a pair for each of {layer.num_experts} experts"
    require(found is None, where, repr(adapter), "only lora_A and lora_B", found)
