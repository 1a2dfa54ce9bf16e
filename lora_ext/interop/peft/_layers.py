"""PEFT's LoRA layers with a ``forward`` that uses lora_ext's kernels.

If the kernels do not support a call, PEFT's own ``forward`` runs: for example, if an adapter has a
rare variant or a learned scaling, or if PEFT has to raise an error for the arguments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from peft.tuners.lora import dora
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.variants import ALoraLinearVariant, ArrowLinearVariant, DoraLinearVariant
from torch import Tensor, nn

from lora_ext import ops
from lora_ext._checks import require
from lora_ext._torch import compiles
from lora_ext.layers import (
    DenseParameters,
    LoraFactors,
    dense_parameters,
    dropout_now,
    forward_of_the_rest,
    is_plain,
    lora_forward,
    scaled_forward,
)
from lora_ext.rows import BASE, Assignment, Layout, together

from ._adapters import no_gradients_without_rows, refuse_exact, taking_part
from ._names import activated, names_of_layer, offsets_of_layer, rows_of_offsets
from ._routers import arrow_forward, arrow_uncovered

# Keyword arguments of a forward that have one entry per row.
_OF_ROWS = {"adapter_names", "alora_offsets"}
_VARIANTS = DoraLinearVariant, ALoraLinearVariant, ArrowLinearVariant


def uncovered(module: Any, adapter: str) -> str | None:
    """Return why PEFT's forward must run with a layer's adapter; None if lora_ext can run it."""
    variant = module.lora_variant.get(adapter)
    if variant is not None and type(variant) not in _VARIANTS:
        return f"adapter {adapter!r} is a {type(variant).__name__}"
    if type(variant) is ArrowLinearVariant and (why := arrow_uncovered(module, adapter)):
        return why
    dora = type(variant) is DoraLinearVariant
    if dora and dense_parameters(module.base_layer, divided=True) is None:
        return f"adapter {adapter!r} uses DoRA on a {type(module.base_layer).__name__}"
    a, b = module.lora_A[adapter], module.lora_B[adapter]
    plain = type(a) is type(b) is nn.Linear and a.bias is None
    if not (plain and is_plain(a, divided=True) and is_plain(b, divided=True)):
        return f"adapter {adapter!r} has factors that are not plain Linear, or that have hooks"
    scaling = module.scaling[adapter]
    if isinstance(scaling, Tensor):
        if scaling.numel() != 1 or scaling.requires_grad:
            return f"adapter {adapter!r} has a scaling of several values, or one that is learned"
    elif not isinstance(scaling, int | float):
        return f"adapter {adapter!r} has a scaling of type {type(scaling).__name__}"
    dropout = module.lora_dropout[adapter]
    if type(dropout) not in (nn.Dropout, nn.Identity) or not is_plain(dropout, True):
        return (
            f"adapter {adapter!r} has a {type(dropout).__name__} as its dropout, or has hooks on it"
        )
    if getattr(dropout, "p", 0.0) >= 1.0:
        return f"adapter {adapter!r} has dropout 1"
    return None


class Fused(PeftLinear if TYPE_CHECKING else object):
    """Mixin for a layer class of PEFT: one op computes the updates, another one their gradients.

    If the base layer is a plain linear layer, the same op computes the base layer's product. Place
    the mixin before PEFT's class, which is :attr:`of_peft`. Shape letters: ``I`` input features,
    ``O`` output features.
    """

    asks_what_is_off = True
    #: True if the first dimension of the input is the tokens and the second is the sequences.
    tokens_first = False
    of_peft: ClassVar[Any]
    #: False if the forward of :attr:`of_peft` has no argument ``adapter_names``.
    peft_takes_names: ClassVar[bool] = True
    uncovered = uncovered

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output that PEFT computes, with an adapter per sequence if there are names.

        Args:
            x: input ``(..., I)``.
            kwargs: ``adapter_names``, one name per sequence, which is also accepted in training and
                for DoRA.

        Returns:
            Output ``(..., O)``.

        Raises:
            ValueError: If the number of names is not the number of sequences, or if there are names
                and adapters are merged; PEFT raises it.
            RuntimeError: If another library's checkpoint recomputes the layer without its names.
        """
        names = kwargs.get("adapter_names")
        given = names_of_layer(self, names)
        if given is not None and given.mixed and (self._disable_adapters or self.merged):
            kwargs["adapter_names"] = [BASE] * len(given.places)  # PEFT cannot hash mixtures.
        offsets = offsets_of_layer(kwargs.get("alora_offsets"))
        if offsets is not None:
            kwargs["alora_offsets"] = offsets
        if args or kwargs.keys() - _OF_ROWS or self._disable_adapters or self.merged:
            return self._forward_of_peft(x, *args, **kwargs)
        present, rows, trained = taking_part(self, given)
        begin = activated(self, present)
        # If the number of names does not match the input, PEFT's forward runs and raises.
        sequences = x.shape[1:2] if self.tokens_first else x.shape[:1]
        fits = given is None or sequences == given.shape
        left = [why for why in map(self.uncovered, present) if why is not None]
        routers = [n for n in present if type(self.lora_variant.get(n)) is ArrowLinearVariant]
        if routers and (len(present) > 1 or rows is not None):
            left.append(f"adapter {routers[0]!r} routes tokens, and other adapters are in use")
        if begin and fits:
            whole = Assignment.of_entries(present, ()) if rows is None else rows
            one = len(present) == 1 or rows is not None
            turned = compiles() or self.tokens_first or not one
            of_tokens = None if turned else rows_of_offsets(whole, begin, offsets, x.shape[:-1])
            rows = rows if of_tokens is None else of_tokens
            if of_tokens is None:
                left.append(f"adapter {begin[0]!r} starts in the middle of a sequence")
        if not fits or left:
            return self._refused(x, given, left, fits, trained, kwargs)
        if not present:
            return self.base_layer(x)
        if routers:
            return arrow_forward(self, x, routers[0])
        of_rows = None
        if rows is not None:
            layout = Layout(x.shape[:-1], x.device, self.tokens_first)
            of_rows = together(rows.rows_among(present, layout, mixes=True), trained)
        factors = [self.factors_of(name) for name in present]
        for i, name in enumerate(present):
            if self._is_dora(name):
                kept: Any = self.lora_magnitude_vector[name]
                weight, used = self._dense()[0], of_rows is None or i in of_rows.used
                norm = _norm(kept, weight, factors[i], adapter_name=name) if used else None
                factors[i] = factors[i]._replace(magnitude=kept.weight, norm=norm)
        if all(f.magnitude is None for f in factors):
            return lora_forward(x, self.base_layer, factors, of_rows)
        return scaled_forward(x, self.base_layer, self._dense, factors, of_rows)

    def _refused(
        self,
        x: Tensor,
        given: Any,
        left: list[str],
        fits: bool,
        trained: Any,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Call PEFT's forward for the reasons ``left``; raise if its result would be wrong."""
        reasons = "; ".join(left)
        refuse_exact(self.base_layer, reasons)
        if fits and trained:
            raise no_gradients_without_rows(reasons)
        if given is None:
            return self._forward_of_peft(x, **kwargs)
        where, expected = "from_peft", "adapters that lora_ext can run in one batch with mixtures"
        mixed = fits and given.mixed
        require(not mixed, where, "adapter_names", expected, reasons, NotImplementedError)
        kwargs["adapter_names"] = given.plain()
        if self.tokens_first and x.dim() > 2:  # PEFT's forward expects sequences first.
            turned = self._forward_of_peft(x.transpose(0, 1), **kwargs)
            return turned.transpose(0, 1).contiguous()  # Some models call `view` on the output.
        return self._forward_of_peft(x, **kwargs)

    def left(self) -> set[str | None]:
        """Return the reasons why PEFT must run some adapters of the layer.

        The set contains None if lora_ext can run an adapter.
        """
        return {self.uncovered(name) for name in self.lora_A}

    def unmixed(self, name: str, together: bool) -> str | None:
        """Return why an adapter cannot be in a mixture, or None if it can.

        ``together`` is True if the mixture contains several adapters.
        """
        if self._is_dora(name):
            return "it uses DoRA, and a rescaled output has no weighted sum"
        if together and activated(self, (name,)):
            return "it is an aLoRA, which must be the only adapter of a row"
        return None

    def _dense(self) -> DenseParameters:
        found = dense_parameters(self.base_layer, divided=True)
        assert found is not None  # `uncovered` has excluded base layers without dense parameters
        return found

    def _forward_of_peft(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs and not self.peft_takes_names:
            if not self._disable_adapters:
                kind, found = type(self).__name__, kwargs.get("adapter_names")
                raise ValueError(
                    "from_peft: adapter_names: expected one name per sequence and adapters that "
                    f"lora_ext computes, found {found!r:.200} for an input of shape "
                    f"{tuple(x.shape)}; PEFT's {kind} takes no names"
                )
            kwargs = {}
        return forward_of_the_rest(self.of_peft.forward, self, x, *args, **kwargs)

    def factors_of(self, name: str) -> LoraFactors:
        """Return the parameters of an adapter for :func:`lora_forward`, without copying them."""
        p = dropout_now(self.lora_dropout[name])
        a: Any = self.lora_A[name]
        b: Any = self.lora_B[name]
        return LoraFactors(a.weight, b.weight, self.scaling[name], p, b.bias)

    def _is_dora(self, name: str) -> bool:
        return type(self.lora_variant.get(name)) is DoraLinearVariant


class FusedLinear(Fused, PeftLinear):
    """PEFT's ``lora.Linear`` with a fused forward."""

    of_peft = PeftLinear


# ``repr``, ``get_layer_status``, ``get_model_status`` and model cards print ``__name__``, which
# should be PEFT's. Pickle finds the class by its qualified name, which does not change.
FusedLinear.__name__ = PeftLinear.__name__


# PEFT 0.18 has no ``DoraCaching``.
_cached = getattr(dora, "cache_decorator", lambda _key: lambda function: function)


@_cached("weight-norm")
def _norm(_: Any, weight: Tensor, factors: LoraFactors, *, adapter_name: str) -> Tensor:
    """Return the weight norm of each output for a DoRA adapter.

    Inside PEFT's ``DoraCaching``, PEFT's decorator caches the result in ``_``, the DoRA layer.
    """
    return ops.lora_dora_norm(weight, factors.a, factors.b, factors.scaling)
