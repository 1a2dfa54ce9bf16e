"""Layers of a model turned on and off for one client, and their tensors taken out and put in."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lora_ext._checks import choice, instance, require
from lora_ext.adapter import PREFIX, Key, parse_key
from lora_ext.layers import LayerGroups, adapted_layers, adapter_parameters, block_name

from ._plan import PATTERN, LayerNotFound, LayerPlan, Pair, check_layers, layer_pairs

Mode = Literal["train", "eval"]
Others = Literal["frozen", "disabled"]


class LoraLayerManager:
    """The adapter of a model as a client of a federation sees it: a row of layers.

    A layer is all that the adapter has in one block of the model. A *planned* layer trains. Another
    is *frozen*: it computes, and its tensors take no gradient; or *disabled*: it is its base layer
    and nothing more. Neither leaves anything to an optimizer, whose weight decay would move it.
    Modules of the adapter outside all layers are always frozen. The base model's own parameters,
    and ``model.training``, are left alone.

    Args:
        model: its layers are :mod:`lora_ext.nn`'s or PEFT's, before or after ``from_peft``.
        pattern: finds the index of a layer in a module's name; its first group is the index.
        adapter: the adapter that is federated.
        frozen_dropout: False switches the dropout of frozen layers off. PEFT leaves it on.

    Attributes:
        num_layers: L. modules: for each layer the names of its modules in the base model.
        blocks: for each layer the name of its block in the model.
        lowest_trainable: the lowest layer that trains, None where none does, as before the first
            :meth:`apply`.

    Raises:
        LayerNotFound: the pattern finds no module of the adapter, indices with gaps, or two blocks
            of one index. ValueError: no such adapter; DoRA, a bias of the adapter, an embedding
            or routed experts in a layer, which no payload carries, naming the module.

    Source: Fed-HeLLo (arXiv 2506.12213), local training of the planned layers.
    """

    def __init__(
        self,
        model: nn.Module,
        pattern: str = PATTERN,
        adapter: str = "default",
        *,
        frozen_dropout: bool = True,
    ):
        self.model = model
        self.adapter = adapter
        self.frozen_dropout = frozen_dropout
        self.lowest_trainable: int | None = None
        found: dict[str, Any] = dict(adapted_layers(model, adapter))
        self._groups = LayerGroups(model, adapter, "module")
        state: dict[str, Tensor] = {}
        blocks: dict[str, str] = {}  # by a module's name in the base model
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
        # By identity: layers that PEFT adapts elsewhere have no pair, and names may have prefixes.
        own = {id(self._layers[p.module]): p.layer for p in self._pairs}
        self._layer_of = [(layer, own.get(id(layer))) for layer in found.values()]
        dropouts = [layer.lora_dropout[adapter] for layer in found.values()]
        self._dropout = [d.p if isinstance(d, nn.Dropout) else None for d in dropouts]

    def apply(self, plan: LayerPlan, mode: Mode = "train", others: Others = "frozen") -> None:
        """Turn the layers of the model to a plan, until the next call.

        Args:
            plan: its ranks are checked and otherwise left to :meth:`load_slice`: rows of A and
                columns of B that are zero stay so in training.
            mode: "train" lets the planned layers train; with "eval" nothing does.
            others: what the layers outside the plan are, "frozen" (Fed-HeLLo) or "disabled"
                (LEGEND).

        Raises:
            ValueError: a layer or a rank that the model lacks; another mode; an adapter that is
                merged into the base weight, or not active in a layer that is to train. No layer has
                changed then.
        """
        where = "LoraLayerManager.apply"
        choice(where, "mode", mode, get_args(Mode))
        choice(where, "others", others, get_args(Others))
        self._check_plan(where, plan)
        trained = set(plan.layers) if mode == "train" else set()
        for layer, index in self._layer_of:
            apart = self.adapter not in layer.merged_adapters
            require(apart, where, "model", "an adapter apart from the base weight", "it merged")
            active = index not in trained or self.adapter in layer.active_adapters
            require(active, where, "model", f"{self.adapter!r} to be active", layer.active_adapters)
        on = [i is None or i in plan.layers or others == "frozen" for _, i in self._layer_of]
        self._groups.set_mask(on)
        for (layer, index), p in zip(self._layer_of, self._dropout, strict=True):
            for parameter in adapter_parameters(layer, self.adapter):
                parameter.requires_grad_(index in trained)
                if index not in trained:
                    parameter.grad = None  # an optimizer would still apply it
            if p is not None:
                keeps = index in trained or self.frozen_dropout
                layer.lora_dropout[self.adapter].p = p if keeps else 0.0
        self.lowest_trainable = min(trained, default=None)

    @contextlib.contextmanager
    def boundary(self) -> Iterator[None]:
        """A block in which no autograd graph is built below the lowest layer that trains.

        The forward of each block below it runs without gradients, so that activations and backward
        shrink to the trained suffix, even where something makes the inputs require gradients.
        Whatever else is below gets no gradient either. Without a layer that trains this holds for
        all blocks. Checkpointing of the blocks above must not be the reentrant kind, which trains
        nothing where its inputs require no gradients.
        """
        lowest = self.num_layers if self.lowest_trainable is None else self.lowest_trainable
        without = _WithoutGraph()
        with contextlib.ExitStack() as hooks:
            for block in map(self.model.get_submodule, self.blocks[:lowest]):
                hooks.enter_context(block.register_forward_pre_hook(without.enter))
                # Called where the forward raises too: else gradients would stay off.
                leave = block.register_forward_hook(without.leave, always_call=True)
                hooks.enter_context(leave)
            hooks.callback(without.end)
            yield

    def state_slice(
        self, layers: Sequence[int] | None = None, ranks: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """Copies of the factors of some layers, on the CPU.

        Args:
            layers: indices; None for all. ranks: one for each, the first rows of A and columns of B
                that are taken; None for all of them.

        Returns:
            by the names that PEFT's files have: A ``(r, I)``, B ``(O, r)``.

        Raises:
            ValueError, TypeError: what :class:`LayerPlan` refuses; layers or ranks that the model
                lacks.
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
        """Put factors into the model; those of a smaller rank are filled up with zeros.

        A row of A and a column of B that are both zero get zero gradients: an adapter of rank 8
        filled up to 16 trains as one of rank 8 does. The scale is the model's.

        Args:
            state: as :meth:`state_slice` gives it, or with names from the base model.
            strict: False skips names that are no factors of a layer. True also wants every module
                of a layer that has any.

        Raises:
            KeyError: a factor without the other. ValueError: a name that the model lacks, a module
                that is missing, a shape or dtype that does not fit. The model has not changed then.
        """
        where = "LoraLayerManager.load_slice"
        by_module = {pair.module: pair for pair in self._pairs}
        found: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            parsed = parse_key(key)
            known = parsed is not None and parsed.module in by_module
            if parsed is None or not known or parsed.role not in ("A.weight", "B.weight"):
                require(not strict, where, key, "a factor of a layer of the model", "none")
                continue
            axis = 0 if parsed.role == "A.weight" else 1
            shape = list(self._factors(by_module[parsed.module])[axis].shape)
            floating = isinstance(value, Tensor) and value.is_floating_point()
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            require(floating, where, key, "a floating tensor", kind)
            own = list(value.shape)
            fits = len(own) == len(shape) and 0 < own[axis] <= shape[axis]
            fits = fits and own[:axis] + own[axis + 1 :] == shape[:axis] + shape[axis + 1 :]
            require(fits, where, key, f"shape {shape} or one of a smaller rank", own)
            found.setdefault(parsed.module, {})[parsed.role] = value
        for module, halves in found.items():
            require(len(halves) >= 2, where, module, "lora_A and lora_B", [*halves], KeyError)
            a, b = halves["A.weight"], halves["B.weight"]
            require(a.shape[0] == b.shape[1], where, module, "one rank", [*a.shape, *b.shape])
        touched = {by_module[module].layer for module in found}
        missing = [p.module for p in self._pairs if p.layer in touched and p.module not in found]
        require(not (strict and missing), where, "state", f"{missing[:3]} as well", "none")
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
            expected = f"below {self.num_layers}"
            require(layer < self.num_layers, where, "plan.layers", expected, layer)
        for pair in self._pairs:
            if pair.layer in plan.layers:
                full = self._factors(pair)[0].shape[0]
                rank = plan.rank_of(pair.layer, full)
                expected = f"at most {full}, as {pair.module} has"
                require(rank <= full, where, "plan.ranks", expected, rank)


class _WithoutGraph:
    """Hooks around a block that switch gradients off for it, and back to what they were."""

    def __init__(self) -> None:
        self._before = threading.local()  # two threads may run one model
        self._ended = False

    def __deepcopy__(self, _memo: Any) -> _WithoutGraph:
        return self  # a model copied in the block has the hooks too, and they end with it

    def end(self) -> None:
        """Change nothing from now on, where a copy of the model still has the hooks."""
        self._ended = True

    def enter(self, *_: Any) -> None:
        # A stack, as a checkpoint runs a block again within the forward of another.
        stack: list[bool] = self._before.__dict__.setdefault("stack", [])
        stack.append(torch.is_grad_enabled())
        torch.set_grad_enabled(self._ended and stack[-1])

    def leave(self, *_: Any) -> None:
        torch.set_grad_enabled(self._before.stack.pop())


@contextlib.contextmanager
def forwards(replaced: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """A block in which modules have other forwards."""
    # Forwards of the objects themselves, as accelerate puts them there; the class's is no entry.
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


def _one_block(layer: int, names: set[str]) -> str:
    expected = f"one block of index {layer}"
    found = f"{sorted(names)}; name the stack in the pattern, as in r'decoder\\.layers\\.(\\d+)\\.'"
    require(len(names) <= 1, "LoraLayerManager", "pattern", expected, found, LayerNotFound)
    return names.pop()


def _check_carried(name: str, layer: Any, adapter: str) -> None:
    where = f"LoraLayerManager: {name}"
    found = None
    if layer.use_dora[adapter]:
        found = "DoRA"
    elif layer.lora_bias[adapter]:
        found = "a bias"
    elif adapter not in layer.lora_A:
        found = f"those of a {type(layer).__name__}"
    elif getattr(layer, "num_experts", 1) > 1:  # their rows go expert by expert: no rank is a slice
        found = f"a pair for each of {layer.num_experts} experts"
    require(found is None, where, repr(adapter), "lora_A and lora_B alone", found)
