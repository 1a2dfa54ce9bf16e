"""Run a federation as deployed: a SuperLink, two SuperNodes and `flwr run`, all on loopback.

One client is killed in round 2. The other client completes all rounds, and no process is left over.
The example needs `pip install --no-build-isolation '.[fed]'` and Linux, because it finds the
remaining processes in /proc.

    python examples/federated_deployment.py            # two to three minutes
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
APP = Path(__file__).with_name("federated_app")
MARK = "LORA_EXT_FEDERATION"  # environment variable of every started process


def free_ports(count: int) -> list[int]:
    """Return unused ports of the loopback interface."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def environment(home: Path) -> dict[str, str]:
    """Return an environment without telemetry, with Flower's files under ``home``."""
    return {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        MARK: uuid.uuid4().hex,
    }


def marked(mark: str) -> dict[int, str]:
    """Return the command lines of the processes started with a mark, by process id."""
    found: dict[int, str] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(folder.name)] = command.decode(errors="replace")
    return found


def listening(pids: set[int]) -> set[str]:
    """Return the addresses, in hexadecimal, on which any of these processes listens."""
    inodes: set[str] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    inodes.add(os.readlink(entry).removeprefix("socket:[").removesuffix("]"))
    found: set[str] = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:  # 0A: listening
                found.add(fields[1].partition(":")[0])
    return found


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


@contextlib.contextmanager
def started(command: list[str], env: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen]:
    """Run a program in a new process group, which is ended at the end of the ``with`` block."""
    program = Path(sys.executable).with_name(command[0])
    with log.open("w") as out:
        process = subprocess.Popen(
            [str(program), *command[1:]],
            env=dict(env),
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def federate(out: Path, env: dict[str, str], rounds: int, timeout: int) -> dict[str, Any]:
    """Run the federation, kill client 1 in round 2, and return the server's report."""
    link, *nodes = free_ports(3)
    config = f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{link}"\n'
    Path(env["FLWR_HOME"], "config.toml").write_text(f"{config}insecure = true\n")
    with contextlib.ExitStack() as stack:
        superlink = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(link)]
        superlink.append("--disable-runtime-dependency-installation")
        stack.enter_context(started(superlink, env, out / "superlink.log"))
        wait_for(link)
        supernodes = [
            stack.enter_context(
                started(
                    [
                        "flower-supernode",
                        "--insecure",
                        *("--superlink", f"127.0.0.1:{link}"),
                        *("--host", "127.0.0.1", "--port", str(port)),
                        *("--node-config", f"partition-id={i} capability={i + 1}"),
                    ],
                    env,
                    out / f"supernode-{i}.log",
                )
            )
            for i, port in enumerate(nodes)
        ]
        return watch(supernodes[1], env, rounds, timeout)


def wait_for(port: int, seconds: float = 60.0) -> None:
    """Wait until a process listens on ``port``; raise TimeoutError after ``seconds``."""
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        if time.monotonic() > end:
            raise TimeoutError(f"expected a listener on port {port} in {seconds} s, found none")
        time.sleep(0.2)


def watch(
    victim: subprocess.Popen, env: Mapping[str, str], rounds: int, timeout: int
) -> dict[str, Any]:
    """Start the run, print its output, and kill a client when round 2 begins."""
    flwr = Path(sys.executable).with_name("flwr")
    settings = f"num-server-rounds={rounds} timeout={timeout}"
    command = [str(flwr), "run", str(APP), "--stream", "--run-config", settings]
    report: dict[str, Any] = {"outside": [], "rounds": []}
    with subprocess.Popen(
        command, env=dict(env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as run:
        assert run.stdout is not None
        for line in run.stdout:
            print("  flwr |", line.rstrip())
            if f"[ROUND 2/{rounds}]" in line:
                outside = listening(set(marked(env[MARK]))) - LOOPBACK
                os.killpg(victim.pid, signal.SIGKILL)
                print(
                    "killed client 1;", f"listening outside loopback: {sorted(outside) or 'none'}"
                )
                report["outside"] = sorted(outside)
            if "REPORT {" in line:
                report |= json.loads(line[line.index("REPORT") + len("REPORT") :])
                break
        run.terminate()
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--timeout", type=int, default=40, help="seconds to wait for a round")
    parser.add_argument("--out", type=Path, default=ROOT / "out/federated_deployment")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as home:
        env = environment(Path(home))
        report = federate(args.out, env, args.rounds, args.timeout)
        end = time.monotonic() + 20
        while (left := marked(env[MARK])) and time.monotonic() < end:
            time.sleep(0.5)
    report |= {"seconds": round(time.monotonic() - begun), "left over": list(left.values())}
    (args.out / "report.json").write_text(json.dumps(report, indent=2))
    print(json.dumps(report, indent=2))
    done = len(report["rounds"]) == args.rounds
    return 0 if done and not left and not report["outside"] else 1


if __name__ == "__main__":
    sys.exit(main())
