"""Model, client data and the two apps that Flower starts in separate processes.

Client 0 can train one of three layers, client 1 two. Flower's configuration is in `pyproject.toml`;
`examples/federated_deployment.py` runs everything on this machine.
"""

from __future__ import annotations

import json

import torch
from flwr.serverapp.strategy import Result
from torch import Tensor, nn

from lora_ext import LoraConfig
from lora_ext.federated import LayerPlan, LoraStrategy, make_client_app, make_server_app
from lora_ext.nn import wrap

WIDTH, LAYERS = 16, 3


class Classifier(nn.Module):
    """Classifier of points on the two sides of a curved surface."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x)


def make_model() -> nn.Module:
    model = Classifier()
    wrap(model, LoraConfig(target_modules=[f"layers.{i}" for i in range(LAYERS)], r=4))
    return model


def batches(partition: int) -> list[tuple[Tensor, Tensor]]:
    """Return the points of one client; partition -1 is the server's evaluation set."""
    generator = torch.Generator().manual_seed(partition + 1)
    x = torch.randn(256, WIDTH, generator=generator)
    y = (x[:, 0] * x[:, 1] + x[:, 2] > 0).long()
    return list(zip(x.split(32), y.split(32), strict=True))


class LastLayers:
    """Allocator that gives each client the layers nearest to the output that it can train."""

    def plan(self, round: int, client: int | str, capability: int) -> LayerPlan:
        return LayerPlan(tuple(range(LAYERS - capability, LAYERS)))


def accuracy(model: nn.Module) -> dict[str, float]:
    with torch.no_grad():
        right = [(model(x).argmax(1) == y).float().mean() for x, y in batches(-1)]
    return {"accuracy": float(torch.stack(right).mean())}


def report(strategy: LoraStrategy, result: Result) -> None:
    """Print the result as one line, which ``flwr run --stream`` shows."""
    rounds = [
        {"round": log.round, "accepted": log.accepted, "rejected": list(log.rejected.items())}
        for log in strategy.history
    ]
    scores = {n: m["accuracy"] for n, m in result.evaluate_metrics_serverapp.items()}
    down, up = strategy.comm.total("down"), strategy.comm.total("up")
    print("REPORT", json.dumps({"rounds": rounds, "accuracy": scores, "down": down, "up": up}))


client_app = make_client_app(make_model, batches)
server_app = make_server_app(
    lambda: LoraStrategy(LastLayers(), min_available_nodes=2),
    make_model,
    accuracy,
    on_result=report,
)
