"""Llama forwards with little overhead, and decoding with them: a fair baseline of speculation.

`python benchmarks/lean.py` prints their speedup over transformers' forwards. In a small model, half
of the time of such a forward is spent in Python between the products. Speculative decoding, which
needs fewer forwards, would save that time too. ``LeanLlama`` therefore replaces the model both in
plain and in speculative decoding. Its cache is that of the speculative decoder, in which memory is
preallocated for later tokens.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
from common import interleaved
from torch import Tensor, nn
from torch.nn import functional as F

from lora_ext.methods.mtpc._trunk import cache_argument, roomy_cache


class LeanLlama(nn.Module):
    """Forward of a transformers Llama without needless masks, with fewer and larger products.

    Projections that read the same input are one product. The model's weights become views of the
    joined weights, so the model still works and memory does not grow. Results differ in rounding,
    since sums have another order. ``pack_linears(lean)`` packs these products and not the model's.

    Raises:
        ValueError: If the model is not a Llama, or its linear layers have biases.
    """

    def __init__(self, model: Any):
        super().__init__()
        config = model.config
        if config.model_type != "llama" or config.attention_bias or config.mlp_bias:
            raise ValueError(f"LeanLlama: model: expected a Llama without biases, found {config}")
        self.config = config
        self.__dict__["model"] = model  # not a submodule, so that its parameters are not listed
        heads, shared = config.num_attention_heads, config.num_key_value_heads
        self.heads, self.shared, self.size = heads, shared, model.model.layers[0].self_attn.head_dim
        self.lm_head = product(model.lm_head.weight)
        products: list[nn.Linear] = []
        self.layers: list[tuple[Any, ...]] = []
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            qkv = joined(attention.q_proj, attention.k_proj, attention.v_proj)
            gate_up = joined(mlp.gate_proj, mlp.up_proj)
            before, after = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
            out, down = product(attention.o_proj.weight), product(mlp.down_proj.weight)
            products += [qkv, out, gate_up, down]
            self.layers.append((before, qkv, out, after, gate_up, down))
        self.products = nn.ModuleList(products)
        positions = torch.arange(config.max_position_embeddings)[None]
        cos, sin = model.model.rotary_emb(model.lm_head.weight[:1], positions)
        self.cos, self.sin = cos[0], sin[0]  # (T, D)
        self.sin[:, : self.size // 2].neg_()  # a rotation is then x cos + roll(x) sin

    def get_output_embeddings(self) -> nn.Module:
        """Return the LM head, which shares the model's weight."""
        return self.lm_head

    def get_input_embeddings(self) -> nn.Module:
        """Return the model's input embeddings."""
        return self.model.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor,
        cache: Any,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
    ) -> SimpleNamespace:
        """Return logits ``(B, Q, V)`` of tokens ``(B, Q)`` that follow those in the cache."""
        norm, width = self.model.model.norm, (self.config.hidden_size,)
        eps, seen = self.config.rms_norm_eps, cache.get_seq_length()
        rows, count = input_ids.shape
        if position_ids is None:
            cos, sin = (t[None, None, seen : seen + count] for t in (self.cos, self.sin))
        else:
            cos, sin = (F.embedding(position_ids, t)[:, None] for t in (self.cos, self.sin))
        mask = self._mask(attention_mask, seen, count)
        x = F.embedding(input_ids, self.model.model.embed_tokens.weight)
        for i, (before, qkv, out, after, gate_up, down) in enumerate(self.layers):
            every = qkv(F.rms_norm(x, width, before, eps))
            every = every.view(rows, count, -1, self.size).transpose(1, 2)
            turned = every[:, : self.heads + self.shared]
            turned = torch.addcmul(turned * cos, turned.roll(self.size // 2, -1), sin)
            keys, values = cache.update(
                turned[:, self.heads :], every[:, self.heads + self.shared :], i
            )
            queries = turned[:, : self.heads]
            if mask is None and count == 1:  # Query heads that share keys are rows of one head.
                queries = queries.reshape(rows, self.shared, -1, self.size)
                attended = F.scaled_dot_product_attention(queries, keys, values)
                attended = attended.view(rows, self.heads, 1, self.size)
            else:
                attended = F.scaled_dot_product_attention(
                    queries,
                    keys,
                    values,
                    attn_mask=mask,
                    is_causal=mask is None,
                    enable_gqa=self.heads != self.shared,
                )
            x = x + out(attended.transpose(1, 2).reshape(rows, count, -1))
            gate, up = gate_up(F.rms_norm(x, width, after, eps)).chunk(2, -1)
            x = x + down(F.silu(gate) * up)
        states = F.rms_norm(x[:, -logits_to_keep:], width, norm.weight, eps)
        return SimpleNamespace(logits=self.lm_head(states))

    @staticmethod
    def _mask(attention_mask: Tensor | None, seen: int, count: int) -> Tensor | None:
        """Return the mask ``(B, 1, Q, slots)`` of the cache slots that new tokens attend to, or
        None if every new token attends to all earlier tokens."""
        hides = attention_mask is not None and not bool(attention_mask.all())
        if not hides and (count == 1 or seen == 0):
            return None
        mask = torch.ones(count, seen + count, dtype=torch.bool).tril(seen)
        if not hides or attention_mask is None:
            return mask
        # A padded token attends to itself, because a row without any key would be NaN.
        own = torch.ones(count, dtype=torch.bool).diag()
        return (mask & attention_mask[:, None, None].bool()) | F.pad(own, (seen, 0))


def joined(*layers: Any) -> nn.Linear:
    """Return one linear layer with the weights of several layers, which become views of its
    weight."""
    whole = torch.cat([layer.weight.detach() for layer in layers])
    for layer, part in zip(layers, whole.split([len(x.weight) for x in layers]), strict=True):
        layer.weight.data = part
    return product(whole)


def product(weight: Tensor) -> nn.Linear:
    """Return a linear layer that shares ``weight``."""
    layer = nn.Linear(weight.shape[1], len(weight), bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return layer.eval()


@torch.no_grad()
def token_by_token(
    model: Any, ids: Tensor, new_tokens: int, sample: bool = False, cache: Any = None
) -> Tensor:
    """Return the prompts ``ids (B, S)``, followed by new tokens, greedy or sampled, with one
    forward per token."""
    rows, start = ids.shape
    cache = roomy_cache(start + new_tokens) if cache is None else cache
    out = torch.empty(rows, start + new_tokens, dtype=ids.dtype)
    out[:, :start], token = ids, ids
    for place in range(start, start + new_tokens):
        logits = model(token, cache=cache, logits_to_keep=1).logits[:, -1]
        if sample:
            sums = logits.softmax(-1, torch.float64).cumsum(-1)  # faster than multinomial
            token = torch.searchsorted(
                sums, torch.rand_like(sums[:, :1]) * sums[:, -1:], right=True
            )
        else:
            token = logits.argmax(-1, keepdim=True)
        out[:, place : place + 1] = token
    return out


def main() -> None:
    """Time 64 new tokens per row with the untrained byte model of ``examples/mtpc_bytes.py``."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 257, "hidden_size": 256, "intermediate_size": 768}
    heads = {"num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 1024}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()

    def own(token: Tensor, cache: Any, logits_to_keep: int) -> Any:
        options = {"use_cache": True, "logits_to_keep": logits_to_keep}
        return model(token, **options, **{cache_argument(model): cache})

    lean = LeanLlama(model)
    for rows in (1, 8):
        ids = torch.randint(257, (rows, 64))
        assert torch.equal(
            token_by_token(own, ids, 64, cache=DynamicCache()), token_by_token(lean, ids, 64)
        )
        found = interleaved(
            {
                "transformers": lambda x=ids: token_by_token(own, x, 64, cache=DynamicCache()),
                "lean": functools.partial(token_by_token, lean, ids, 64),
            }
        )
        for name, t in found.items():
            ratio = found["transformers"].over(t)
            print(f"{rows} rows, {name}: {rows * 64 / t.median:.0f} tokens/s, {ratio:.2f} x")


if __name__ == "__main__":
    main()
