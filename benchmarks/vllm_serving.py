"""Time vLLM on the CPU with many adapters: with its LoRA kernels, with ours, and without LoRA.

SmolLM2-135M serves 16 rows with one adapter each, on all seven linear layers. Both kernels run in
one engine, which switches them between generations; another engine has no LoRA. Rounds alternate
between the engines in this process. Before timing, the results of both kernels are compared.

`make vllm` creates the environment; then run
`.venv-vllm/bin/python benchmarks/vllm_serving.py --check`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", LORA_EXT_VLLM="1", HF_HUB_OFFLINE="1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import safetensors.torch
import torch
import transformers
from common import Timing, append_rows, machine_columns
from vllm import LLM, SamplingParams
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.lora.request import LoRARequest

from lora_ext.interop.smollm2 import converted_folder
from lora_ext.interop.vllm._updates import Updates

ROWS = 16
RANKS = {"r16": [16] * ROWS, "r8 to r64": [8, 16, 32, 64] * (ROWS // 4)}
PROMPT = {"decode": 8, "prefill": 32}  # tokens per row
# Least ratio of vLLM's time to ours.
TARGETS = {
    ("r16", "decode"): 1.8,
    ("r8 to r64", "decode"): 3.0,
    ("r16", "prefill"): 4.0,
    ("r8 to r64", "prefill"): 4.0,
}
# Bound of the mean difference of a row's first twenty log-probabilities, for the rounding of 30
# layers. In bfloat16, the error of each kernel against float32 is 0.05, and rows differ between the
# kernels by up to 0.09; with a wrong adapter, a row differs by 0.15 or more.
BOUND = {"float32": 1e-4, "bfloat16": 0.12}


def save_adapters(model: Path, folder: Path, ranks: list[int]) -> list[LoRARequest]:
    """Save random adapters of all linear layers, whose updates are about a tenth of the base
    outputs."""
    config = transformers.AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        shapes = {
            name: module.weight.shape
            for name, module in transformers.AutoModelForCausalLM.from_config(
                config
            ).named_modules()
            if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head")
        }
    requests = []
    for number, rank in enumerate(ranks, 1):
        generator = torch.Generator().manual_seed(number)
        path = folder / f"{number}-r{rank}"
        path.mkdir(parents=True)
        tensors = {}
        for name, (out, width) in shapes.items():
            a = torch.randn(rank, width, generator=generator) * width**-0.5
            b = torch.randn(out, rank, generator=generator) * 0.1 * rank**-0.5
            tensors[f"base_model.model.{name}.lora_A.weight"] = a
            tensors[f"base_model.model.{name}.lora_B.weight"] = b
        safetensors.torch.save_file(tensors, path / "adapter_model.safetensors")
        modules = sorted({name.rpartition(".")[2] for name in shapes})
        peft_config(path, rank, modules)
        requests.append(LoRARequest(path.name, number, str(path)))
    return requests


def peft_config(path: Path, rank: int, modules: list[str]) -> None:
    from peft import LoraConfig

    LoraConfig(
        r=rank, lora_alpha=rank, target_modules=modules, task_type="CAUSAL_LM"
    ).save_pretrained(path)


class Engine:
    """Engine in this process; each generation is a prefill followed by decode steps."""

    def __init__(self, model: Path, dtype: str, **options: Any):
        self.llm = LLM(
            str(model),
            dtype=dtype,
            enforce_eager=True,
            max_model_len=512,
            max_num_seqs=ROWS,
            max_num_batched_tokens=2048,
            enable_prefix_caching=False,
            **options,
        )
        self._count = 0

    def run(self, requests: list[Any], prompt: int, new: int) -> tuple[list[float], list[Any]]:
        """Return the seconds of each step, prefill first, and the answers in row order."""
        engine = self.llm.llm_engine
        how = SamplingParams(
            temperature=0, max_tokens=new, ignore_eos=True, logprobs=20, detokenize=False
        )
        for row, request in enumerate(requests):
            generator = torch.Generator().manual_seed(row)
            ids = torch.randint(100, 40000, (prompt,), generator=generator).tolist()
            engine.add_request(
                f"{self._count}", {"prompt_token_ids": ids}, how, lora_request=request
            )
            self._count += 1
        seconds, answers = [], []
        while engine.has_unfinished_requests():
            start = time.perf_counter()
            found = engine.step()
            seconds.append(time.perf_counter() - start)
            answers += [output for output in found if output.finished]
        return seconds, sorted(answers, key=lambda output: int(output.request_id.split("-")[0]))

    @property
    def manager(self) -> Any:
        """vLLM's manager, which moves adapters into slots."""
        core = self.llm.llm_engine.engine_core.engine_core
        return core.model_executor.driver_worker.worker.model_runner.lora_manager._adapter_manager

    def into_a_slot(self, theirs: bool) -> float:
        """Return the seconds to move an adapter to a slot. Unless ``theirs`` is true, the seconds
        include the time to read the adapter's ranks."""
        move = type(self.manager).activate_adapter  # the LRU cache's; it calls the wrapped one
        changed = Updates.slot_changed
        if theirs:
            Updates.slot_changed = lambda self, slot: None  # pyright: ignore[reportAttributeAccessIssue]
        self.manager.deactivate_adapter(1)
        start = time.perf_counter()
        move(self.manager, 1)
        seconds = time.perf_counter() - start
        Updates.slot_changed = changed
        return seconds

    @contextlib.contextmanager
    def kernels(self, theirs: bool) -> Iterator[None]:
        """Use vLLM's kernels if ``theirs`` is true, otherwise lora_ext's."""
        if not theirs:
            yield
            return
        (wrapper,) = self.manager.punica_wrapper_mapping.values()
        own = [name for name in vars(PunicaWrapperCPU) if name.startswith("add_")]
        for name in own:
            setattr(wrapper, name, MethodType(getattr(PunicaWrapperCPU, name), wrapper))
        yield
        for name in own:
            delattr(wrapper, name)


def check(name: str, engine: Engine, requests: list[Any], dtype: str) -> float:
    """Return the mean difference of log-probabilities between the kernels, largest over the rows.

    A row is compared up to the first token that differs.
    """
    found = []
    for theirs in (False, True):
        with engine.kernels(theirs):
            found.append(engine.run(requests, 8, 4)[1])
    worst = 0.0
    for ours, other in zip(*found, strict=True):
        apart = []
        for a, b in zip(ours.outputs[0].logprobs, other.outputs[0].logprobs, strict=True):
            apart += [abs(a[t].logprob - b[t].logprob) for t in a.keys() & b.keys()]
            if next(iter(a)) != next(iter(b)):
                break  # Rounding chose another token; later tokens are not comparable.
        worst = max(worst, statistics.fmean(apart))
    if not worst <= BOUND[dtype]:
        raise SystemExit(
            f"vllm_serving: {name}: expected mean log-probabilities per row within "
            f"{BOUND[dtype]} of vLLM's kernels, found a difference of {worst:.3g}"
        )
    return worst


def measure(
    plain: Engine, engine: Engine, requests: list[Any], kind: str, rounds: int, steps: int
) -> dict[str, Timing]:
    """Return the seconds of the prefill, or of the median decode step of each generation."""
    found: dict[str, list[float]] = {"no LoRA": [], "vLLM": [], "lora_ext": []}
    for index in range(-1, rounds):  # the first is a warm-up
        for name in list(found)[:: 1 if index % 2 else -1]:
            loras = [None] * ROWS if name == "no LoRA" else requests
            server = plain if name == "no LoRA" else engine
            with server.kernels(name == "vLLM"):
                seconds, _ = server.run(loras, PROMPT[kind], 1 if kind == "prefill" else steps + 1)
            if index >= 0:
                found[name].append(statistics.median(seconds[1:] or seconds))
    return {name: Timing.of(times) for name, times in found.items()}


def run_case(
    name: str, plain: Engine, model: Path, scratch: Path, options: argparse.Namespace
) -> Iterator[tuple[dict[str, object], list[str]]]:
    """Yield the rows of one mix of ranks, each with the targets that it misses."""
    requests = save_adapters(model, scratch / name, RANKS[name])
    slots = {"max_loras": ROWS, "max_cpu_loras": ROWS, "max_lora_rank": max(RANKS[name])}
    engine = Engine(model, options.dtype, enable_lora=True, **slots)
    worst = check(name, engine, requests, options.dtype)
    own, read = (
        1e3 * statistics.median(engine.into_a_slot(theirs) for _ in range(9))
        for theirs in (True, False)
    )
    print(f"{name:10} into a slot: {own:.1f} ms; with reading the ranks {read:.1f} ms")
    for kind in PROMPT:
        times = measure(plain, engine, requests, kind, options.rounds, options.steps)
        gain, target = times["vLLM"].over(times["lora_ext"]), TARGETS[name, kind]
        missed = f"{name}, {kind}: {gain:.2f} x, expected {target} x"
        line = []
        for provider, t in times.items():
            over = t.over(times["no LoRA"])
            line.append(f"{provider} {1e3 * t.median:.1f} ms ({over:.2f} x)")
            milliseconds = {k: round(1e3 * getattr(t, k), 2) for k in ("median", "p20", "p80")}
            row = {"case": name, "kind": kind, "dtype": options.dtype, "provider": provider}
            row |= milliseconds | {"over_no_lora": round(over, 3), "worst_error": worst}
            row["gain"] = round(gain, 3) if provider == "lora_ext" else ""
            yield machine_columns() | row, [missed] if row["gain"] and gain < target else []
        print(f"{name:10} {kind:8}", *line, f"gain {gain:.2f} x (target {target} x)", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12, help="decode steps of a generation")
    parser.add_argument("--dtype", choices=BOUND, default="float32")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    parser.add_argument("--out", type=Path, help="csv file to which rows are appended")
    options = parser.parse_args()
    model = converted_folder()
    plain = Engine(model, options.dtype)
    with tempfile.TemporaryDirectory() as scratch:
        found = [
            pair for name in RANKS for pair in run_case(name, plain, model, Path(scratch), options)
        ]
    if options.out:
        append_rows(options.out, [row for row, _ in found])
    missed = [line for _, lines in found for line in lines]
    for line in missed:
        print(f"missed: {line}")
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
