"""Sibling layers share one op only if they get the identical tensor, which changes no bit."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from backends import Backend
from torch import Tensor, nn
from torch.nn.utils import prune
from two_layers import Adapter, random_adapter

import lora_ext
from lora_ext.serving.layers import _siblings

WIDTH, OUTS = 24, {"q": 24, "k": 16, "v": 16, "o": 24}
ROWS = ["red", None, "blue"]

pytestmark = pytest.mark.usefixtures("shared_on_cpu")


class Attention(nn.Module):
    """Four layers. q, k and v have the same input unless ``states``, another input of k and v, is
    given."""

    def __init__(self) -> None:
        super().__init__()
        for name, out in OUTS.items():
            setattr(self, name, nn.Linear(WIDTH, out))

    def forward(self, x: Tensor, states: Tensor | None = None) -> Tensor:
        seen = x if states is None else states
        y = torch.cat([self.q(x), self.k(seen), self.v(seen)], -1)
        return torch.cat([y, self.o(y[..., :WIDTH])], -1)


def adapter(rank: int, targets: str, **fields: Any) -> Adapter:
    return random_adapter({name: (WIDTH, OUTS[name]) for name in targets}, rank, rank, **fields)


def make(fuse: bool = True, red: Any = None, blue: Any = None, **how: Any) -> Any:
    torch.manual_seed(0)
    model = Attention().eval()
    pool = lora_ext.AdapterPool(model, max_slots=4, max_rank=16)
    pool.load("red", red or adapter(3, "qkvo"))
    pool.load("blue", blue or adapter(12, "qkvo", lora_bias=True))
    return lora_ext.attach(model, pool, fuse_siblings=fuse, **how)


def inputs(seed: int = 7) -> Tensor:
    return torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(seed))


@contextmanager
def serving(model: Any, names: Any = ROWS) -> Iterator[None]:
    with torch.no_grad(), lora_ext.adapters(names, pool=model.q.pool):
        yield


def kept(model: Any) -> list[Tensor]:
    first = model.q.siblings._thread.call
    return [] if first is None else list(first.outputs.values())


def taught(**how: Any) -> tuple[Any, Any]:
    """Return a model that has detected its siblings, and a model without sharing."""
    model, plain = make(**how), make(**{**how, "fuse": False})
    with serving(model):
        model(inputs())
    return model, plain


def agree(model: Any, plain: Any, run: Callable[[Any], Tensor], names: Any = ROWS) -> None:
    with serving(plain, names):
        expected = run(plain)
    with serving(model, names):
        assert torch.equal(run(model), expected)


# --- detecting siblings -------------------------------------------------------------------------
def test_siblings_are_detected_in_the_first_forward_and_shared_later(fused: list[int]) -> None:
    model, plain = make(), make(fuse=False)
    for seed in range(3):
        agree(model, plain, lambda m, seed=seed: m(inputs(seed)))
        assert fused == [3] * seed
        assert kept(model) == []
    x = inputs()
    # In each call, the siblings share an op.
    agree(model, plain, lambda m: torch.cat([m(x), m(x)]))
    assert fused == [3] * 4


def test_layers_on_the_cpu_do_not_share_by_default(
    fused: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_siblings, "SHARE_ON_CPU", False)
    model, plain = taught()
    agree(model, plain, lambda m: m(inputs()))
    assert fused == [] and kept(model) == []


def test_layers_share_nothing_without_fuse_siblings(fused: list[int]) -> None:
    model = make(fuse=False)
    with serving(model):
        model(inputs()), model(inputs())
    assert fused == [] and model.q.siblings is None


def test_layers_with_another_common_input_share_an_op(fused: list[int]) -> None:
    model, plain = make(), make(fuse=False)
    for seed in range(3):
        agree(model, plain, lambda m, seed=seed: m(inputs(seed), inputs(9)))
    assert fused == [2, 2]
    for _ in range(3):  # In every other call, all layers have the same input.
        agree(model, plain, lambda m: m(inputs()))
        agree(model, plain, lambda m: m(inputs(), inputs(9)))


def test_modules_that_get_an_adapter_later_become_siblings(fused: list[int]) -> None:
    model = make(red=adapter(3, "qv"), blue=adapter(12, "qv"))
    plain = make(False, red=adapter(3, "qv"), blue=adapter(12, "qv"))
    for _ in range(2):
        agree(model, plain, lambda m: m(inputs()))
    assert fused == [2]
    for each in (model, plain):
        each.q.pool.load("late", adapter(5, "qk"))
    for _ in range(2):
        agree(model, plain, lambda m: m(inputs()), ["late", "red", None])
    assert fused == [2, 2, 3]


def test_layer_without_siblings_for_many_calls_detects_a_new_one(fused: list[int]) -> None:
    how: dict[str, Any] = {"red": adapter(3, "q"), "blue": adapter(12, "q")}
    model, plain = make(**how), make(False, **how)
    with serving(model):
        for _ in range(70):
            model(inputs())
    assert model.q.siblings._observations == 0
    for each in (model, plain):
        each.q.pool.load("late", adapter(5, "qk"))
    for _ in range(3):  # one call to notice the change, one to detect the sibling
        agree(model, plain, lambda m: m(inputs()), ["late", "red", None])
    assert fused == [2]


@pytest.mark.parametrize("order", ["qkv", "vqk", "kk", "qqkkvv", "qok", "kqv"])
def test_any_order_of_calls_is_bitwise_equal_to_single_layers(order: str) -> None:
    model, plain = taught()
    x = inputs()
    for _ in range(3):
        agree(model, plain, lambda m: torch.cat([getattr(m, n)(x) for n in order], -1))


# --- outputs that must not be shared ------------------------------------------------------------
def q_then_k(change: Callable[[Tensor], Tensor]) -> Callable[[Any], Tensor]:
    def run(model: Any) -> Tensor:
        x = inputs()
        first = model.q(x)
        x = change(x)
        return torch.cat([y.flatten() for y in (first, model.k(x), model.v(x))])

    return run


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.add_(1),
        lambda x: x.mul(2),
        lambda x: x.clone(),
        lambda x: x.view(x.shape),
        lambda x: x[:, :3],
        lambda x: x.requires_grad_(),
    ],
    ids=["changed in place", "another", "equal", "a view", "a part", "wants gradients"],
)
def test_tensor_that_is_not_identical_is_computed_separately(change: Any, fused: list[int]) -> None:
    model, plain = taught()
    agree(model, plain, q_then_k(change))
    assert fused == [3]


def test_output_for_a_sibling_that_is_not_called_is_dropped(fused: list[int]) -> None:
    model, plain = taught()
    ends: list[Any] = []
    gc.disable()
    try:
        for _ in range(5):
            with serving(plain):
                expected = plain.q(inputs())
            with serving(model):
                x = inputs()
                assert torch.equal(model.q(x), expected)
                ends += [weakref.ref(y) for y in kept(model)]
                del x
                assert kept(model) == []
        assert len(ends) == 6 and not any(end() is not None for end in ends)
    finally:
        gc.enable()
    assert fused == [3] * 3, "expected no sharing after three missing sibling calls"
    agree(model, plain, lambda m: m(inputs()))
    assert fused == [3] * 3


def test_sharing_continues_after_single_missing_calls(fused: list[int]) -> None:
    model, plain = taught()
    for _ in range(4):
        agree(model, plain, lambda m: m.q(inputs()))
        agree(model, plain, lambda m: m(inputs()))
    assert fused == [3] * 8


def test_threads_do_not_use_outputs_of_other_threads() -> None:
    model, plain = taught()
    x = inputs()
    with serving(plain):
        expected = plain.k(x)
    found: list[Tensor] = []

    def other() -> None:
        with serving(model, ["blue"] * 3):
            found.append(model.k(x))

    with serving(plain, ["blue"] * 3):
        theirs = plain.k(x)
    with serving(model):
        model.q(x)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert torch.equal(found[0], theirs)
        (mine,) = (y for y in kept(model) if torch.equal(y, expected))
        assert model.k(x) is mine


def test_concurrent_threads_are_bitwise_equal_to_single_layers() -> None:
    model, plain = make(), make(fuse=False)
    names = [["red", None, "blue"], ["blue", "red", "red"], [None, "blue", "red"]]
    wrong: list[int] = []

    def run(i: int) -> None:
        for seed in range(40):
            with serving(plain, names[i]):
                expected = plain(inputs(seed))
            with serving(model, names[i]):
                if not torch.equal(model(inputs(seed)), expected):
                    wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_inner_block_between_sibling_calls_uses_its_own_adapters() -> None:
    model, plain = taught()

    def run(m: Any) -> Tensor:
        x = inputs()
        first = m.q(x)
        with lora_ext.adapters(["blue"] * 3, pool=m.q.pool):
            inside = m.k(x)
        return torch.cat([first, inside, m.k(x), m.v(x)], -1)

    agree(model, plain, run)


def test_shared_outputs_are_dropped_when_their_block_is_exited() -> None:
    # Layers called after the block must not use the outputs either: the dead reference to the
    # block must not be taken for None, which stands for no block.
    for default in (None, "red"):
        model, plain = taught(default=default)
        x, found = inputs(), []
        for m in (model, plain):
            with serving(m, ["blue"] * 3):
                m.q(x)
            assert m is plain or kept(m) == []
            with torch.no_grad():
                found.append(m.k(x))
        assert torch.equal(*found)
    model, _ = taught(default="error")
    with serving(model):
        model.q(x)
    with torch.no_grad(), pytest.raises(RuntimeError, match="expected an adapters block around"):
        model.k(x)


@contextmanager
def hooked(model: Any) -> Iterator[None]:
    handle = model.k.base.register_forward_hook(lambda module, args, y: y * 2)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def forward_of_its_own(model: Any) -> Iterator[None]:
    """Replace ``forward`` of ``k``, like offloading with accelerate."""
    k = model.k.base
    k.forward = lambda x: nn.functional.linear(x, k.weight * 2)
    try:
        yield
    finally:
        del k.forward


@contextmanager
def pruned(model: Any) -> Iterator[None]:
    """Prune ``k``, so that a hook computes the weight, which is no longer a parameter."""
    k = model.k.base
    prune.random_unstructured(k, "weight", 0.0)
    try:
        yield
    finally:
        prune.remove(k, "weight")


ELSEWHERE: dict[str, Callable[[Any], Any]] = {
    "gradients": lambda _: torch.enable_grad(),
    "autocast": lambda _: torch.autocast("cpu", torch.bfloat16),
    "everyone's hook": lambda _: torch.nn.modules.module.register_module_forward_hook(
        lambda *_: None
    ),
}


@pytest.mark.parametrize("where", ELSEWHERE)
def test_nothing_is_shared_under_gradients_autocast_or_global_hooks(
    where: str, fused: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plain = taught()
    products: list[Any] = []
    linear = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *a: products.append(a) or linear(*a))

    def run(m: Any) -> Tensor:
        products.clear()
        with ELSEWHERE[where](m):
            return m(inputs())

    agree(model, plain, run)
    assert fused == [] and len(products) == 4
    agree(model, plain, lambda m: m(inputs()))
    assert fused == [3]


def test_inference_mode_shares_inputs_that_did_not_change(fused: list[int]) -> None:
    # Tensors have no version counter in inference mode, so the first call compares values. Later
    # calls share.
    model, plain = make(), make(fuse=False)
    for seed in range(3):
        with torch.inference_mode():
            agree(model, plain, lambda m, seed=seed: m(inputs(seed)))
        assert fused == [3] * seed


def test_inference_mode_does_not_share_inputs_changed_in_place(fused: list[int]) -> None:
    model, plain = make(), make(fuse=False)

    def run(m: Any) -> Tensor:
        x = inputs()
        q = m.q(x)
        return torch.cat([q, m.k(x.mul_(2))], -1)

    for _ in range(3):
        with torch.inference_mode():
            agree(model, plain, run)
    assert fused == []


@pytest.mark.parametrize("where", [hooked, forward_of_its_own, pruned], ids=lambda f: f.__name__)
def test_base_with_hooks_or_its_own_forward_is_computed_separately(
    where: Any, fused: list[int]
) -> None:
    model, plain = taught()

    def run(m: Any) -> Tensor:
        with where(m):
            return m(inputs())

    agree(model, plain, run)
    assert fused == [2]


def test_change_of_grad_mode_between_siblings_is_followed() -> None:
    model, _ = taught()
    with serving(model):
        x = inputs()
        model.q(x)
        with torch.enable_grad():
            assert model.k(x).requires_grad
        assert not model.v(x).requires_grad


def test_dora_layers_are_computed_separately(fused: list[int]) -> None:
    how: dict[str, Any] = {"blue": adapter(12, "k", use_dora=True)}
    model, plain = taught(**how)
    agree(model, plain, lambda m: m(inputs()))
    assert fused == [2]


# --- other settings -----------------------------------------------------------------------------
@pytest.mark.parametrize("how", [{"pack_base": True}, {"default": "red"}], ids=str)
def test_siblings_work_with_pack_base_and_a_default_adapter(
    how: dict[str, Any], fused: list[int]
) -> None:
    model, plain = taught(**how)
    agree(model, plain, lambda m: m(inputs()[:, :1]))
    assert fused == [3]
    with torch.no_grad():
        assert torch.equal(model(inputs()), plain(inputs()))


def test_copies_share_separately_and_detach_frees_the_layers(fused: list[int]) -> None:
    model, plain = taught()
    twin = copy.deepcopy(model)
    assert twin.q.siblings is twin.k.siblings is not model.q.siblings
    with torch.no_grad():
        twin.k.weight.neg_()
    for _ in range(2):
        agree(model, plain, lambda m: m(inputs()))
    with torch.no_grad():
        plain.k.weight.neg_()
    for _ in range(2):
        agree(twin, plain, lambda m: m(inputs()))
    assert fused == [3] * 3
    gc.disable()
    try:
        layer = weakref.ref(model.q)
        lora_ext.detach(model)
        assert layer() is None
        assert type(model.q) is nn.Linear and "siblings" not in model.q.__dict__
    finally:
        gc.enable()


def test_compiled_model_shares_nothing_and_is_correct(fused: list[int]) -> None:
    model, plain = taught()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with serving(plain):
        expected = plain(inputs())
    with serving(model):
        torch.testing.assert_close(compiled(inputs()), expected)
    assert fused == []


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_traced_model_has_one_op_per_layer() -> None:
    # torch.jit.trace does not track tensors in a list that an op changes.
    model, _ = taught()
    with serving(model):
        recorded: Any = torch.jit.trace(model, (inputs(),), check_trace=False)
        assert torch.equal(recorded(inputs(8)), model(inputs(8)))


def test_siblings_need_as_many_launches_as_one_layer(backend: Backend) -> None:
    if backend.is_twin or backend.device == "cuda":
        pytest.skip("only the emulator counts launches")
    model, plain = make(), make(fuse=False)

    def launches(m: Any) -> int:
        before = backend.module.launches()
        m(x)
        return backend.module.launches() - before

    x = inputs()
    with serving(plain):
        expected = plain(x)
        assert launches(plain) == 4 * 2
    with serving(model):
        model(x)
        assert launches(model) == 2 * 2  # two ops each for the group q, k, v and for o
        assert torch.equal(model(x), expected)
