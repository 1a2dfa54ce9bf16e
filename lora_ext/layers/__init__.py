"""Layers that train: LoRA over linear layers, convolutions, embeddings and experts, and how they
come into a model. Their base layers lie in :mod:`.base`, what is done to a whole model in
:mod:`.model`. What is not in ``__all__ = [
    "IGNORE", "LayerGroups", "LoraConfig", "LoraConv", "LoraEmbedding", "LoraFactors", "LoraLayer",
    "LoraLinear", "LoraProbe", "Mask", "PackedLinear", "Swap", "adapted_layers", "adapter_factors",
    "adapter_parameters", "adapters_of", "block_index", "block_name", "chunked_loss",
    "decoder_layers", "init_lora_", "is_active", "lora_forward", "lora_update", "pack_linears",
    "packed_bytes", "set_active", "shift_labels", "unpack_linears", "unwrap", "wrap",
]  # fmt: skip
