"""The compiled module; Python uses the same ops through ``torch.ops.lora_ext``."""

import torch
from torch import Tensor

def lora_plan(adapter_ids: Tensor, num_adapters: int, num_valid: Tensor | None, /) -> Tensor: ...
def lora_segment_ids(seg_indptr: Tensor, seg_adapter: Tensor, num_tokens: int, /) -> Tensor: ...
def lora_shrink(
    x: Tensor,
    a: Tensor,
    adapter_ids: Tensor,
    scale: Tensor | None,
    ranks: Tensor | None,
    page_table: Tensor | None,
    plan: Tensor | None,
    /,
) -> Tensor: ...
def lora_expand_(
    y: Tensor,
    v: Tensor,
    b: Tensor,
    adapter_ids: Tensor,
    ranks: Tensor | None,
    page_table: Tensor | None,
    plan: Tensor | None,
    /,
) -> None: ...
def lora_apply(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    adapter_ids: Tensor,
    scale: Tensor | None,
    ranks: Tensor | None,
    page_table: Tensor | None,
    plan: Tensor | None,
    /,
) -> Tensor: ...
def lora_apply_(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    adapter_ids: Tensor,
    scale: Tensor | None,
    ranks: Tensor | None,
    page_table: Tensor | None,
    plan: Tensor | None,
    /,
) -> None: ...
def lora_apply_siblings_(
    y: list[Tensor],
    x: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    adapter_ids: Tensor,
    scale: list[Tensor],
    ranks: list[Tensor],
    page_table: list[Tensor],
    plan: Tensor | None,
    /,
) -> None: ...
def lora_linear_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    adapter_ids: Tensor,
    scale: Tensor | None,
    ranks: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    plan: Tensor | None,
    /,
) -> tuple[Tensor, Tensor]: ...
def lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    v: Tensor,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    adapter_ids: Tensor,
    scale: Tensor | None,
    ranks: Tensor | None,
    plan: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
    /,
) -> tuple[Tensor, Tensor, Tensor]: ...
def lora_dropout(x: Tensor, p: float, seed: Tensor | None, /) -> Tensor: ...
def lora_gram(
    a: list[Tensor], b: list[Tensor], dtype: torch.dtype | None, /
) -> tuple[list[Tensor], list[Tensor]]: ...
def lora_pair_stats(a: list[Tensor], b: list[Tensor], projected_b: list[Tensor], /) -> Tensor: ...
def circuit_leaf(leaf: Tensor, x: Tensor, /) -> tuple[Tensor, Tensor]: ...
def circuit_leaf_backward(de: Tensor, leaf: Tensor, x: Tensor, norm: Tensor, /) -> Tensor: ...
def emission_gather(h: Tensor, emit: Tensor, x: Tensor, /) -> Tensor: ...
def emission_gather_backward(
    de: Tensor, h: Tensor, emit: Tensor, x: Tensor, need_h: bool, need_emit: bool, /
) -> tuple[Tensor, Tensor]: ...
def circuit_scan(
    kind: str, e: Tensor, prior: Tensor | None, trans: Tensor | None, save: bool, /
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
def circuit_scan_backward(
    dprefix: Tensor | None,
    dconditional: Tensor | None,
    kind: str,
    e: Tensor,
    prior: Tensor | None,
    trans: Tensor | None,
    states: Tensor,
    need_prior: bool,
    need_trans: bool,
    /,
) -> tuple[Tensor, Tensor, Tensor]: ...
def circuit_conditional_dist(
    kind: str,
    leaf: Tensor,
    prior: Tensor | None,
    trans: Tensor | None,
    x: Tensor,
    k: Tensor,
    /,
) -> Tensor: ...
def circuit_sample(
    kind: str,
    leaf: Tensor,
    prior: Tensor | None,
    trans: Tensor | None,
    uniforms: Tensor,
    evidence: Tensor | None,
    /,
) -> tuple[Tensor, Tensor, Tensor]: ...
def circuit_argmax(
    kind: str,
    leaf: Tensor,
    prior: Tensor | None,
    trans: Tensor | None,
    evidence: Tensor | None,
    /,
) -> tuple[Tensor, Tensor]: ...
def spec_verify(
    target: Tensor,
    tokens: Tensor,
    conditional: Tensor,
    posterior: Tensor,
    leaf: Tensor,
    uniforms: Tensor,
    num_evidence: Tensor | None,
    temperature: float,
    /,
) -> tuple[Tensor, Tensor]: ...
def log_einsum_weights(w: Tensor, norm: str, /) -> tuple[Tensor, Tensor]: ...
def log_einsum_exp(
    w: Tensor,
    values: Tensor,
    norm: str,
    precision: str,
    weight: Tensor | None,
    shift: Tensor | None,
    /,
) -> Tensor: ...
def log_einsum_exp_backward(
    dout: Tensor,
    w: Tensor,
    values: Tensor,
    out: Tensor,
    norm: str,
    need_dw: bool,
    need_dvalues: bool,
    weight: Tensor | None,
    shift: Tensor | None,
    /,
) -> tuple[Tensor, Tensor]: ...
def log_einsum_max(w: Tensor, values: Tensor, norm: str, /) -> tuple[Tensor, Tensor]: ...
def circuit_table(table: Tensor, x: Tensor, row: Tensor, block: int, norm: str, /) -> Tensor: ...
def circuit_table_backward(
    de: Tensor, table: Tensor, x: Tensor, row: Tensor, block: int, norm: str, /
) -> Tensor: ...
def circuit_layers(
    leaf: Tensor,
    w: Tensor,
    program: Tensor,
    plan: list[int],
    norm: str,
    semiring: str,
    precision: str,
    /,
) -> Tensor: ...
def circuit_layers_backward(
    droots: Tensor,
    val: Tensor,
    w: Tensor,
    program: Tensor,
    plan: list[int],
    norm: str,
    need_dw: bool,
    /,
) -> tuple[Tensor, Tensor]: ...
def circuit_layers_walk(
    val: Tensor,
    w: Tensor,
    program: Tensor,
    plan: list[int],
    root: Tensor,
    uniforms: Tensor | None,
    /,
) -> Tensor: ...
def depth_mix_forward(
    hiddens: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    weights: Tensor | None,
    router: Tensor | None,
    bias: Tensor | None,
    eps: float,
    norm: str,
    /,
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
def depth_mix_backward(
    dmixed: Tensor,
    dweights: Tensor | None,
    hiddens: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    weights: Tensor,
    router: Tensor | None,
    rinv: Tensor,
    mean: Tensor,
    need_hiddens: bool,
    /,
) -> tuple[list[Tensor], Tensor, Tensor]: ...
def pack_weight(weight: Tensor, /) -> Tensor: ...
def packed_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, /
) -> Tensor: ...
def vocab_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    chunk: int,
    ignore_index: int,
    softcap: float,
    dtype: torch.dtype,
    with_gradient: bool,
    /,
) -> tuple[Tensor, Tensor, Tensor]: ...
def vocab_cross_entropy_backward(
    dloss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    lse: Tensor,
    dhidden: Tensor,
    chunk: int,
    ignore_index: int,
    softcap: float,
    dtype: torch.dtype,
    need_dhidden: bool,
    need_dweight: bool,
    need_dbias: bool,
    /,
) -> tuple[Tensor, Tensor, Tensor]: ...
def vocab_kl(
    hiddens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    tau: float,
    chunk: int,
    softcap: float,
    dtype: torch.dtype,
    with_gradient: bool,
    /,
) -> tuple[Tensor, Tensor, Tensor]: ...
def vocab_kl_backward(
    dloss: Tensor,
    hiddens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    lse: Tensor,
    dhiddens: Tensor,
    tau: float,
    chunk: int,
    softcap: float,
    dtype: torch.dtype,
    need_dhiddens: bool,
    need_dweight: bool,
    need_dbias: bool,
    /,
) -> tuple[Tensor, Tensor, Tensor]: ...
def cpu_isa() -> str: ...
def set_cpu_isa(isa: str, /) -> None: ...
def has_kernels() -> bool: ...
def set_debug(on: bool, /) -> None: ...
