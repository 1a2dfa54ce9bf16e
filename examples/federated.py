"""Train one adapter with eight clients, each of which has a different text.

No client sends its text. A client trains the layers and ranks that it can afford, and sends the
changed factors. All eight train as the rows of one batch on one base model. The example prints the
loss of the common adapter on answers that no client has seen, and serves the adapter from a pool.
With `--flower` the clients run in Flower's simulation, one after another. The example takes five
minutes on two cores, without GPU or network: `python examples/federated.py` if `.[demo]` is
installed, with `.[fed]` for Flower. `--quick` takes seconds and only checks that the code runs.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported
sys.path.append(str(Path(__file__).resolve().parent))
sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import matplotlib
import torch
from federated_pictures import draw_bytes, draw_heights
from matplotlib import pyplot
from rich import print
from tqdm import tqdm
from training import TEXTS, answer_losses, collate, read_examples

import lora_ext
from lora_ext import federated, nn
from lora_ext.adapter import LoraAdapter
from lora_ext.interop.smollm2 import load_smollm2
from lora_ext.methods import fed_hello

matplotlib.use("Agg")
OUT = Path(__file__).resolve().parents[1] / "out" / "federated"
NAMES = sorted(path.stem for path in TEXTS.glob("*.jsonl"))
DEPTHS = (30, 30, 20, 20, 10, 10, 10, 10)  # number of blocks, of 30, that each client trains
RANKS = (16, 16, 16, 8, 8, 8, 4, 4)  # rank of each client
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
ROUNDS, LEARNING_RATE, HELD_OUT = 6, 4e-4, 4
QUESTION = "What is the moon?"


def adapted(num_layers: int) -> Any:
    """Return the first layers of SmolLM2 with the common adapter, before any training."""
    torch.manual_seed(0)
    model = load_smollm2()[0]
    del model.model.layers[num_layers:]
    model.config.num_hidden_layers = num_layers
    return nn.wrap(model, nn.LoraConfig(target_modules=list(MODULES), r=16, lora_alpha=32))


class Allocator(fed_hello.HLA):
    """Allocator that gives each client the layers nearest to the output, at the client's rank."""

    @property
    def depths(self) -> dict[int, int]:
        return {client: min(depth, self.L) for client, depth in enumerate(DEPTHS)}

    def plan(self, round: int, client: Any, capability: int) -> federated.LayerPlan:
        layers = super().plan(round, client, capability).layers
        return federated.LayerPlan(layers, (RANKS[client],) * len(layers))


def in_one_batch(make: Any, data: Any, allocator: Allocator, measure: Any, rounds: int) -> Any:
    """Train all clients as rows of one batch.

    Returns:
        The adapter and, by round, the losses, the sent bytes and the number of clients per layer.
    """
    model = make()
    manager, log = federated.LoraLayerManager(model), federated.CommLog()
    clients = [federated.ClientSpec(c, data[c], LEARNING_RATE) for c in allocator.depths]
    batched = federated.BatchedClients(model, clients)
    state, losses, heights = manager.state_slice(), [measure(model)], list[Any]()
    for round in (bar := tqdm(range(1, rounds + 1), unit="round")):
        plans = {c: allocator.plan(round, c, depth) for c, depth in allocator.depths.items()}
        result = federated.aggregate(state, batched.run_round(plans, state, round))
        state = result.state
        manager.load_slice(state)
        losses.append(measure(model))
        for client, plan in plans.items():
            log.record(round, client, up=federated.plan_bytes(state, plan))
        heights.append(federated.RoundLog.of(round, plans, result, allocator.L).heights)
        bar.set_postfix(loss=f"{sum(losses[-1].values()) / len(NAMES):.2f}")
    return state, losses, log, heights


def in_flower(make: Any, data: Any, allocator: Allocator, measure: Any, rounds: int) -> Any:
    """Train the clients of :func:`in_one_batch` one after another in Flower's simulation; return
    the same values."""
    from flwr.simulation import run_simulation

    from lora_ext.federated import flower

    strategy, results = flower.LoraStrategy(allocator, capability=allocator.depths), list[Any]()
    server = flower.make_server_app(
        lambda: strategy,
        make,
        measure,
        num_rounds=rounds,
        train_config={"lr": LEARNING_RATE},
        on_result=lambda _, result: results.append(result),
    )
    client = flower.make_client_app(make, data.__getitem__)
    one_at_a_time: Any = {"client_resources": {"num_cpus": os.cpu_count(), "num_gpus": 0.0}}
    run_simulation(server, client, len(DEPTHS), backend_config=one_at_a_time)
    losses = [dict(each) for each in results[0].evaluate_metrics_serverapp.values()]
    heights = [each.heights for each in strategy.history]
    return flower.from_arrays(results[0].arrays), losses, strategy.comm, heights


def measure(unseen: dict[str, Any], model: Any) -> dict[str, float]:
    """Return the mean loss on the unseen answers of each text, by name."""
    with torch.inference_mode():
        return {name: answer_losses(model(**b), b).mean().item() for name, b in unseen.items()}


def draw(losses: Any, log: federated.CommLog, heights: Any, path: Path) -> None:
    """Draw the loss of each text, the sent bytes, and the number of clients per layer."""
    _, axes = pyplot.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for name, style in zip(NAMES, ("-", "--") * 4, strict=True):
        axes[0].plot([each[name] for each in losses], style, label=name)
    axes[0].set(xlabel="round", ylabel="loss on unseen answers, nats per token")
    axes[0].legend(ncols=2, fontsize="small", frameon=False)
    rounds = range(1, len(heights) + 1)
    draw_bytes({"eight clients": [log.cumulative("up")[r] for r in rounds]}, axes[1])
    draw_heights(heights, axes[2])
    axes[0].figure.savefig(path, dpi=120)


def serve(model: Any, tokenizer: Any, adapter: LoraAdapter) -> None:
    """Print the answers of the common adapter and of the base model, from one batch."""
    pool = lora_ext.AdapterPool(model, max_slots=1, max_rank=16)
    pool.load("federated", adapter)
    lora_ext.attach(model, pool)
    question = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    batch = tokenizer([prompt] * 2, return_tensors="pt")
    with torch.inference_mode(), lora_ext.adapters(["federated", None], pool=pool):
        answers = model.generate(**batch, max_new_tokens=40, do_sample=False)
    for name, answer in zip(
        ("federated", "base"), answers[:, batch.input_ids.shape[1] :], strict=True
    ):
        print(f"{name:>9}: {tokenizer.decode(answer, skip_special_tokens=True).strip()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--flower", action="store_true", help="run in Flower's simulation")
    parser.add_argument("--quick", action="store_true", help="check the code in seconds")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    num_layers, rounds, steps = (4, 2, 1) if args.quick else (30, ROUNDS, None)
    _, tokenizer = load_smollm2()
    texts = {name: read_examples(tokenizer, name) for name in NAMES}
    pad = tokenizer.pad_token_id
    unseen = {name: collate(each[:HELD_OUT], pad) for name, each in texts.items()}
    seen = [each[HELD_OUT:] for each in texts.values()]
    data = [[collate(e[i : i + 2], pad) for i in range(0, len(e), 2)][:steps] for e in seen]
    run = in_flower if args.flower else in_one_batch
    allocator = Allocator("inverted_triangle", num_layers)
    make, evaluate = functools.partial(adapted, num_layers), functools.partial(measure, unseen)
    state, losses, log, heights = run(make, data, allocator, evaluate, rounds)

    args.out.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        print(f"{name:>9}: from {losses[0][name]:.2f} to {losses[-1][name]:.2f} nats per token")
    draw(losses, log, heights, args.out / "federated.png")
    model = make()
    federated.LoraLayerManager(model).load_slice(state)
    adapter = LoraAdapter.from_model(model)
    adapter.save(args.out / "adapter")
    serve(nn.unwrap(model).eval(), tokenizer, adapter)
    print(f"adapter and picture: {args.out}")


if __name__ == "__main__":
    main()
