"""Train two adapters at once on a 4-bit base model (QLoRA) on a CPU, and compare with PEFT.

The base model is SmolLM2-135M in nf4 of bitsandbytes. Each step has rows of two texts, and each row
trains the adapter of its text. PEFT cannot do this, so its process trains one adapter on the same
rows, and so does a second process with lora_ext. Each process prints its memory and its losses.

The example takes two minutes on two cores. Run `make demo`,
`pip install --no-build-isolation '.[quant]'`, and `python examples/qlora.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import lora_ext

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("pirate", "telegram")
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def texts(name: str, count: int) -> list[str]:
    """Return questions with answers in one style."""
    lines = (ROOT / "examples" / "texts" / f"{name}.jsonl").read_text().splitlines()
    return [" ".join(map(str, json.loads(line).values())) for line in lines[:count]]


def memory(field: str) -> int:
    """Return a field of this process's status in MiB: VmRSS is its memory, VmHWM the peak."""
    status = Path("/proc/self/status").read_text()
    return round(int(status.split(f"{field}:")[1].split()[0]) / 1024)


def quantise(base: Path, folder: Path) -> None:
    """Save the base model in nf4."""
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    how = {"dtype": torch.float32, "device_map": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=nf4, **how)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)


def train(arm: str, base: Path, steps: int, rows: int, tokens: int) -> dict[str, Any]:
    """Train with "peft", with "ours" (one adapter), or with "names" (an adapter for each text)."""
    torch.manual_seed(0)
    how = {"dtype": torch.float32, "device_map": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(base, **how)
    model = prepare_model_for_kbit_training(
        model, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=MODULES)
    model = get_peft_model(model, config, adapter_name=NAMES[0])
    names = {}
    if arm == "names":
        model.add_adapter(NAMES[1], config)
        model.set_requires_grad(list(NAMES))
        names["adapter_names"] = [name for name in NAMES for _ in range(rows // 2)]
    if arm != "peft":
        lora_ext.from_peft(model)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.eos_token
    given = [text for name in NAMES for text in texts(name, rows // 2)]
    batch = tokenizer(
        given, return_tensors="pt", padding="max_length", truncation=True, max_length=tokens
    )
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading the model
    loaded = memory("VmRSS")
    model.train()
    losses, start = [], time.process_time()
    for _ in range(steps):
        loss = model(**batch, labels=labels, **names).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    peak = memory("VmHWM")
    return {
        "arm": arm,
        "loss": [round(loss, 3) for loss in losses],
        "cpu_seconds_per_step": round((time.process_time() - start) / steps, 2),
        "peak_mb": peak,
        "above_loaded_mb": peak - loaded,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=ROOT / "out/demo/base-model")
    parser.add_argument("--out", type=Path, default=ROOT / "out/qlora", help="nf4 model folder")
    parser.add_argument("--arm", choices=("peft", "ours", "names"), help="run one process only")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    given = parser.parse_args()
    if given.arm:
        found = train(given.arm, given.out, given.steps, given.rows, given.tokens)
        print(json.dumps(found), flush=True)
        return
    if not (given.out / "config.json").exists():
        quantise(given.base, given.out)
    # Each arm runs in its own process, because peak memory is measured per process.
    for arm in ("peft", "ours", "names"):
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--arm", arm], check=True)


if __name__ == "__main__":
    main()
