"""Settings of a manager of continuous batching that an attached model can follow."""

from __future__ import annotations

from typing import Any


def check_settings(manager: Any) -> None:
    """Refuse what would run a step without its block; switch off what would replay an old one."""
    config = manager.continuous_batching_config
    refused = {
        "tensor parallelism": manager.distributed_helper.tp_size > 1,
        "varlen_compile_config": config.varlen_compile_config is not None,
        "decode_compile_config": config.decode_compile_config is not None,
    }
    for what, found in refused.items():
        if found:
            if manager._original_attn_impl is not None:
                manager.model.set_attn_implementation(manager._original_attn_impl)
            raise NotImplementedError(
                f"init_continuous_batching: expected an attached model without {what}, found it: "
                "the rows of a step would not find their adapters"
            )
    config.use_cuda_graph, config.use_async_batching = (False, False), False
