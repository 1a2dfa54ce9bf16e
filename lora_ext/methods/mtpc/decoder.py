"""Exact self-speculative decoding: a circuit drafts tokens, and the model verifies them.

Generated tokens have exactly the model's distribution. One iteration of the loop in
:meth:`SpeculativeDecoder.generate`:

1. :meth:`Steps.draft <lora_ext.methods.mtpc._drafting.Steps.draft>` computes a circuit from the
   newest hidden state and samples the window. The *pending* token, which the previous iteration
   decided and which the model has not processed yet, is evidence for the circuit. A bridge instead
   advances the hidden state by the pending token, and the window starts after it.
2. :meth:`Trunk.feed <lora_ext.methods.mtpc._trunk.Trunk.feed>` runs the model over the window and
   returns the verifier's logits.
3. :meth:`Steps.verify <lora_ext.methods.mtpc._drafting.Steps.verify>` accepts a prefix of the
   window and samples one token from the verifier's distribution.
4. :meth:`GeneratedRows.take <lora_ext.methods.mtpc._request.GeneratedRows.take>` applies the stop
   rules.
5. :meth:`Trunk.keep <lora_ext.methods.mtpc._trunk.Trunk.keep>` removes the rejected tokens from the
   cache, and :meth:`Trunk.select <lora_ext.methods.mtpc._trunk.Trunk.select>` removes the finished
   rows.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lora_ext._checks import check_fields, require, within
from lora_ext.rows import Names, generation_scope, of_call, pool_of, prompt_known

from ._constrained import Constrained
from ._drafting import Steps
from ._request import GeneratedRows, read_request
from ._trunk import Trunk


@dataclass(frozen=True)
class Generation:
    """Result of :meth:`SpeculativeDecoder.generate`. Lists have one entry per row.

    Attributes:
        sequences: ``(B, S + L)`` int64: ``B`` prompts of ``S`` tokens, each followed by up to ``L``
            new tokens, padded on the right.
        calls: number of verifier passes over a draft while the row was unfinished.
        accepted: number of drafted tokens that the verifier accepted, before stop rules remove any.
        emitted: ``accepted`` plus one token of the verifier per call.
        passes: total number of passes of the model after the prompts.
        seeds: one seed per row. The same seed reproduces the tokens of a row in any batch.
    """

    sequences: Tensor
    calls: list[int]
    accepted: list[int]
    emitted: list[int]
    passes: int
    seeds: list[int]

    @property
    def accepted_per_call(self) -> float:
        """Mean number of drafted tokens accepted per call, over all rows."""
        return sum(self.accepted) / max(1, sum(self.calls))

    @property
    def emitted_per_call(self) -> float:
        """Mean number of tokens per call, including the verifier's token, over all rows."""
        return sum(self.emitted) / max(1, sum(self.calls))


@dataclass(eq=False, repr=False)
class SpeculativeDecoder(Steps):
    """Decoder that drafts windows with ``head`` and verifies each in one pass of ``model``.

    In mode "sample", generated tokens have exactly the model's distribution (after temperature and
    top_p); in mode "greedy", they are the model's greedy tokens. Both statements hold up to
    rounding: a pass over several tokens rounds differently from token-by-token decoding.

    A call consists of a draft and its verification. The verification accepts a prefix of the draft
    and adds one token sampled from the verifier. With ``window="condition"``, this last token is
    evidence for the next window, and a call needs one pass of the model. With "restart", the model
    processes the last token in a separate pass, and the next call drafts all tokens of its window.

    Generation registers forward hooks on the model, so run one call of :meth:`generate` at a time
    per model.

    Args:
        model: transformers causal LM with full attention, in evaluation mode.
        head: trained :class:`CircuitHead` for the model.
        mode: "sample" or "greedy".
        window: "condition" or "restart", see above and docs/mtpc.md, "Decoding".
        temperature: softmax temperature of the model's distribution, above 0.
        top_p: probability mass of the nucleus, in (0, 1].
        tail: :class:`DraftTail` of the draft path, if the head was trained with a tail.
        bridge: :class:`TokenBridge` that advances the hidden state by the pending token, if the
            head was trained with a bridge. A window then starts after that token, and the first
            token after the prompt is sampled from the verifier without a draft.
        chain: number of consecutive windows of n tokens that a call drafts; more than 1 requires a
            bridge.
        constraint: constraint that every row satisfies at the end of its budget, or a list with one
            (or None) per row. docs/control.md defines the distribution of constrained rows.
        guide: model of future tokens that constraints use, see docs/control.md.

    Raises:
        ValueError: If a setting is out of range, or if the width or the vocabulary of the head
            differs from the model's.

    Sources: speculative sampling (Leviathan et al. 2023); MTPC (arXiv 2511.11346). Conditioning the
    next window on the accepted token is our addition.
    """

    def __post_init__(self) -> None:
        where, shape = "SpeculativeDecoder", tuple(self.model.get_output_embeddings().weight.shape)
        found = self.head.vocab_size, self.head.hidden_size
        expected = f"(vocabulary, width) = {shape} as in the model's LM head"
        require(found == shape, where, "head", expected, found)
        if self.bridge is not None:
            width = self.bridge.hidden_size
            behind = self.window == "condition"
            require(width == shape[1], where, "bridge", f"width {shape[1]} as in the model", width)
            require(behind, where, "window", "'condition' with a bridge", repr(self.window))
        words, most = ("an int", "1, or more with a bridge"), 1 if self.bridge is None else None
        bounds = {"temperature": within(above=0), "top_p": within(above=0, maximum=1)}
        check_fields(self, {**bounds, "chain": within(1, most, expected=words)}, where)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        seed: int | Sequence[int] | None = None,
        generation_config: Any = None,
        stop_strings: str | Sequence[str] | None = None,
        tokenizer: Any = None,
        streamer: Any = None,
        token_type_ids: Tensor | None = None,
        adapter_names: Names = None,
        **settings: Any,
    ) -> Generation:
        """Generate new tokens for every prompt.

        Args:
            input_ids: token ids ``(B, S)`` of the prompts, padded on the left.
            attention_mask: mask ``(B, S)`` with 0 for padding; default is no padding.
            max_new_tokens: maximum number of new tokens per row, at least 1; default is the value
                in ``generation_config``.
            eos_token_id: one or more tokens that end a row; default is the value in
                ``generation_config``, otherwise that of the model.
            pad_token_id: token that pads rows that end early; default as for ``eos_token_id``, or
                an end token if there is no such value.
            seed: None, an integer or one integer per row. With None, the seeds of the rows come
                from torch's global generator, so ``torch.manual_seed`` makes a call repeatable. A
                single integer is expanded to a different seed for each row; different integers give
                different seeds. Seeds per row may come from :attr:`Generation.seeds`. The tokens of
                a row depend on the row's seed, not on other rows.
            generation_config: transformers ``GenerationConfig``. Its ``do_sample``, ``temperature``
                and ``top_p`` replace the decoder's settings for this call. These settings in the
                model's own configuration are ignored.
            stop_strings: one or more strings; a row ends with the token that completes one of them.
            tokenizer: tokenizer of the model, required by ``stop_strings``.
            streamer: transformers streamer, which receives the prompt and then every token; for one
                prompt only.
            token_type_ids: ignored; tokenizers of some models return them.
            adapter_names: adapters of the rows, as in :func:`lora_ext.adapters`. One head drafts
                for all adapters; the model verifies each row with the row's adapter.
            settings: further settings of GenerationConfig, by name.

        Raises:
            ValueError: If a shape, padding or number is invalid, or if a setting would change the
                model's distribution or the number of sequences per prompt, such as ``num_beams=4``
                or ``repetition_penalty=1.1``. Without a ``generation_config``, penalties in the
                model's own ``generation_config`` are an error, too.
            TypeError: If an argument is not a setting of GenerationConfig.
        """
        settings |= {
            "max_new_tokens": max_new_tokens,
            "eos_token_id": eos_token_id,
            "pad_token_id": pad_token_id,
            "stop_strings": stop_strings,
        }
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        adapters: Any = nullcontext()
        if adapter_names is not None:
            adapters = of_call(adapter_names, pool=pool_of(self.model))
        asked = {"seed": seed, "config": generation_config, "tokenizer": tokenizer}
        return self._decode(input_ids, mask, streamer, adapters, **asked, arguments=settings)

    def _decode(
        self, prompts: Tensor, mask: Tensor, streamer: Any, adapters: Any, **asked: Any
    ) -> Generation:
        """Generate tokens in the context manager ``adapters``; ``asked`` contains the remaining
        arguments of :func:`read_request`."""
        # The request is checked before `adapters` acquires slots of the pool.
        request = read_request(self.model, prompts, **asked)
        decoder = self
        if request.law:
            decoder = copy.copy(self)  # also copies attributes of a subclass
            vars(decoder).update(request.law)
            decoder.__post_init__()
        with adapters, generation_scope():
            prompt_known(prompts)
            constrained = decoder.constraint is not None
            control = Constrained(decoder, request, len(prompts)) if constrained else None
            rows = GeneratedRows(prompts, request, streamer)
            trunk = Trunk(decoder.model, decoder.tail, prompts, mask, request.budget)
            n = decoder.drafted
            bridged = decoder.bridge is not None
            generators = [torch.Generator().manual_seed(s) for s in request.seeds]
            pending: Tensor | None = None  # (B,) decided but not processed yet
            stay = rows.live
            if bridged:
                law = trunk.logits if control is None else control.first(trunk.logits)
                uniforms = decoder.uniforms(generators, law.device)
                pending = decoder.first_token(law, uniforms[:, -1])
                if control is not None:
                    control.start(pending)
                stay = rows.start(pending)
            while stay:
                if len(stay) < len(trunk.hidden):
                    index = torch.tensor(stay, device=trunk.hidden.device)
                    trunk.select(index)
                    pending = None if pending is None else pending[index]
                    if control is not None:
                        control.select(stay)
                if pending is not None and decoder.window == "restart":
                    trunk.advance(pending)
                    pending = None
                live = [generators[row] for row in rows.live]
                uniforms = decoder.uniforms(live, trunk.hidden.device)
                make = decoder.draft if control is None else control.drafted
                draft = make(trunk.hidden, pending, uniforms[:, : 2 * n].unflatten(1, (n, 2)))
                tokens = draft.tokens if control is None else control.with_forced(draft.tokens)
                # With a bridge the window starts after the pending token, otherwise with it.
                target = trunk.feed(tokens, pending if bridged else None)
                given = None if bridged else pending
                if control is not None:
                    target = control.target(target)
                accepted, token = decoder.verify(draft, target, given, uniforms[:, 2 * n :])
                if control is not None:
                    accepted = control.take(accepted, token)
                stay = rows.take(tokens, accepted, token, 0 if given is None else 1)
                trunk.keep(accepted)
                pending = token
        new = [torch.tensor(tokens, dtype=torch.int64) for tokens in rows.tokens]
        padded = pad_sequence(new, batch_first=True, padding_value=request.pad)
        found = torch.cat([prompts, padded.to(prompts.device)], 1)
        counts = rows.calls, rows.accepted, rows.emitted, trunk.passes
        return Generation(found, *counts, request.seeds)
