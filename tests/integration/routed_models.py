"""X-LoRA and Arrow models of PEFT over a tiny Llama, with adapters from PEFT's files."""

import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora.arrow import create_arrow_model
from tiny import WIDTH, make_model, make_peft

EXPERTS = 4
TARGETS = ["q_proj", "down_proj"]


def expert_folders(folder: Path, *each: dict[str, Any], **fields: Any) -> list[str]:
    """Save adapters and return their folders; ``each`` holds the settings of single adapters."""
    fields = {"r": 4, "target_modules": TARGETS, **fields}
    given = [*each, *({} for _ in range(EXPERTS - len(each)))]
    configs = {f"e{i}": {**fields, **own} for i, own in enumerate(given)}
    model: Any = make_peft(make_model("llama"), configs)
    model.save_pretrained(str(folder))
    return [str(folder / name) for name in configs]


def xlora(folders: list[str], **fields: Any) -> Any:
    """Return an X-LoRA model whose classifier has random weights."""
    base: Any = make_model("llama")
    base.config.use_cache = False
    adapters = {str(i): path for i, path in enumerate(folders)}
    given = {"hidden_size": WIDTH, "xlora_depth": 1, "layerwise_scalings": True, **fields}
    config = peft.XLoraConfig(task_type="CAUSAL_LM", adapters=adapters, **given)
    model: Any = peft.get_peft_model(base, config)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.base_model.internal_xlora_classifier.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def arrow(folders: list[str], general: list[str] | None = None, **fields: Any) -> Any:
    """Return an Arrow model; ``general`` are the folders of general adapters."""
    config = peft.ArrowConfig(use_gks=general is not None, **{"top_k": 2, **fields})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that several adapters have one base model.
        model = create_arrow_model(make_model("llama"), folders, config, general)  # pyright: ignore
    return model.eval()
