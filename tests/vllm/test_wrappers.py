"""vLLM's Punica wrappers for CPU and CUDA (emulated) with lora_ext's updates, without an engine."""

from types import SimpleNamespace

import pytest
import torch

SLOTS, RANK, WIDTH, OUT = 4, 8, 6, 5
CONFIG = SimpleNamespace(
    max_loras=SLOTS, max_lora_rank=RANK, lora_dtype=torch.float32,
    specialize_active_lora=False, fully_sharded_loras=False,
)  # fmt: skip


class NoTriton:
    """Substitute for the metadata of row order that vLLM's Triton kernels need."""

    @classmethod
    def make(cls, *args, **kwargs):
        return cls()

    def prepare_tensors(self, ids):
        pass


@pytest.fixture(params=["CPU", "CUDA"])
def wrapper(request, monkeypatch, backend):
    if request.param == "CUDA":
        from vllm.lora.punica_wrapper import punica_gpu

        monkeypatch.setattr(punica_gpu, "LoRAKernelMeta", NoTriton, raising=False)
        from lora_ext.interop.vllm._cuda import LoraExtWrapperCUDA as Wrapper
    else:
        from lora_ext.interop.vllm._cpu import LoraExtWrapperCPU as Wrapper
    return Wrapper(16, 8, backend.device, lora_config=CONFIG)


def test_rows_use_the_adapters_in_the_mapping_of_vllm(wrapper):
    """Compare both updates with sums of small integers, which are exact in float32. The ids of the
    adapters in slots 0 to 3 are 7, 3, 5 and 9; the fifth row has no adapter."""
    from vllm.lora.layers import LoRAMapping

    device = wrapper._token_lora_indices.device
    g = torch.Generator().manual_seed(0)

    def integers(*shape):
        return torch.randint(-3, 4, shape, generator=g).float().to(device)

    a, b, x = integers(SLOTS, 1, RANK, WIDTH), integers(SLOTS, 1, OUT, RANK), integers(6, WIDTH)
    tokens, slots = (5, 5, 9, 3, 0, 7), [2, 2, 3, 1, -1, 0]
    mapping = LoRAMapping(tokens, (5, 9, 3, 0, 7), is_prefill=True)
    wrapper.update_metadata(mapping, [7, 3, 5, 9], SLOTS + 1, 99)
    y, logits = integers(6, OUT), integers(5, OUT)

    def update(rows, slots):
        return torch.stack(
            [
                b[s, 0] @ (a[s, 0] @ row) if s >= 0 else torch.zeros(OUT, device=device)
                for row, s in zip(rows, slots, strict=True)
            ]
        )

    wanted, wanted_logits = y + update(x, slots), logits + update(x[1:].clone(), slots[1:])
    wrapper.add_lora_linear(y, x, (a,), (b,), 1.0, (OUT,))
    wrapper.add_lora_logits(logits, x[1:].clone(), a, b, 1.0)
    assert torch.equal(y, wanted) and torch.equal(logits, wanted_logits)


def test_all_functions_that_layers_call_are_replaced_except_experts_and_heads():
    from vllm.lora.punica_wrapper.punica_base import PunicaWrapperABC, PunicaWrapperBase

    from lora_ext.interop.vllm import _cpu, _cuda
    from lora_ext.interop.vllm._updates import Updates

    called = {name for name in vars(PunicaWrapperABC) if name.startswith("add_")}
    experts = {name for name in vars(PunicaWrapperBase) if name.startswith("add_")} - called
    assert experts == {"add_lora_fused_moe", "add_lora_w13", "add_lora_w2"}
    for made in (_cpu.LoraExtWrapperCPU, _cuda.LoraExtWrapperCUDA):
        assert all(getattr(made, name) is getattr(Updates, name) for name in called)
    assert not experts & vars(Updates).keys()


def test_experts_raise_on_the_cpu():
    from lora_ext.interop.vllm._cpu import LoraExtWrapperCPU

    made = LoraExtWrapperCPU(16, 8, "cpu", lora_config=CONFIG)
    with pytest.raises(NotImplementedError, match="vLLM has no LoRA for experts on the CPU"):
        made.add_lora_w13()


def test_adapters_of_another_wrapper_are_ignored():
    """Check also that the method of the adapter manager is wrapped once, for all users."""
    from vllm.lora.model_manager import LoRAModelManager

    from lora_ext.interop.vllm._updates import follow_activations

    follow_activations()
    once = LoRAModelManager.activate_adapter
    follow_activations()
    assert LoRAModelManager.activate_adapter is once

    manager = SimpleNamespace(
        _active_adapters={},
        lora_index_to_id=[None],
        _registered_adapters={3: SimpleNamespace(id=3)},
    )
    manager.modules, manager.punica_wrapper_mapping = {}, {"language_model": object()}
    assert once(manager, 3) and not once(manager, 3)
