"""Errors of the training ops; messages contain op, argument, expected and found value."""

from __future__ import annotations

import pytest
import torch
from cases import Inputs, Shape
from cases_train import train_inputs
from cases_wrong import Change, cast, cut, ints, is_

from lora_ext import ops

SHAPE = Shape(4, 16, 24, (8, 3))


def linear(i: Inputs) -> torch.Tensor:
    head = (i[k] for k in ("x", "weight", "bias", "a", "b", "adapter_ids"))
    return ops.lora_linear(*head, i["scale"], i["ranks"], i["dropout_p"], i["seed"], i.get("plan"))


EACH = "one int64 number, or one for each of 2 adapters"
SEEDS: list[tuple[str, Change]] = [
    (r"seed: expected one int64 number if dropout_p > 0, found None", is_(seed=None)),
    (
        r"seed: expected one number of dtype Long on cpu, found Int of shape \[1\]",
        cast("seed", dtype=torch.int32),
    ),
    (rf"seed: expected {EACH}, found shape \[3\]", is_(seed=ints(0, 0, 0).long())),
    (rf"seed: expected {EACH}, found shape \[2, 1\]", is_(seed=ints(0, 0).long()[:, None])),
    (r"seed: expected Long, found Int", is_(seed=ints(0, 0))),
    (r"seed: expected Long, found Float", is_(seed=torch.zeros(2))),
]
WRONG: list[tuple[str, Change]] = [
    (r"x: expected shape \(T, I\), found \[4\]", lambda i: {"x": i["x"][:, 0]}),
    (r"x: expected float32, float16, bfloat16 or float64", lambda i: {"x": i["x"].int()}),
    (r"weight: expected shape \(O, I\) = \[24, 16\]", lambda i: {"weight": i["weight"].T}),
    (r"weight: expected the dtype of x, Float, found Half", cast("weight", dtype=torch.half)),
    (r"bias: expected shape \(O,\) = \[24\], found \[23\]", cut("bias")),
    (r"bias: expected the dtype of x, Float, found Double", lambda i: {"bias": i["bias"].double()}),
    (r"bias: expected None if weight is None", lambda i: {"weight": None}),
    (r"a: expected the dtype of x, Float, found Double", lambda i: {"a": i["a"].double()}),
    (r"a\.shape\[2\]: expected x\.shape\[1\] = 16, found 15", lambda i: {"a": i["a"][:, :, 1:]}),
    (r"b: expected shape \(A, O, R\), found \[24, 8\]", lambda i: {"b": i["b"][0]}),
    (r"b\.shape\[2\]: expected a\.shape\[1\] = 8, found 7", lambda i: {"b": i["b"][:, :, 1:]}),
    (r"scale: expected Float, found Double", lambda i: {"scale": i["scale"].double()}),
    (r"ranks: expected shape \(2,\), found \[1\]", lambda i: {"ranks": i["ranks"][:1]}),
    (r"ranks\[1\]: expected .* in \[0, 8\], found 9", is_(ranks=ints(8, 9))),
    (r"adapter_ids: expected shape \(4,\), one id per row, found \[3\]", cut("adapter_ids")),
    (r"adapter_ids\[2\]: expected .* in \[-1, 2\), found 2", is_(adapter_ids=ints(0, 1, 2, -2))),
    (
        r"plan: expected lora_plan\(\) of 4 rows and 2 adapters",
        lambda i: {"plan": ops.lora_plan(torch.zeros(5, dtype=torch.long), 2)},
    ),
    (
        r"plan: expected lora_plan\(\) of these adapter_ids",
        lambda i: {"plan": ops.lora_plan(1 - i["adapter_ids"].abs(), 2)},
    ),
    (r"dropout_p: expected .* in \[0, 1\), found 1", lambda i: {"dropout_p": 1.0}),
    (r"dropout_p: expected .* in \[0, 1\), found -0\.1", lambda i: {"dropout_p": -0.1}),
    (r"dropout_p: expected .* in \[0, 1\), found nan", lambda i: {"dropout_p": float("nan")}),
    *SEEDS,
    (
        r"seed: expected a contiguous tensor, found stride 0",
        lambda i: {"seed": torch.zeros(1, dtype=torch.long).expand(2)},
    ),
]


@pytest.mark.parametrize(("message", "change"), WRONG, ids=[m for m, _ in WRONG])
@pytest.mark.parametrize("grad", [False, True])
def test_wrong_input_raises(message: str, change: Change, grad: bool) -> None:
    inputs = train_inputs(SHAPE, torch.float32, seed=1, dropout_p=0.5)
    inputs["adapter_ids"] = torch.tensor([0, 1, -1, 0])
    changed = {**inputs, **change(inputs)}
    if grad and changed["b"].is_floating_point():
        changed["b"] = changed["b"].requires_grad_()
    with pytest.raises(ValueError, match="(lora_linear|lora_plan): .*" + message):
        linear(changed)


def test_wrong_gradient_raises() -> None:
    i = train_inputs(SHAPE, torch.float32, seed=2)
    backward = torch.ops.lora_ext.lora_linear_backward
    head = (i["x"], torch.ones(4, 8), i["weight"], i["a"], i["b"], i["adapter_ids"], i["scale"])
    tail = (None, None, 0.0, None, True, True, True)
    for dy, v, message in [
        (i["dy"][:3], head[1], r"dy: expected shape \(T, O\) = \[4, 24\], found \[3, 24\]"),
        (i["dy"].double(), head[1], "dy: expected the dtype of x, Float, found Double"),
        (i["dy"], torch.ones(4, 7), r"v: expected shape \(T, R\) = \[4, 8\], found \[4, 7\]"),
        (i["dy"], torch.ones(4, 8).double(), r"v: expected Float, found Double"),
    ]:
        with pytest.raises(ValueError, match=f"lora_linear_backward: {message}"):
            backward(dy, i["x"], v, *head[2:], *tail)


def test_dropout_errors_name_their_arguments() -> None:
    x = torch.ones(2, 3)
    for args, message in [
        ((x[0], 0.5), r"x: expected shape \(T, I\), found \[3\]"),
        ((x, 1.0), r"p: expected .* in \[0, 1\), found 1"),
        ((x, 0.5), "seed: expected one int64 number if p > 0, found None"),
        ((x, 0.5, torch.tensor(1.0)), "seed: expected one number of dtype Long on cpu, found"),
        ((x.int(), 0.0), "x: expected float32, float16, bfloat16 or float64"),
    ]:
        with pytest.raises(ValueError, match=f"lora_dropout: {message}"):
            ops.lora_dropout(*args)


def test_tensors_on_two_devices_raise() -> None:
    i = train_inputs(SHAPE, torch.float32, seed=3)
    for name in ("a", "seed"):
        i = train_inputs(SHAPE, torch.float32, seed=3, dropout_p=0.5, own_seeds=True)
        with pytest.raises(
            ValueError, match=f"lora_linear: expected all tensors on one device, .* {name} on meta"
        ):
            linear({**i, name: i[name].to("meta")})
    with pytest.raises(ValueError, match="lora_dropout: expected all tensors on one device"):
        ops.lora_dropout(i["x"].to("meta"), 0.5, torch.tensor(1))


@pytest.mark.parametrize("change", [c for _, c in SEEDS], ids=[m for m, _ in SEEDS])
def test_wrong_seed_raises_while_a_model_is_traced(change: Change) -> None:
    i = train_inputs(SHAPE, torch.float32, dropout_p=0.5)
    i = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in (i | change(i)).items()}
    with pytest.raises(ValueError, match="lora_linear: seed: expected"):
        linear(i)


def test_rank_out_of_range_of_an_idle_adapter_accesses_no_memory() -> None:
    for rank in (200, -200):
        i = train_inputs(SHAPE, torch.float32)
        i["adapter_ids"] = torch.zeros(4, dtype=torch.long)
        i["ranks"] = torch.tensor([8, rank], dtype=torch.int32)
        for name in ("x", "a", "b"):
            i[name] = i[name].nan_to_num().requires_grad_()
        linear(i).sum().backward()
        assert (i["a"].grad[1] == 0).all() and (i["b"].grad[1] == 0).all()
        assert (i["a"].grad[0] != 0).any()


def test_plan_with_changed_segments_raises() -> None:
    i = train_inputs(SHAPE, torch.float32)
    plan = ops.lora_plan(i["adapter_ids"], 2)
    for value in (10**8, -1, 0):
        i["plan"] = plan.clone()
        i["plan"][-3] = value  # start of the last adapter's segment
        if torch.equal(i["plan"], plan):
            continue
        with pytest.raises(ValueError, match=r"plan: expected lora_plan\(\) of these adapter_ids"):
            linear(i)


def test_forward_mode_raises_also_under_torch_func() -> None:
    i = train_inputs(SHAPE, torch.float32)
    seed = torch.tensor([1])
    for run in (lambda x: linear({**i, "x": x}), lambda x: ops.lora_dropout(x, 0.5, seed)):
        with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
            torch.func.jvp(run, (i["x"],), (torch.ones_like(i["x"]),))
