"""Retrofit: a head, and if wanted a draft tail, on a language model that stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext.nn import CircuitHead
from lora_ext.nn.labels import IGNORE, shift_labels

from .config import MtpcConfig
from .decoder import SpeculativeDecoder
from .tail import DraftTail
from .windows import unfold_teacher, unfold_windows


class Draft(nn.Module):
    """What drafts for a frozen model: its parameters are all that is trained, and saved.

    Made by :func:`retrofit`.
    """

    model: Any
    tail: DraftTail | None

    def __init__(self, model: Any, config: MtpcConfig, head: CircuitHead, tail: DraftTail | None):
        super().__init__()
        self.__dict__["model"] = model  # not a child: its weights are not the draft's
        self.config = config
        self.head = head
        self.tail = tail

    def loss(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        eos_id: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The objective on a batch, and its terms by position, :meth:`CircuitHead.loss`.

        Args:
            input_ids: ``(B, S)``.
            labels: ``(B, S)`` under their inputs, -100 where nothing is to be predicted; default is
                the inputs.
            attention_mask: ``(B, S)``; tokens of 0 are no targets, and nothing is predicted from
                them.
            eos_id: where documents of a packed batch end; no window crosses it.
        """
        labels = input_ids if labels is None else labels
        if attention_mask is not None:
            labels = labels.masked_fill(attention_mask == 0, IGNORE)
        n, beta = self.config.n_token, self.config.beta
        windows = unfold_windows(shift_labels(labels), n, eos_id)
        inputs: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
        if attention_mask is not None:
            windows = windows.masked_fill(attention_mask[..., None] == 0, IGNORE)
            positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
            inputs |= {"attention_mask": attention_mask, "position_ids": positions}
        teacher = None
        if beta > 0:
            with torch.no_grad():
                teacher = unfold_teacher(self.model(**inputs).logits, n)
        hidden = self.hidden_states(**inputs)
        return self.head.loss(hidden, windows, self.config.gamma, beta, teacher)

    def hidden_states(self, **inputs: Any) -> Tensor:
        """What the head reads, ``(B, S, D)``: the last hidden states after the final norm."""
        if self.tail is None:
            with torch.no_grad():
                return self.model.base_model(**inputs).last_hidden_state
        with self.tail.everywhere():
            return self.model.base_model(**inputs).last_hidden_state

    def decoder(self, **settings: Any) -> SpeculativeDecoder:
        """A :class:`SpeculativeDecoder` of this draft; settings are its arguments."""
        return SpeculativeDecoder(self.model, self.head, tail=self.tail, **settings)


def retrofit(
    model: Any,
    config: MtpcConfig | None = None,
    shortlist: Tensor | Sequence[int] | None = None,
) -> Draft:
    """Freeze a transformers causal LM and put a circuit head beside its LM head.

    The head starts from the LM head, in its dtype and on its device. With ``draft_layers`` the last
    layers get LoRA for the draft path, in place: the model's own results do not change.

    Args:
        model: logits are its output embeddings applied to the last hidden state.
        config: default is :class:`MtpcConfig` as it stands.
        shortlist: ``(L,)`` int64, the tokens that are drafted, :func:`frequent_tokens` of texts
            like those to come; default is the whole vocabulary. Of a large vocabulary a few
            thousand tokens make the head as many times cheaper, to train and to draft with; the
            model's law stays exact.

    Raises:
        ValueError: a model without output embeddings, or what :class:`CircuitHead` and
            :class:`DraftTail` refuse; the model is then as it was.

    Source: arXiv 2511.11346 (docs/mtpc.md, "Head" and "Draft tail").
    """
    config = MtpcConfig() if config is None else config
    unembedding = model.get_output_embeddings()
    if unembedding is None:
        raise ValueError(
            f"retrofit: model: expected a causal LM with output embeddings, found {type(model)}"
        )
    own, weight = list(model.parameters()), unembedding.weight
    head = CircuitHead(
        weight.shape[1],
        weight.shape[0],
        config.n_token,
        config.rank,
        config.kind,
        config.emission,
        config.adapter_rank,
        config.contextual,
        config.share_transitions,
        config.init_identity,
        weight.dtype,
        weight.device,
        shortlist,
    )
    head.init_from_lm_head(weight)
    tail = None
    if config.draft_layers:
        tail = DraftTail(model, config.draft_layers, config.draft_rank, config.draft_alpha)
    for parameter in own:
        parameter.requires_grad_(False)
    return Draft(model, config, head, tail)
