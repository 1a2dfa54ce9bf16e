"""TRL's AsyncGRPOTrainer with ``lora-ext serve`` in place of vLLM."""

import functools
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import ROOT, needs
from served import ask, needs_packages, settle, text_of

peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
packages = ("trl", "aiohttp", "requests", "datasets")
pytestmark = [needs_packages, needs(*packages), pytest.mark.slow]


def test_trl_trains_an_adapter_while_another_one_answers(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # TRL would mistake tests/vllm for the package vllm. A child process imports from examples/.
    tests = str(Path(__file__).parents[1])
    path = [str(ROOT / "examples"), *(each for each in sys.path if each != tests)]
    monkeypatch.setattr(sys, "path", path)
    import async_grpo

    expected = text_of(ask(server, "a1"))
    ended, answers = threading.Event(), []

    def other_client() -> None:
        while not ended.is_set():
            answers.append(text_of(ask(server, "a1")))

    client = threading.Thread(target=other_client)
    client.start()
    try:
        lines = async_grpo.train(
            str(server.client.base_url).rstrip("/"),
            server.folder / "tiny",
            server.engine.tokenizer,
            server.folder / "adapters" / "trained",
            reward=functools.partial(async_grpo.matching, pattern="w[3-6]"),
            questions=["w5 w6", "w7", "w8 w9 w10", "w11"],
            steps=10,
            batch=16,
            group=4,
            length=8,
            rate=1e-2,
            rank=4,
        )
    finally:
        ended.set()
        client.join()
    assert len(lines) == 10
    fresh = [line["ratio"] for line in lines if line["sample/staleness_max"] == 0]
    assert fresh[0] == lines[0]["ratio"]
    # TRL computes the staleness when it fetches a batch. accelerate fetches one before the previous
    # step, so later answers may be of an older version than stated, and their ratio then is not 1.
    assert abs(fresh[0] - 1) < 1e-4
    assert all(line["grad_norm"] > 0 and 0 < line["reward"] < 1 for line in lines)
    assert len(answers) > 10 and set(answers) == {expected}
    served = [name for name in server.engine.pool.names if name.startswith("trl-policy")]
    assert sorted(served) == ["trl-policy-v10", "trl-policy-v11"]  # v1 is the untrained adapter
    assert not server.engine.paused
    check_probabilities(server, "trl-policy-v11")
    settle(server)


def check_probabilities(server: Any, name: str) -> None:
    """Check that the server's probabilities are those of PEFT with the trainer's last files."""
    body = {"model": name, "prompt": [5, 6, 7], "max_tokens": 20, "seed": 1, "logprobs": 0}
    found = server.client.post("/v1/completions", json={**body, "return_token_ids": True})
    choice = found.json()["choices"][0]
    tokens, logprobs = choice["token_ids"], torch.tensor(choice["logprobs"]["token_logprobs"])
    model = transformers.AutoModelForCausalLM.from_pretrained(server.folder / "tiny").eval()

    def expected() -> torch.Tensor:
        with torch.no_grad():
            wanted = model(torch.tensor([[5, 6, 7, *tokens]])).logits.log_softmax(-1)[0, 2:-1]
        return wanted.gather(1, torch.tensor(tokens)[:, None])[:, 0]

    assert (expected() - logprobs).abs().max() > 0.01, "expected an adapter that has changed"
    files = server.folder / "adapters" / "trained" / ".vllm_lora" / name
    model = peft.PeftModel.from_pretrained(model, files)
    assert (expected() - logprobs).abs().max() < 1e-5
