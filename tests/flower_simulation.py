"""Run two rounds of four nodes in Flower's simulation with Ray; print one line of JSON."""

import json
from typing import Any

from flower_apps import Classifier, Suffixes, batches

from lora_ext.federated import LoraStrategy, make_client_app, make_server_app

CAPABILITY = {0: 1, 1: 2, 2: 3, 3: 3}


def strategy() -> LoraStrategy:
    return LoraStrategy(Suffixes(), capability=CAPABILITY, min_available_nodes=4)


def main() -> None:
    from flwr.simulation import run_simulation

    kept: list[Any] = []
    server = make_server_app(
        strategy, Classifier, num_rounds=2, on_result=lambda *result: kept.append(result)
    )
    # Use one process for all nodes, because each process loads torch and Flower again.
    resources = {"client_resources": {"num_cpus": 1}, "init_args": {"num_cpus": 1}}
    run_simulation(server, make_client_app(Classifier, batches), 4, backend_config=resources)
    ((end, result),) = kept
    report = {"arrays": result.arrays.object_id, "state": end.state_dict()}
    print("REPORT", json.dumps(report))


if __name__ == "__main__":
    main()
