"""Logits processor for constraints. vLLM imports the class by its name."""

from __future__ import annotations

import importlib
from typing import Any

from ._constraints import ConstrainedRows

_Base: Any = importlib.import_module("vllm.v1.sample.logits_processor").LogitsProcessor


class Constraints(ConstrainedRows, _Base):
    """vLLM logits processor that applies the constraints of requests.

    Use ``LLM(..., logits_processors=["lora_ext.interop.vllm.processor:Constraints"])``. The page
    ``docs/vllm.md`` describes how a request contains a constraint.
    """
