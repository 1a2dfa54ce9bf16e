"""Clients of small models, and a loop that trains one client alone, as the reference for
batches."""

import pytest
import torch
from torch import Tensor, nn

from lora_ext.federated import ClientSpec, LayerPlan, LoraLayerManager, Update
from lora_ext.nn import LoraLinear

WIDTH = 6
PLANS = {
    1: LayerPlan((0, 2)),
    "b": LayerPlan((2,)),
    3: LayerPlan((1, 2), (1, 2)),
    4: LayerPlan((0, 1, 2)),
}


class Classifier(nn.Module):
    def __init__(self, layers: int = 3, **settings: float):
        super().__init__()
        torch.manual_seed(0)
        linears = [nn.Linear(WIDTH, WIDTH).requires_grad_(False) for _ in range(layers)]
        settings = {"r": 3, "init_lora_weights": False, "lora_alpha": 2, **settings}
        self.layers = nn.ModuleList(LoraLinear(linear, **settings) for linear in linears)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x)


def vectors(rows: list[int], seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(n, WIDTH, generator=generator, dtype=torch.float64),
            torch.randint(0, 4, (n,), generator=generator),
        )
        for n in rows
    ]


def specs() -> list[ClientSpec]:
    """Return clients with ragged batches and different step counts, learning rates and clipping."""
    return [
        ClientSpec(1, vectors([3, 5, 2], 1), lr=0.05, weight_decay=0.1),
        ClientSpec("b", vectors([4], 2), lr=0.1),
        ClientSpec(3, vectors([1, 7], 3), lr=0.02, betas=(0.8, 0.9), max_grad_norm=0.05),
        ClientSpec(4, vectors([2, 2, 6, 1], 4), lr=0.05, eps=1e-6, max_grad_norm=10.0),
    ]


def cross_entropy(model: nn.Module, batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def loop(
    model, manager, state, spec, plan, others="frozen", loss_of=cross_entropy, shared=()
) -> Update:
    """Train one client alone and return its update. The parameters named in ``shared`` are trained
    too, and restored afterwards."""
    heads = {name: model.get_parameter(name) for name in shared}
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in heads.items()}
    with torch.no_grad():
        for name, parameter in heads.items():
            parameter.copy_(state[name]).requires_grad_()
    manager.load_slice({k: v for k, v in state.items() if k not in heads})
    start = manager.state_slice(plan.layers, plan.ranks)
    if plan.ranks is not None:
        manager.load_slice(start)
    manager.apply(plan, others=others)
    parameters = [p for n, p in model.named_parameters() if p.requires_grad and ".lora_" in n]
    parameters += heads.values()
    optimizer = torch.optim.AdamW(
        parameters, spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay
    )
    losses = []
    for batch in spec.batches:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        if spec.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, spec.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    end = manager.state_slice(plan.layers, plan.ranks)
    changes = {k: end[k] - start[k] for k in end}
    changes |= {name: (p - state[name]).detach() for name, p in heads.items()}
    with torch.no_grad():
        for name, (value, flag) in before.items():
            heads[name].copy_(value).requires_grad_(flag).grad = None
    return Update(spec.client, 0, changes, plan, sum(losses) / len(losses))


def assert_close(found: Update, wanted: Update, atol: float) -> None:
    assert found.client == wanted.client
    assert found.tensors.keys() == wanted.tensors.keys()
    for k, value in wanted.tensors.items():
        assert found.tensors[k].shape == value.shape
        assert (found.tensors[k] - value).abs().max() <= atol
    assert found.loss == pytest.approx(wanted.loss, abs=max(atol, 1e-12))


def assert_as_alone(updates, model, state, clients, plans, *options, atol=1e-10, **more) -> None:
    """Compare the update of each client that trains any parameter with that of :func:`loop`."""
    manager = LoraLayerManager(model)
    for i, (update, spec) in enumerate(zip(updates, clients, strict=True)):
        plan = plans[spec.client if isinstance(plans, dict) else i]
        if plan.layers or more.get("shared"):
            assert_close(update, loop(model, manager, state, spec, plan, *options, **more), atol)


def tokens(lengths: list[int], seed: int, rows: int = 2) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length in lengths:
        ids = torch.randint(0, 11, (rows, length), generator=generator)
        labels = ids.clone()
        labels[0, 0:2] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def next_token(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return transformers' next-token loss, without its conversion of the logits to float32."""
    logits = model(**batch).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
