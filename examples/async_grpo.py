"""Train an adapter with TRL's AsyncGRPOTrainer on answers of `lora-ext serve`.

TRL expects vLLM's server; this example runs `lora-ext serve` instead. At each step, the trainer
pauses the server, loads the new weights as an adapter, and resumes it. Meanwhile another adapter on
the same server answers another client. Answers of SmolLM2 are rewarded for the share of their words
that begin with a capital letter. The example takes four minutes on two cores, without GPU or
network: `make demo`, `pip install trl aiohttp`, and `python examples/async_grpo.py`.

Without a GPU, three functions of TRL are replaced (`without_gpu`): the number of operations per
second of the GPU, the check that vLLM is installed, and the attention kernel. TRL's client and
trainer are not changed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import TrainerCallback
from transformers.utils import logging

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = (
    "Tell me about a small town by the sea.",
    "What is a good name for a cat?",
    "How do I make tea?",
    "Why is the sky blue?",
)
#: Format of an answer: TRL knows those of some models and otherwise requires this attribute.
ANSWER = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {"content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"}},
}


def matching(
    completions: Sequence[Sequence[dict[str, str]]], pattern: str = "[A-Z]", **_: Any
) -> list[float]:
    """Return, for each answer, the share of its words whose beginning matches ``pattern``."""
    texts = [answer[-1]["content"].split() for answer in completions]
    return [sum(bool(re.match(pattern, w)) for w in words) / max(len(words), 1) for words in texts]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_ends: Tensor,
    key_ends: Tensor,
    *_: int,
    softmax_scale: float,
    **how: Any,
) -> Tensor:
    """Return the attention of packed sequences, like ``flash_attn_varlen_func``.

    Args:
        query: ``(T, H, D)`` of all sequences, one after the other.
        key, value: ``(L, G, D)``; ``G`` divides ``H``.
        query_ends, key_ends: first row of each sequence, then the number of rows.
        softmax_scale: factor of the products of queries and keys.
        how: other arguments; attention is always causal and not limited to a window.
    """
    assert how == {"causal": True, "window_size": (-1, -1)}
    parts = []
    for (q0, q1), (k0, k1) in zip(_pairs(query_ends), _pairs(key_ends), strict=True):
        q, k, v = (t.transpose(0, 1) for t in (query[q0:q1], key[k0:k1], value[k0:k1]))
        mask = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).tril(k1 - k0 - (q1 - q0))
        y = scaled_dot_product_attention(q, k, v, mask, scale=softmax_scale, enable_gqa=True)
        parts.append(y.transpose(0, 1))
    return torch.cat(parts)


def _pairs(ends: Tensor) -> Iterator[tuple[int, int]]:
    return zip(ends.tolist(), ends.tolist()[1:], strict=False)


@contextlib.contextmanager
def without_gpu() -> Iterator[None]:
    """Replace three functions of TRL that need a GPU or vLLM, in a ``with`` block."""
    from trl.experimental.async_grpo import async_grpo_trainer, async_rollout_worker, packing

    kernels = SimpleNamespace(flash_attn_varlen_func=attention)
    with (
        mock.patch.object(async_grpo_trainer, "get_peak_flops_per_device", lambda *_: None),
        mock.patch.object(async_rollout_worker, "is_vllm_available", lambda: True),
        mock.patch.object(packing, "_flash_attn", lambda: kernels),
    ):
        yield


class _Progress(TrainerCallback):
    """Callback that prints a line per step."""

    def on_log(self, *given: Any, logs: Any = None, **_: Any) -> None:
        if "reward" in (logs or {}):
            print(
                f"step {given[1].global_step:2}: reward {logs['reward']:.3f}, mean ratio "
                f"{logs['ratio']:.5f}",
                flush=True,
            )


def train(
    url: str,
    model: Path,
    tokenizer: Any,
    out: Path,
    *,
    reward: Any = matching,
    questions: Sequence[str] = QUESTIONS,
    steps: int = 8,
    batch: int = 32,
    group: int = 8,
    length: int = 12,
    rate: float = 2e-3,
    rank: int = 16,
    seed: int = 0,
) -> list[dict[str, float]]:
    """Train an adapter against the server at ``url``, and return what TRL logged at each step.

    Args:
        url: address of the server.
        model: folder of the model, the same as the server's.
        tokenizer: tokenizer of the model.
        out: folder of TRL's output, below the server's folder of adapters.
        reward: reward function.
        questions: prompts, in turns.
        steps: number of optimizer steps.
        batch: number of answers per step.
        group: number of answers to one prompt, whose rewards are compared.
        length: maximum number of tokens of an answer.
        rate: learning rate.
        rank: rank of the adapter.
        seed: seed of the trainer.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback
    from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer

    tokenizer.response_template = ANSWER
    config = AsyncGRPOConfig(
        str(out),
        vllm_server_base_url=url,
        max_steps=steps,
        per_device_train_batch_size=batch,
        num_generations=group,
        max_completion_length=length,
        max_staleness=1,  # with 0, TRL unloads an adapter that its worker may still request
        token_budget=0,
        learning_rate=rate,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=seed,
    )
    prompts = [{"prompt": [{"role": "user", "content": each}]} for each in questions]
    with without_gpu():
        trainer = AsyncGRPOTrainer(
            str(model),
            reward,
            config,
            Dataset.from_list(prompts),
            tokenizer,
            peft_config=LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Progress)
        trainer.train()
    return [line for line in trainer.state.log_history if "reward" in line]


@contextlib.contextmanager
def serving(model: Path, adapters: Path) -> Iterator[str]:
    """Run ``lora-ext serve`` in a ``with`` block, and yield the server's address."""
    command = [sys.executable, "-m", "lora_ext", "serve", "--port", "0"]
    command += ["--model", str(model), "--adapters", str(adapters)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = next(filter(None, (re.search(r"http://\S+:\d+", x) for x in process.stdout)))
            threading.Thread(target=process.stdout.read, daemon=True).start()
            yield found[0]
        finally:
            process.terminate()


def ask(url: str, model: str) -> str:
    """Return the answer of an adapter, or of the base model, to the first question."""
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    body = {"model": model, "messages": messages, "max_tokens": 12, "temperature": 0}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request) as response:
        return json.load(response)["choices"][0]["message"]["content"]


def main(
    steps: int = 8, out: Path = ROOT / "out" / "async_grpo", **how: Any
) -> tuple[list[dict[str, float]], list[str]]:
    """Train an adapter while a client uses another adapter of the same server.

    Args:
        steps: number of optimizer steps.
        out: folder of adapters of the server.
        how: other arguments of :func:`train`.

    Returns:
        What TRL logged at each step, and the answers of the other adapter.
    """
    # Not at the top, since TRL's child process imports this file, too.
    from training import RECIPES, train_adapter

    from lora_ext.interop.smollm2 import converted_folder, load_smollm2

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = converted_folder()
    model, tokenizer = load_smollm2()
    demo = ROOT / "out" / "demo"
    demo.mkdir(parents=True, exist_ok=True)
    pirate = train_adapter(model, tokenizer, RECIPES[0], demo)  # already done by `make demo`
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(pirate, out / "pirate")
    ended, answers = threading.Event(), []
    with serving(folder, out) as url:

        def other_client() -> None:
            while not ended.wait(5):
                answers.append(ask(url, "pirate"))

        print(f"before: {ask(url, folder.name)}")
        client = threading.Thread(target=other_client)
        client.start()
        try:
            lines = train(url, folder, tokenizer, out / "trained", steps=steps, **how)
        finally:
            ended.set()
            client.join()
        print(f"after: {ask(url, f'trl-policy-v{steps + 1}')}")
        print(f"pirate, {len(answers)} times: {' / '.join(set(answers))}")
    return lines, answers


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=8)
    main(parser.parse_args().steps)
