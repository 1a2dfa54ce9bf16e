"""Logits processor that vLLM imports by name."""

from __future__ import annotations

import importlib
from typing import Any

from ._constraints import ConstrainedRows

_Base: Any = importlib.import_module("vllm.v1.sample.logits_processor").LogitsProcessor


class Constraints(ConstrainedRows, _Base):
    """Logits processor for constraints of requests.

    Use ``LLM(..., logits_processors=["lora_ext.interop.vllm.processor:Constraints"])``;
    docs/vllm.md describes the arguments of a request.
    """
