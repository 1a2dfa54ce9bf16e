"""Adapters on routed experts are refused: PEFT stores the factors of all experts in one pair."""

import pytest
import torch
from client_models import tokens
from peft import LoraConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM

import lora_ext
from lora_ext.federated import BatchedClients, ClientSpec, LoraLayerManager, UnsupportedModule

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("parameter", ["experts.down_proj", "mlp.gate.weight"])
def test_adapters_on_parameters_are_refused_by_name(parameter: str, ours: bool) -> None:
    torch.manual_seed(0)
    mixture = MixtralForCausalLM(MixtralConfig(**SIZES, **HEADS))
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=[parameter])
    model = get_peft_model(mixture, config).eval()
    model = lora_ext.from_peft(model) if ours else model
    where = parameter.split(".")[-2]
    message = rf"^BatchedClients: .*{where}: expected a linear layer, found ParamWrapper"
    with pytest.raises(UnsupportedModule, match=message):
        BatchedClients(model, [ClientSpec(1, tokens([4], 1), lr=0.1)])
    if where == "experts":
        with pytest.raises(ValueError, match=r"experts: .*found a pair for each of 4 experts"):
            LoraLayerManager(model)
