"""The logits processor that vLLM is told of, by name."""

from __future__ import annotations

import importlib
from typing import Any

from ._constraints import ConstrainedRows

_Base: Any = importlib.import_module("vllm.v1.sample.logits_processor").LogitsProcessor


class Constraints(ConstrainedRows, _Base):
    """``LLM(..., logits_processors=["lora_ext.interop.vllm.processor:Constraints"])``; docs/vllm.md
    has what a request says."""
