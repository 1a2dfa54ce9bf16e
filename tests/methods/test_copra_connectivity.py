"""Loss barrier between two adapters, chosen modules, and merging, compared with formulas."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from adapted_models import KINDS, adapted
from torch import Tensor, nn

from lora_ext.adapter import LoraAdapter
from lora_ext.methods.copra import (
    CopraConfig,
    CopraController,
    Shapley,
    at_random,
    by_suffix,
    every_other,
    interpolate_adapters,
    lmc_barrier,
    merge_adapters,
    prune_adapter,
    thirds,
    top_by_shapley,
)
from lora_ext.nn import adapted_layers, adapter_parameters

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def loss(model: nn.Module) -> float:
    assert not model.training and not torch.is_grad_enabled()
    return logits(model).double().square().mean().item()


def other(value: LoraAdapter, seed: int) -> LoraAdapter:
    """Return an adapter with other factors on the same modules."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(t: Tensor) -> Tensor:
        return t + 0.3 * torch.randn(t.shape, generator=generator)

    modules = {n: f._replace(a=drawn(f.a), b=drawn(f.b)) for n, f in value.modules.items()}
    return LoraAdapter(value.config, modules)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("space", ["factors", "delta"])
def test_barrier_equals_the_formula_and_the_model_is_restored(kind: str, space: str):
    model = adapted(kind).train()
    model.get_submodule("model.model" if kind != "ours" else "model").eval()
    first = LoraAdapter.from_model(model)
    second = other(first, 1)
    parameters = dict(model.named_parameters())
    bits = {n: p.detach().clone() for n, p in parameters.items()}
    flags = {n: p.requires_grad for n, p in parameters.items()}
    scales = [dict(m.scaling) for m in adapted_layers(model).values()]
    modes, before = [m.training for m in model.modules()], logits(model.eval())
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode

    found = lmc_barrier(model, first, second, loss, 5, space)

    assert [m.training for m in model.modules()] == modes
    after = dict(model.named_parameters())
    assert list(after) == list(parameters)
    for name, p in after.items():
        assert p is parameters[name] and p.requires_grad == flags[name]
        assert torch.equal(p, bits[name])
    assert [dict(m.scaling) for m in adapted_layers(model).values()] == scales
    assert torch.equal(logits(model.eval()), before)

    assert found.lambdas == (0, 0.25, 0.5, 0.75, 1)
    with torch.no_grad():
        for lam, value in zip(found.lambdas, found.losses, strict=True):
            expected = with_deltas(kind, [first, second], [1 - lam, lam], space)
            assert value == pytest.approx(loss(expected), rel=1e-5)
    a, b = found.losses[0], found.losses[-1]
    rises = [v - ((1 - x) * a + x * b) for x, v in zip(found.lambdas, found.losses, strict=True)]
    assert found.barrier == max(rises) >= 0
    assert len({round(v, 6) for v in found.losses}) == 5


def with_deltas(
    kind: str, values: list[LoraAdapter], weights: list[float], space: str
) -> nn.Module:
    """Return the model with the interpolated updates added to its base weights in float64."""
    model = adapted(kind)
    for name, layer in adapted_layers(model).items():
        factors = [v.modules[name.removeprefix("base_model.model.")] for v in values]
        if space == "delta":
            deltas = (
                w * f.scaling * f.b.double() @ f.a.double()
                for w, f in zip(weights, factors, strict=True)
            )
            update = sum(deltas)
        else:
            a = sum(w * f.a.double() for w, f in zip(weights, factors, strict=True))
            b = sum(w * f.b.double() for w, f in zip(weights, factors, strict=True))
            update = factors[0].scaling * b @ a
        layer.base_layer.weight += update.float()
        layer.enable_adapters(False)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("space", ["factors", "delta"])
def test_barrier_is_zero_for_equal_adapters_and_symmetric(kind: str, space: str):
    model = adapted(kind)
    first = LoraAdapter.from_model(model)
    second = other(first, 2)
    assert abs(lmc_barrier(model, first, first, loss, space=space).barrier) < 1e-6
    there = lmc_barrier(model, first, second, loss, 6, space)
    back = lmc_barrier(model, second, first, loss, 6, space)
    assert there.barrier == pytest.approx(back.barrier, abs=1e-6)
    assert there.losses == pytest.approx(back.losses[::-1], rel=1e-5)


def test_folders_and_given_lambdas_are_accepted(tmp_path):
    model = adapted("peft")
    first = LoraAdapter.from_model(model)
    second = other(first, 3)
    first.save(tmp_path / "first")
    asked = []

    def counting(m: nn.Module) -> float:
        asked.append(0)
        return loss(m)

    found = lmc_barrier(model, tmp_path / "first", second, counting, [0.5, 0.1])
    assert found.lambdas == (0.5, 0.1) and len(asked) == 4 and len(found.losses) == 2
    whole = lmc_barrier(model, first, second, loss, [0, 0.1, 0.5, 1])
    assert found.losses == (whole.losses[2], whole.losses[1])


def test_exception_in_the_loss_leaves_the_model_unchanged():
    model = adapted("fused")
    first, before = LoraAdapter.from_model(model), dict(model.named_parameters())

    def fail(_: nn.Module) -> float:
        raise KeyError

    with pytest.raises(KeyError):
        lmc_barrier(model, other(first, 1), first, fail, space="delta")
    assert all(p is before[n] for n, p in model.named_parameters())


@pytest.mark.filterwarnings("ignore:unmerge")
def test_error_for_incomparable_adapters_names_the_difference():
    model = adapted("peft", "default", "second")
    first = LoraAdapter.from_model(model)
    less = LoraAdapter(first.config, dict(list(first.modules.items())[1:]))
    name = next(iter(first.modules))

    def refused(message: str, *values, **settings) -> None:
        with pytest.raises(ValueError, match=message):
            lmc_barrier(model, *values, **{"eval_fn": loss, **settings})

    refused(rf"{name}", first, less)
    refused(rf"lmc_barrier: {name}: expected a module of the .* only in the model", less, less)
    refused(r"lambdas: expected an integer from 2, found 1", first, first, lambdas=1)
    refused(r"lambdas: expected numbers in \[0, 1\], found \[1.5\]", first, first, lambdas=[0, 1.5])
    refused(r"space: .* found 'weights'", first, first, space="weights")
    refused(
        r"expected a finite loss, found nan at lambda = 0", first, first, eval_fn=lambda m: math.nan
    )
    refused(r"q_proj: expected 'second' as an active adapter", first, first, adapter="second")
    refused(r"adapter_name: .* found 'third'", first, first, adapter="third")
    next(iter(adapted_layers(model).values())).merge()
    refused(r"q_proj: expected an adapter that .* unmerge it first", first, first)


# -------------------------------------------------------------------------------------------------
# Choice of modules


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_another_shape_and_dora_are_refused_before_the_first_loss(kind: str):
    model, dora = adapted(kind), adapted(kind, use_dora=True)
    value = LoraAdapter.from_model(model)
    name, factors = list(value.modules.items())[-1]
    a, b = torch.cat([factors.a, factors.a], 1), torch.cat([factors.b, factors.b])
    wider, taller = (
        LoraAdapter(value.config, {**value.modules, name: factors._replace(**part)})
        for part in ({"a": a}, {"b": b})
    )

    def never(_: nn.Module) -> float:
        raise AssertionError

    for found, part in ((wider, "in"), (taller, "out")):
        with pytest.raises(ValueError, match=rf"lmc_barrier: {name}: expected .*{part}"):
            lmc_barrier(model, found, found, never)
    for ends in (value, LoraAdapter.from_model(dora)):
        with pytest.raises(NotImplementedError, match="DoRA, found a "):
            lmc_barrier(dora, ends, ends, never, lambdas=[0.0, 1.0])


@pytest.mark.parametrize("kind", KINDS)
def test_chosen_modules_are_names_that_pruning_accepts(kind: str, tmp_path: Path):
    model = adapted(kind)
    controller = CopraController(model, CopraConfig(), 10)
    value = LoraAdapter.from_model(model)
    names = list(value.modules)
    q, down = names[0::2], names[1::2]
    assert [n.rpartition(".")[2] for n in names] == ["q_proj", "down_proj"] * 3
    worth = Shapley(torch.tensor([0.1, -1.0, 0.4]), torch.zeros(3), 8)
    for source in (controller, controller.groups, value, names):
        for kept, expected in (
            (every_other(source), [*names[:2], *names[4:]]),
            (every_other(source, 1), names[2:4]),
            (thirds(source, "low"), names[:2]),
            (thirds(source, "middle"), names[2:4]),
            (thirds(source, "high"), names[4:]),
            (by_suffix(source, "q_proj"), q),
            (by_suffix(source, "mlp.down_proj", "q_proj"), names),
            (top_by_shapley(source, worth, 2), [*names[:2], *names[4:]]),
            (top_by_shapley(source, [3.0, 2.0, 1.0], 1), names[:2]),
            (at_random(source, 0), []),
            (at_random(source, 3), names),
        ):
            assert kept == expected
        assert list(prune_adapter(value, by_suffix(source, "down_proj")).modules) == down
        drawn = {tuple(at_random(source, 1, seed)) for seed in range(20)}
        assert drawn == {tuple(names[i : i + 2]) for i in (0, 2, 4)}
        assert at_random(source, 2, 5) == at_random(source, 2, 5)
    value.save(tmp_path / "adapter")  # The files list the modules in another order.
    assert set(every_other(tmp_path / "adapter")) == set(every_other(value))


def test_tenth_block_follows_the_ninth_in_any_order_of_names():
    names = sorted(f"model.layers.{i}.q_proj" for i in range(12))  # order of files: 0, 1, 10, ...

    def of(*blocks: int) -> list[str]:
        return [f"model.layers.{i}.q_proj" for i in blocks]

    assert every_other(names) == of(0, 2, 4, 6, 8, 10)
    assert thirds(names, "low") == of(0, 1, 2, 3)
    assert top_by_shapley(names, list(range(12)), 2) == of(10, 11)
    other = [f"encoder.{n}" for n in names] + [f"decoder.{n}" for n in names]
    assert thirds([*other, "lm_head"], "high")[-2:] == ["decoder.model.layers.11.q_proj", "lm_head"]


def test_thirds_are_a_partition_of_any_number_of_groups():
    for n in (1, 2, 3, 4, 7, 30):
        groups = [[f"layers.{i}.q"] for i in range(n)]
        parts = [thirds(groups, part) for part in ("low", "middle", "high")]
        assert sum(parts, []) == [name for group in groups for name in group]  # noqa: RUF017
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("pick", "message"),
    [
        (lambda g: every_other(g, 2), r"every_other: first: expected 0 or 1, found 2"),
        (lambda g: thirds(g, "upper"), r"thirds: part: expected one of .* found 'upper'"),
        (lambda g: by_suffix(g, "proj"), r"by_suffix: suffixes: .* found 'proj'"),
        (
            lambda g: top_by_shapley(g, [1.0], 1),
            r"values: expected one value for each of 3 groups, found 1",
        ),
        (lambda g: top_by_shapley(g, [1.0] * 3, 4), r"top_by_shapley: k: .* from 0 to 3, found 4"),
        (lambda g: at_random(g, -1), r"at_random: k: expected an integer from 0 to 3, found -1"),
        (lambda g: every_other([]), r"every_other: source: expected at least one module, found"),
        (lambda g: every_other(torch.nn.Linear(1, 1)), r"source: expected .* found Linear"),
    ],
)
def test_invalid_choices_are_refused(pick, message: str):
    with pytest.raises(ValueError, match=message):
        pick([[f"layers.{i}.q_proj"] for i in range(3)])


# -------------------------------------------------------------------------------------------------
# Merging rules that CopRA's measures use


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "lora_alpha": 5}], ids=str)
def test_merging_one_adapter_with_weight_one_changes_nothing(settings: dict):
    value = LoraAdapter.from_model(adapted("ours", **settings))
    for mode in ("delta", "factors", "delta_svd"):
        assert merge_adapters([value], [1.0], mode=mode) == value


def test_interpolated_factors_have_cross_terms():
    first = LoraAdapter.from_model(adapted("ours"))
    second = other(first, 4)
    half = interpolate_adapters(first, second, 0.5, "factors")
    for name, f in half.modules.items():
        one, two = first.modules[name], second.modules[name]
        expected = one.scaling / 4 * (one.b + two.b) @ (one.a + two.a)
        torch.testing.assert_close(f.scaling * f.b @ f.a, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_pruned_adapter_equals_the_coalition_of_kept_modules(kind: str):
    model = adapted(kind)
    controller = CopraController(model, CopraConfig(), 10)
    kept = prune_adapter(LoraAdapter.from_model(model), every_other(controller))
    with controller.coalition([True, False, True]):
        expected = logits(model)
    for name, layer in adapted_layers(model).items():
        if name.removeprefix("base_model.model.") not in kept.modules:
            for p in adapter_parameters(layer, "default"):
                nn.init.zeros_(p)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
