"""PEFT's layers, and comparisons of our layers with them."""

import copy
from collections.abc import Callable

import torch
from common import MIN_PEER_ERROR, error_over_bound
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn

# Difference of float32 sums of some tens of products of order one, added in two orders.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def peft_layer(base: nn.Module, *settings: dict, seed: int = 0) -> PeftLinear:
    """Return PEFT's layer with random adapters "0", "1", ..., one per config in ``settings``."""
    torch.manual_seed(seed)
    configs = [
        LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": False, **s}) for s in settings
    ]
    layer = PeftLinear(base, "0", configs[0], r=configs[0].r, lora_alpha=configs[0].lora_alpha)
    for i, c in enumerate(configs[1:], 1):
        layer.update_layer(str(i), c.r, lora_alpha=c.lora_alpha, config=c)
    layer.set_adapter([str(i) for i in range(len(configs))])
    return layer


def gradients(y: Tensor, layer: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    """Return the gradients of x and the parameters, for a loss with a different weight for each
    entry of y. Reset the gradients to None."""
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float32).reshape(y.shape)
    (y.float() * weights).sum().backward()
    found = {"x": x.grad, **{n: p.grad for n, p in layer.named_parameters()}}
    x.grad = None
    layer.zero_grad(set_to_none=True)
    return found


def assert_same(
    layer: PeftLinear, x: Tensor, ours: Callable[[], Tensor], theirs: Callable[[], Tensor]
) -> None:
    """Check that the results and gradients of ``ours`` are about as close to those of ``theirs`` in
    float64 as ``theirs`` is in the dtype of ``x``."""
    mine, peft = _results(ours, layer, x), _results(theirs, layer, x)
    dtype = x.dtype
    layer.double()
    x.data = x.data.double()
    exact = _results(theirs, layer, x)
    layer.to(dtype)
    x.data = x.data.to(dtype)
    assert_within(mine, peft, exact)


def assert_layers_agree(ours: nn.Module, theirs: nn.Module, x: Tensor, **names) -> None:
    """Compare the outputs and gradients of two layers. ``names`` is the ``adapter_names`` argument
    of PEFT, which is our ``adapter_ids``."""
    mine = _results(lambda: ours(x, *names.values()), ours, x)
    peft = _results(lambda: theirs(x, **names), theirs, x)
    wide = copy.deepcopy(theirs).double()
    x64 = x.detach().double().requires_grad_() if x.is_floating_point() else x
    assert_within(mine, peft, _results(lambda: wide(x64, **names), wide, x64))


Results = dict[str, Tensor | None]


def _results(run: Callable[[], Tensor], layer: nn.Module, x: Tensor) -> Results:
    y = run()
    return {"y": y.detach(), **gradients(y, layer, x)}


def assert_within(mine: Results, peft: Results, exact: Results) -> None:
    """Check that our errors are within a bound derived from PEFT's errors on the same data."""
    assert mine.keys() == peft.keys()
    for name, true in exact.items():
        ours, other = mine[name], peft[name]
        assert (ours is None) == (other is None), name
        if ours is not None and other is not None and true is not None:
            assert ours.dtype == other.dtype and ours.shape == other.shape, name
            least = 2.0**-46 if other.dtype == torch.float64 else MIN_PEER_ERROR
            worst = error_over_bound(ours, other, true, least) if ours.numel() else 0
            assert worst <= 1, f"{name}: the error is {worst:.3g} times the bound"


def assert_as_exact(run, ours: nn.Module, theirs: nn.Module, x: Tensor, unit: float) -> None:
    """Check that ``run(x)`` and the gradients in ``ours`` have at most the error of PEFT's, plus
    one rounding of every entry.

    PEFT rounds more often, so single entries of the two results need not be close to each other.
    """
    y, expected = run(x), theirs(x)
    assert y.dtype == expected.dtype
    mine = {"y": y.detach(), **gradients(y, ours, x)}
    peft = {"y": expected.detach(), **gradients(expected, theirs, x)}
    with torch.autocast("cpu", enabled=False):
        wide, x64 = copy.deepcopy(theirs).double(), x.detach().double().requires_grad_()
        y64 = wide(x64)
        exact = {"y": y64.detach(), **gradients(y64, wide, x64)}
    for name, true in exact.items():
        ours_off, peft_off = ((g[name].double() - true).norm() / true.norm() for g in (mine, peft))
        assert ours_off <= peft_off + unit, name
