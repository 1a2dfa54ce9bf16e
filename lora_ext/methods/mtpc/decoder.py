"""Exact self-speculative decoding: a circuit drafts, the model verifies, no law changes.

One turn of the loop in :meth:`SpeculativeDecoder.generate`:

1. :meth:`Steps.draft <lora_ext.methods.mtpc._drafting.Steps.draft>` makes a circuit of the newest
   hidden state and draws the window; the token that the last turn decided and nobody has fed yet
   (*pending*) is its evidence, or, with a bridge, moves the state to where the window starts;
2. :meth:`Trunk.feed <lora_ext.methods.mtpc._trunk.Trunk.feed>` runs the model over the window: the
   verifier's logits and new hidden states;
3. :meth:`Steps.verify <lora_ext.methods.mtpc._drafting.Steps.verify>` accepts a prefix and draws
   one token of the verifier's law;
4. :meth:`GeneratedRows.take <lora_ext.methods.mtpc._request.GeneratedRows.take>` applies the stop
   rules;
5. :meth:`Trunk.keep <lora_ext.methods.mtpc._trunk.Trunk.keep>` removes rejected tokens from the
   cache, and :meth:`Trunk.select <lora_ext.methods.mtpc._trunk.Trunk.select>` the rows that ended.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lora_ext._checks import choice, integer, number, require
from lora_ext.control import Constraints, Guide
from lora_ext.rows import Names, generation_scope, of_call, pool_of, prompt_known

from ._constrained import Constrained
from ._drafting import Mode, Steps, TokenBridge
from ._request import GeneratedRows, Request, read_request
from ._trunk import Trunk
from .layers import CircuitHead
from .tail import DraftTail

#: What becomes of the token that a call decides and nobody has fed yet.
WindowRule = Literal["condition", "restart"]


@dataclass(frozen=True)
class Generation:
    """What :meth:`SpeculativeDecoder.generate` returns. Lists have one entry per row.

    Attributes:
        sequences: ``(B, S + L)`` int64: prompts and new tokens, padded on the right.
        calls: passes of the verifier over a draft, while the row was unfinished.
        accepted: drafted tokens that the verifier kept, also those cut by a stop rule.
        emitted: accepted tokens and the verifier's own, one per call, also those cut.
        passes: passes of the trunk in all, after the prompts.
        seeds: of the rows; a row with the same seed gets the same tokens again, in any batch.
    """

    sequences: Tensor
    calls: list[int]
    accepted: list[int]
    emitted: list[int]
    passes: int
    seeds: list[int]

    @property
    def accepted_per_call(self) -> float:
        """How many drafted tokens a call keeps: the mean over all calls of all rows."""
        return sum(self.accepted) / max(1, sum(self.calls))

    @property
    def emitted_per_call(self) -> float:
        """How many tokens a call yields, the verifier's own among them: the mean over all calls."""
        return sum(self.emitted) / max(1, sum(self.calls))


@dataclass(eq=False, repr=False)
class SpeculativeDecoder(Steps):
    """Generates from ``model`` by drafting windows with ``head`` and verifying each in one pass.

    "sample" follows the model's distribution exactly (after temperature and top_p), "greedy" gives
    the model's own greedy tokens; both up to the rounding of the model's passes, whose shapes
    differ from those of token-by-token decoding.

    A call accepts a prefix of the draft and adds one token of the verifier's law. With
    ``window="condition"`` that token becomes evidence of the next window, and a call is one pass of
    the trunk; with ``"restart"`` it is first fed alone, which costs a second pass and frees all of
    the window.

    While it generates, the model carries hooks: one call at a time on one model.

    Args:
        model: a transformers causal LM with full attention, in evaluation mode.
        head: a trained head for it.
        mode: "sample" or "greedy".
        window: "condition" or "restart", see above and docs/mtpc.md, "Decoding".
        temperature: of the model's law, above 0. top_p: nucleus of it, in (0, 1].
        tail: the draft path's own layers, if the head was trained with them.
        bridge: takes the decided token into the hidden state, if the head was trained with one. A
            window then starts behind that token. The first token is the verifier's own, without a
            call.
        chain: with a bridge, how many windows of n tokens a call drafts one behind the other.
        constraint: that every row satisfies at the end of its budget, or a list with one (or None)
            per row; "sample" and "greedy" are then those of the law in docs/control.md.
        guide: by which constraints look ahead.

    Raises:
        ValueError: a setting out of range, or a head of another width or vocabulary.

    Sources: speculative sampling (Leviathan et al. 2023); arXiv 2511.11346; conditioning the next
    window on the kept token is ours.
    """

    model: Any
    head: CircuitHead
    mode: Mode = "sample"
    window: WindowRule = "condition"
    temperature: float = 1.0
    top_p: float = 1.0
    tail: DraftTail | None = None
    bridge: TokenBridge | None = None
    chain: int = 1
    constraint: Constraints = None
    guide: Guide | None = None

    def __post_init__(self) -> None:
        where, shape = "SpeculativeDecoder", tuple(self.model.get_output_embeddings().weight.shape)
        found = self.head.vocab_size, self.head.hidden_size
        expected = f"vocabulary and width {shape} as in the model's LM head"
        require(found == shape, where, "head", expected, found)
        if self.bridge is not None:
            width = self.bridge.hidden_size
            behind = self.window == "condition"
            require(width == shape[1], where, "bridge", f"width {shape[1]} as in the model", width)
            require(behind, where, "window", "'condition' with a bridge", repr(self.window))
        choice(where, "mode", self.mode, get_args(Mode))
        choice(where, "window", self.window, get_args(WindowRule))
        number(where, "temperature", self.temperature, above=0)
        number(where, "top_p", self.top_p, above=0, maximum=1)
        words, most = ("an int", "1, or more with a bridge"), 1 if self.bridge is None else None
        integer(where, "chain", self.chain, 1, most, expected=words)

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
        """New tokens for every prompt.

        Args:
            input_ids: ``(B, S)`` prompts, padded on the left.
            attention_mask: ``(B, S)``, 0 on padding; default is no padding.
            max_new_tokens: at least 1; default is the ``generation_config``'s.
            eos_token_id: a row ends with the first of these; default is that of the
                ``generation_config``, then the model's own.
            pad_token_id: of rows that end early; default as for ``eos_token_id``, then an end.
            seed: None takes every row's seed from torch's generator, so that two calls differ and
                ``torch.manual_seed`` makes them repeat. One seed gives every row a seed of its own,
                and neighbouring seeds share none. Or one seed per row, which may come from
                :attr:`Generation.seeds`. A row depends on its seed alone, not on the batch around.
            generation_config: transformers' GenerationConfig. Its ``do_sample``, ``temperature``
                and ``top_p`` replace the decoder's own for this call. Those of the model's own
                configuration are not read.
            stop_strings, tokenizer: a row ends with the token that completes one of the strings.
            streamer: gets the prompt and then every token, as transformers' streamers do; for one
                prompt.
            token_type_ids: ignored; tokenizers of some models return them.
            adapter_names: whose answers these are: :func:`lora_ext.adapters` around the call. One
                head drafts for all adapters, and the model with a row's adapter verifies.
            settings: further settings of GenerationConfig, by name.

        Raises:
            ValueError: shapes, padding or numbers that do not fit, naming the argument; and
                settings that would change the model's law or ask for something else than one
                sequence a prompt, such as ``num_beams=4`` or ``repetition_penalty=1.1``. The
                model's own ``generation_config`` is asked for penalties too, where the call gives
                none. TypeError: an argument that is no setting.
        """
        settings |= {
            "max_new_tokens": max_new_tokens,
            "eos_token_id": eos_token_id,
            "pad_token_id": pad_token_id,
            "stop_strings": stop_strings,
        }
        # Before a slot of the pool is taken for the call.
        request = read_request(self.model, input_ids, seed, generation_config, tokenizer, settings)
        decoder = self
        if request.law:
            decoder = copy.copy(self)  # with what a subclass keeps besides
            vars(decoder).update(request.law)
            decoder.__post_init__()
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        with contextlib.ExitStack() as stack:
            if adapter_names is not None:
                stack.enter_context(of_call(adapter_names, pool=pool_of(self.model)))
            stack.enter_context(generation_scope())
            return decoder._decode(request, input_ids, mask, streamer)

    def _decode(self, request: Request, prompts: Tensor, mask: Tensor, streamer: Any) -> Generation:
        prompt_known(prompts)
        constrained = self.constraint is not None
        control = Constrained(self, request, len(prompts)) if constrained else None
        rows = GeneratedRows(prompts, request, streamer)
        trunk = Trunk(self.model, self.tail, prompts, mask, request.budget)
        if streamer is not None:
            streamer.put(prompts.cpu())
        n = self.drafted
        behind = 0 if self.bridge is None else 1  # tokens that are fed before a window
        passes = 0
        generators = [torch.Generator().manual_seed(s) for s in request.seeds]
        first, hidden = trunk.first_logits, trunk.first_hidden
        pending: Tensor | None = None  # (B,) tokens that are decided and not yet fed
        stay = rows.live
        if behind:
            law = first if control is None else control.first(first)
            pending = self.first_token(law, self.uniforms(generators, law.device)[:, -1])
            if control is not None:
                control.start(pending)
            stay = rows.start(pending)
        while stay:
            if len(stay) < len(hidden):
                index = torch.tensor(stay, device=hidden.device)
                trunk.select(index)
                first, hidden = first[index], hidden[index]
                pending = None if pending is None else pending[index]
                if control is not None:
                    control.select(stay)
            if pending is not None and self.window == "restart":
                logits, states = trunk.feed(pending[:, None])
                trunk.keep(torch.ones_like(pending), 1)
                first, hidden, pending = logits[:, 0], states[:, 0], None
                passes += 1
            uniforms = self.uniforms([generators[row] for row in rows.live], hidden.device)
            make = self.draft if control is None else control.drafted
            draft = make(hidden, pending, uniforms[:, : 2 * n].unflatten(1, (n, 2)))
            tokens = draft.tokens if control is None else control.with_forced(draft.tokens)
            if behind and pending is not None:
                target, states = trunk.feed(torch.cat([pending[:, None], tokens], 1))
                given = None  # the window is all draft
            else:
                logits, states = trunk.feed(tokens)
                # With evidence the window's first token is not tested, whatever stands there.
                target = torch.cat([first[:, None], logits], 1)  # (B, K + 1, V)
                states = torch.cat([hidden[:, None], states], 1)  # (B, K + 1, D)
                given = pending
            if control is not None:
                target = control.target(target)
            accepted, token = self.verify(draft, target, given, uniforms[:, 2 * n :])
            if control is not None:
                accepted = control.take(accepted, token)
            stay = rows.take(tokens, accepted, token, 0 if given is None else 1)
            # With a bridge the pending token was fed, and always stays.
            trunk.keep(accepted + behind, behind + tokens.shape[1])
            hidden = states[torch.arange(len(accepted), device=states.device), accepted]
            pending = token
            passes += 1
        new = [torch.tensor(tokens, dtype=torch.int64) for tokens in rows.tokens]
        padded = pad_sequence(new, batch_first=True, padding_value=request.pad)
        found = torch.cat([prompts, padded.to(prompts.device)], 1)
        return Generation(found, rows.calls, rows.accepted, rows.emitted, passes, request.seeds)
