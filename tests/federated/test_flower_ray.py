"""Flower's simulation with Ray is bitwise equal to a run in this process."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from flower_apps import Classifier, batches, run
from flower_simulation import strategy

from lora_ext.federated import LocalGrid, RoundLog, make_client_app

ROOT = Path(__file__).parents[2]
SECONDS = 600


def deployment():
    path = ROOT / "examples/federated_deployment.py"
    spec = importlib.util.spec_from_file_location("federated_deployment", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None,
    reason="Flower's simulation needs `pip install flwr[simulation]`",
)
def test_four_nodes_on_ray_equal_a_local_run_and_leave_no_process(tmp_path):
    tools = deployment()
    env = {
        **tools.environment(tmp_path),
        # On Linux, Ray listens on all network interfaces unless this variable is 0.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # With the default, 15, other tests would delay Ray by minutes.
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    log = tmp_path / "log"
    outside: set[str] = set()
    script = str(ROOT / "tests/flower_simulation.py")
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, script], env=env, stdout=out, stderr=out)
    end = time.monotonic() + SECONDS
    while process.poll() is None and time.monotonic() < end:
        outside |= tools.listening(set(tools.marked(env[tools.MARK]))) - tools.LOOPBACK
        time.sleep(2)  # Polling more often would be slow: listening() reads all of /proc.
    process.kill()
    assert process.wait() == 0, log.read_text()[-3000:]
    while (left := tools.marked(env[tools.MARK])) and time.monotonic() < end:
        time.sleep(0.5)
    assert not left and not outside
    (line,) = [x for x in log.read_text().splitlines() if x.startswith("REPORT")]
    report = json.loads(line.removeprefix("REPORT"))
    here = strategy()
    result = run(here, LocalGrid(make_client_app(Classifier, batches), 4))
    history = [RoundLog.from_dict(entry) for entry in report["state"]["history"]]
    assert history == here.history
    assert report["state"]["comm"] == json.loads(json.dumps(here.comm.state_dict()))
    assert report["arrays"] == result.arrays.object_id
