"""The training loss of causal LMs without their full logits, compared with transformers."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import transformers
from common import error_over_bound
from data_parallel import assert_same as assert_same_changes
from data_parallel import trained
from peft import LoraConfig, get_peft_model
from processes import TwoProcesses
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import lora_ext

SMALL = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
IDS = torch.randint(0, 61, (3, 7), generator=torch.manual_seed(0))
LABELS = IDS.masked_fill(torch.rand(3, 7, generator=torch.manual_seed(1)) < 0.3, -100)
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Phi": {},  # output layer with a bias
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 0.5, "tie_word_embeddings": True},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 3.0},
    "Mixtral": {"num_local_experts": 2, "output_router_logits": True},  # loss with a router term
}


def model_of(family: str = "Llama") -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(SMALL | FAMILIES[family]))
    model = getattr(transformers, f"{family}ForCausalLM")(config).train()
    if model.lm_head.bias is not None:
        nn.init.normal_(model.lm_head.bias)
    return model


def step(model: Any, **given: Any) -> tuple[Any, dict[str, Tensor]]:
    model.zero_grad()
    output = model(**({"input_ids": IDS, "labels": LABELS} | given))
    output.loss.backward()
    return output, {k: p.grad for k, p in model.named_parameters() if p.grad is not None}


def steps_of_transformers(model: Any, **given: Any) -> tuple[Any, Any]:
    """Return the results of a training step with copies of ``model``, in its dtype and in
    float64."""
    wide = copy.deepcopy(model).double()
    if hasattr(wide, "set_experts_implementation"):
        wide.set_experts_implementation("eager")  # Grouped products do not support float64.
    return step(copy.deepcopy(model), **given), step(wide, **given)


def assert_same(found: Any, expected: Any) -> None:
    """Compare the losses, and the norm of the error of all gradients together, since some gradients
    are zero up to rounding."""
    assert found[0].logits is None
    steps = (found, *expected)
    assert error_over_bound(*(output.loss.detach() for output, _ in steps)) <= 1
    names = [[name.removeprefix("_orig_mod.") for name in each] for _, each in steps]
    assert names[0] == names[1] == names[2]
    together = (torch.cat([g.flatten() for g in each.values()]) for _, each in steps)
    assert error_over_bound(*together) <= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_transformers(family: str) -> None:
    model = model_of(family)
    expected = steps_of_transformers(model)
    assert lora_ext.chunked_loss(model, chunk=16) is model
    assert_same(step(model), expected)


def test_arguments_of_a_trainer_are_supported() -> None:
    model = model_of()
    shifted = nn.functional.pad(LABELS[:, 1:], (0, 1), value=-100)
    for given in (
        {"num_items_in_batch": 40},
        {"num_items_in_batch": torch.tensor(40)},
        {"shift_labels": shifted},
        {"attention_mask": torch.ones_like(IDS), "return_dict": True},
    ):
        expected = steps_of_transformers(model, **given)
        assert_same(step(lora_ext.chunked_loss(model, chunk=16), **given), expected)
        lora_ext.chunked_loss(model, enabled=False)
    lora_ext.chunked_loss(model)
    loss, *_ = model(IDS, labels=LABELS, return_dict=False)
    assert loss.requires_grad
    assert model(IDS, labels=torch.full_like(IDS, -100)).loss.item() == 0


def test_other_forwards_and_the_disabled_model_are_unchanged() -> None:
    model = model_of()
    before = set(model.lm_head.__dict__)
    logits = model(IDS).logits
    lora_ext.chunked_loss(model)
    assert torch.equal(model(IDS).logits, logits)
    with torch.no_grad():
        assert torch.equal(model(IDS, labels=LABELS).logits, logits)
    assert torch.equal(model.eval()(IDS, labels=LABELS).logits, logits)
    model.train()
    lora_ext.chunked_loss(model, chunk=5)  # A second call replaces the chunk size.
    lora_ext.chunked_loss(model, enabled=False)
    assert "forward" not in model.__dict__ and "_loss_function" not in model.__dict__
    assert set(model.lm_head.__dict__) == before
    assert torch.equal(model(IDS, labels=LABELS).logits, logits)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copy_of_a_model_has_an_independent_loss(copied: Any) -> None:
    model = lora_ext.chunked_loss(model_of(), chunk=16)
    expected = step(model)[0].loss.item()
    other = copied(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    output, gradients = step(other)
    assert output.loss.item() == expected and "lm_head.weight" in gradients
    # The step of the copy did not reset the gradient of the original.
    assert model.lm_head.weight.grad is not None


def test_peft_model_trains_with_the_chunked_loss() -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft = get_peft_model(model_of(), config).train()
    expected = steps_of_transformers(peft)
    ours = lora_ext.chunked_loss(lora_ext.from_peft(peft), chunk=16)
    assert_same(step(ours), expected)


@pytest.mark.slow
def test_compiler_and_autocast_are_supported() -> None:
    model = model_of()
    expected = steps_of_transformers(model)
    lora_ext.chunked_loss(model, chunk=16)
    compiled: Any = torch.compile(model, backend="eager")
    assert_same(step(compiled), expected)
    with torch.autocast("cpu", torch.bfloat16):
        loss = step(model)[0].loss.item()
    assert loss == pytest.approx(expected[0][0].loss.item(), rel=2e-2)


def test_no_tensor_of_full_vocabulary_size_is_made() -> None:
    model = lora_ext.chunked_loss(model_of(), chunk=16)
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = f(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, tuple) else (out,))
                         if isinstance(t, Tensor) and t.shape[-1:] == (61,))  # fmt: skip
            return out

    with Watch():
        step(model)
    assert not sizes


def test_models_that_need_their_logits_raise_and_stay_unchanged() -> None:
    with pytest.raises(ValueError, match="chunked_loss: chunk: expected an integer"):
        lora_ext.chunked_loss(model_of(), chunk=0)
    with pytest.raises(ValueError, match="chunked_loss: model: expected a causal LM"):
        lora_ext.chunked_loss(nn.Linear(2, 2))
    adapted = get_peft_model(model_of(), LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(NotImplementedError, match=r"an output layer that is an nn\.Linear"):
        lora_ext.chunked_loss(adapted)
    own = model_of()
    own.loss_function = lambda logits, labels, **_: logits.mean()
    with pytest.raises(ValueError, match="expected the loss ForCausalLMLoss, found <lambda>"):
        lora_ext.chunked_loss(own)
    odd = model_of()
    own_loss = odd.loss_function
    odd.lm_head.register_forward_hook(lambda *x: x[-1].square())
    with pytest.raises(NotImplementedError, match="logits that are the head's product"):
        lora_ext.chunked_loss(odd)
    assert "forward" not in odd.__dict__ and odd.loss_function is own_loss
    wrapped = lora_ext.chunked_loss(model_of())
    wrapped.lm_head = nn.Linear(16, 61)
    with pytest.raises(NotImplementedError, match="the unsharded output layer from the call"):
        wrapped(IDS, labels=LABELS)


def test_model_with_nan_logits_raises_in_the_call() -> None:
    model = model_of()
    nn.init.constant_(model.lm_head.weight, torch.nan)
    with pytest.raises(ValueError, match=r"^chunked_loss: model: expected logits without NaN"):
        lora_ext.chunked_loss(model)


@pytest.mark.slow
def test_transformers_trainer_gives_the_same_weights(tmp_path: Any) -> None:
    losses = []
    for chunked in (False, True):
        model = model_of()
        if chunked:
            lora_ext.chunked_loss(model, chunk=16)
        args = transformers.TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[],
            gradient_accumulation_steps=2, use_cpu=True, save_strategy="no", seed=0,
            disable_tqdm=True,
        )  # fmt: skip
        rows = [{"input_ids": i, "labels": n} for i, n in zip(IDS, LABELS, strict=True)] * 3
        trainer = transformers.Trainer(model, args, train_dataset=rows, eval_dataset=rows[:3])
        trainer.train()
        losses.append(
            [trainer.state.log_history[-1]["train_loss"], trainer.evaluate()["eval_loss"]]
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_loss_computed_without_the_forward_of_the_model_warns_once() -> None:
    model = lora_ext.chunked_loss(model_of())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(IDS, labels=LABELS).loss.backward()
        model(IDS).logits.sum().backward()
        with torch.no_grad():
            model.model(IDS)
        model.eval().model(IDS)
        model.train()
    other = copy.deepcopy(model)
    for each in (model, other):
        with pytest.warns(UserWarning, match="chunked_loss: model: expected training steps"):
            each.lm_head(each.model(IDS).last_hidden_state).sum().backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            each.model(IDS)
    again = lora_ext.chunked_loss(lora_ext.chunked_loss(model_of()), enabled=False)
    assert not again.model._forward_pre_hooks


def test_nothing_warns_after_disabling_a_model_with_a_wrapped_inner_model() -> None:
    model = lora_ext.chunked_loss(model_of())
    model, copied = copy.deepcopy(model), model
    for each in (model, pickle.loads(pickle.dumps(copied))):
        inner = each.model
        each.model = torch.compile(inner, backend="eager")
        lora_ext.chunked_loss(each, enabled=False)
        each.model = inner
        assert not inner._forward_pre_hooks
    assert len(copied.model._forward_pre_hooks) == 1


def of_fsdp2(rank: int, case: str) -> dict[str, Tensor]:
    """Return the parameters trained by one of two processes, or by a single one if ``rank`` is -1.
    Case "divided" shards the model before it enables the chunked loss."""
    model = model_of().double()
    if case == "divided":
        mesh = init_device_mesh("cpu", (2,))
        for unit in (*model.model.layers, model):
            fully_shard(unit, mesh=mesh)
        with pytest.raises(NotImplementedError, match="call chunked_loss before fully_shard"):
            lora_ext.chunked_loss(model, chunk=16)
        return {}
    lora_ext.chunked_loss(model, chunk=16)
    rows = IDS[:2] if rank < 0 else IDS[:2].chunk(2)[rank]
    way = None if rank < 0 else "fsdp2"
    return trained(model, way, model.model.layers, lambda lm: lm(rows, labels=rows).loss)


@pytest.mark.slow
def test_model_sharded_by_fsdp2_raises_and_the_other_order_learns(
    two_processes: TwoProcesses,
) -> None:
    two_processes.run(of_fsdp2, "divided")
    found, _ = two_processes.run(of_fsdp2, "chunked")
    start = {k: p.detach() for k, p in model_of().double().named_parameters()}
    assert_same_changes(found, of_fsdp2(-1, "chunked"), start, 1e-9)
