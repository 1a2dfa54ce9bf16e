"""Base class of layers that replace a base module and add the adapters of a pool."""

from __future__ import annotations

import copy
import functools
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_ext._checks import require

from ._assignment import TokensFirstError
from ._attachment import Pool, pool_handle
from ._context import of_call
from ._entries import Entry
from ._rows import Rows

if TYPE_CHECKING:
    from typing_extensions import Self

    from ._context import Block

#: Attributes of ``nn.Module`` that a layer shares with its base module.
_STATE = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_SIZES = (("in_features", "out_features"), ("nx", "nf"), ("num_embeddings", "embedding_dim"))


#: Value of ``default`` with which a forward outside every block raises RuntimeError.
ERROR = "error"


def no_block(where: str = "") -> RuntimeError:
    """Return the error for a forward outside every block."""
    return RuntimeError(
        "attach: default='error': expected an adapters block around every forward, found none"
        f"{where}; enter lora_ext.adapters(...) in this thread, or pass adapter_names= to the call"
    )


_warned: set[int] = set()  # handles of the pools for which `_warn_of_backward` has warned


def _warn_of_backward(handle: int, name: str, _: Tensor) -> None:
    """Warn once per pool that the base model's parameters get gradients and adapters do not."""
    if handle not in _warned:
        _warned.add(handle)
        warnings.warn(
            "attach: backward: expected frozen parameters in the base model, found parameters of "
            f"{name!r} that require gradients; adapters of a pool get no gradients, so an "
            "optimizer would train the base model. Freeze it with model.requires_grad_(False); "
            "to train adapters, call lora_ext.from_peft or lora_ext.nn.wrap. Gradients that no "
            "optimizer uses, such as those of torch.autograd.grad for attribution, are correct",
            stacklevel=1,
        )


class PoolLayer(nn.Module):
    """Base class of layers that apply the adapters of a pool to a base module.

    The layer shares the dicts of parameters, buffers and children with ``base`` and adds no state.
    The keys of checkpoints therefore do not change, ``.to()`` and ``load_state_dict`` act on
    ``base``, and ``layer.weight`` is ``base.weight``.
    """

    base: nn.Module
    pool: Pool
    name: str
    handle: int

    #: True if the input is (tokens, sequences, ...), as in XLNet. Set at the first batch in which
    #: the numbers of tokens and sequences differ.
    tokens_first = False

    #: True if all sequences share the rows of this layer. The number of these rows can be equal to
    #: the number of names by chance.
    shared = False

    #: Entry for forwards outside every block; None for the base model; "error" to raise
    #: RuntimeError.
    default: Entry = None
    #: ``default`` as text for the error message of compiled graphs, or None.
    default_text: str | None = None

    #: True for the output head, which may receive only some of the tokens, for example the last of
    #: each sequence; see :attr:`Block.head`.
    is_head = False

    def __init__(self, base: nn.Module, pool: Pool, name: str):
        super().__init__()
        known = name in pool.modules
        require(known, type(self).__name__, "name", "a module of the pool", repr(name))
        self.slab = slab = pool.modules[name]
        sizes = slab.in_features, slab.out_features
        for inner, outer in _SIZES:
            if hasattr(base, inner) and hasattr(base, outer):
                found = getattr(base, inner), getattr(base, outer)
                expected = f"in and out features {sizes} as in the pool"
                require(found == sizes, type(self).__name__, name, expected, found)
                break
        self.stand_in(base, pool, name)

    def stand_in(self, base: nn.Module, pool: Pool, name: str) -> None:
        """Share the state of ``base`` with this layer, and store the arguments."""
        for state in _STATE:
            self.__dict__[state] = base.__dict__[state]
        # `base` is not registered as a child, since this would prefix every key with "base.".
        self.__dict__.update(base=base, pool=pool, name=name, handle=pool_handle(pool))
        self.training = base.training

    def rows_in(
        self, block: Block, leading: torch.Size, device: torch.device, of_tokens: bool = False
    ) -> Rows:
        """Return the rows of this layer's input, with the adapters that a block assigns to them."""
        if self.shared and block.assignment.shape != ():
            raise ValueError(
                "adapters: names: expected one name for all sequences, as in adapters('name'), "
                f"found {block}; all sequences share the input rows of {self.name!r}"
            )
        try:
            return block.rows(leading, device, self.tokens_first, of_tokens)
        except TokensFirstError:
            self.tokens_first = True
            return block.rows(leading, device, True, of_tokens)
        except ValueError as error:
            raise ValueError(f"{error} at {self.name!r}; {block.remedy()}") from error

    def by_default(self, x: Any, *args: Any) -> Any:
        """Return the output of a forward outside every block, with the default adapter.

        Raises:
            RuntimeError: If the default is "error".
        """
        if self.default == ERROR:
            raise no_block(f" at {self.name!r}")
        with of_call(self.default, pool=self.pool):
            return self(x, *args)

    def watch_backward(self, y: Tensor) -> None:
        """Register a hook on the output ``y`` that warns in the backward pass.

        No hook is registered unless a parameter of ``base`` requires gradients.
        """
        if y.requires_grad and self.handle not in _warned:
            if any(parameter.requires_grad for parameter in self.base.parameters()):
                y.register_hook(functools.partial(_warn_of_backward, self.handle, self.name))

    def train(self, mode: bool = True) -> Self:
        """Set the mode of this layer and of ``base``."""
        self.base.train(mode)
        return super().train(mode)

    def extra_repr(self) -> str:
        """Return a string with the base module and the number of slots."""
        return f"base={self.base}, slots={self.pool.max_slots}"

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of ``base``, such as in_features or nf, if the layer lacks it."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base" not in self.__dict__:
                raise
            return getattr(self.__dict__["base"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute of this layer, or of ``base`` if only ``base`` has it.

        The dicts of parameters, buffers and children are set on both, because compressed-tensors
        replaces them when the model is first called.
        """
        base = self.__dict__.get("base")
        if name == "qconfig":  # torch.ao.quantization sets it on every module before quantising
            warnings.warn(
                "attach: model: expected a model that is quantised before attach, found an "
                "attached one: torch.ao.quantization does not change its layers; detach it first",
                stacklevel=2,
            )
        if base is not None and name in _STATE:
            self.__dict__[name] = base.__dict__[name] = value
        elif name in getattr(base, "__dict__", ()) and not (
            name in self.__dict__ or hasattr(type(self), name)
        ):
            setattr(base, name, value)
        else:
            super().__setattr__(name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a layer with a copy of ``base`` and the same pool."""
        layer = type(self)(copy.deepcopy(self.base, memo), self.pool, self.name)
        for setting in ("tokens_first", "shared", "default", "default_text", "is_head"):
            setattr(layer, setting, getattr(self, setting))
        return layer

    # Call the methods of ``base``, because quantised subclasses of nn.Linear override them.
    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.base._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.base._load_from_state_dict(*args, **kwargs)


def pool_of(model: nn.Module) -> Pool | None:
    """Return the pool that a model is attached to, or None if it is not attached."""
    return next((layer.pool for layer in model.modules() if isinstance(layer, PoolLayer)), None)
