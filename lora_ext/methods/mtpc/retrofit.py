"""Retrofit: a circuit head, and optionally a draft tail, for a frozen language model."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_ext._checks import require
from lora_ext._files import SafetensorsFile
from lora_ext.control import Constraints, Guide
from lora_ext.layers import IGNORE, shift_labels

from ._config import MtpcConfig
from ._drafting import Mode, TokenBridge, WindowRule
from ._files import TENSORS, part_dtypes, read_draft_config, read_state, write_draft
from .decoder import SpeculativeDecoder
from .layers import CircuitHead
from .tail import DraftTail
from .windows import unfold_teacher, unfold_windows, window_loss


class Draft(nn.Module):
    """Modules that draft for a frozen model; only their parameters are trained and saved.

    :func:`retrofit` creates a draft. Train the draft with ``loss(ids)``, generate text with
    ``decoder().generate(ids)``, and store and restore the draft with ``save`` and ``load``.

    Shape letters: ``B`` sequences, ``S`` tokens per sequence, ``D`` hidden width.

    Attributes:
        model: the frozen language model, which verifies drafts; it is not a child of this module.
        config: the :class:`MtpcConfig`.
        head: the :class:`CircuitHead`.
        tail: the :class:`DraftTail`, LoRA layers of the draft path; None if ``draft_layers`` is 0.
        bridge: the :class:`TokenBridge`; None if ``bridge`` is 0 in ``config``.
    """

    model: Any
    tail: DraftTail | None
    bridge: TokenBridge | None
    _trained: list[tuple[nn.Parameter, bool]]

    def __init__(
        self,
        model: Any,
        config: MtpcConfig,
        head: CircuitHead,
        tail: DraftTail | None,
        bridge: TokenBridge | None = None,
    ):
        super().__init__()
        # Not registered as a child: the model's weights do not belong to the draft.
        self.__dict__["model"], self.__dict__["_trained"] = model, []
        self.config, self.head, self.tail, self.bridge = config, head, tail, bridge

    def loss(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        eos_id: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the objective on a batch, and its term for each position; see
        :func:`window_loss`.

        Args:
            input_ids: token ids ``(B, S)``.
            labels: target ids ``(B, S)``, aligned with the inputs; -100 for tokens that are not
                predicted. Default is ``input_ids``.
            attention_mask: mask ``(B, S)``; tokens with 0 are not targets, and nothing is predicted
                from these tokens.
            eos_id: id of the token that ends a document of a packed batch; windows end at this
                token.
        """
        labels = input_ids if labels is None else labels
        if attention_mask is not None:
            labels = labels.masked_fill(attention_mask == 0, IGNORE)
        n, gamma, beta = self.config.n_token, self.config.gamma, self.config.beta
        before = 0 if self.bridge is None else 1  # number of tokens before the first window
        length = n * self.config.chain
        windows = unfold_windows(shift_labels(labels), before + length, eos_id)[..., before:]
        inputs: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
        if attention_mask is not None:
            windows = windows.masked_fill(attention_mask[..., None] == 0, IGNORE)
            positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
            inputs |= {"attention_mask": attention_mask, "position_ids": positions}
        teacher = None
        if beta > 0:
            with torch.no_grad():
                logits = self.model(**inputs).logits
                teacher = unfold_teacher(logits, before + length)[..., before:, :]
        states = self.chained(self.hidden_states(**inputs), input_ids)
        teachers = [None] * len(states) if teacher is None else teacher.split(n, -2)
        parts = zip(states, windows.split(n, -1), teachers, strict=True)
        each = torch.cat([window_loss(self.head, h, w, gamma, beta, t)[1] for h, w, t in parts])
        weight = gamma ** torch.arange(length, dtype=each.dtype, device=each.device)
        return (weight * each).sum() / weight.sum(), each

    def chained(self, hidden: Tensor, input_ids: Tensor) -> list[Tensor]:
        """Return the head's input for every window of the chain, each ``(B, S, D)``.

        The tokens before a window are read from ``input_ids``, as in teacher forcing.

        Args:
            hidden: hidden states ``(B, S, D)``.
            input_ids: token ids ``(B, S)``; token 0 is used beyond the end of a sequence.
        """
        if self.bridge is None:
            return [hidden]
        states, embed = [hidden], self.model.get_input_embeddings()
        for j in range(1 + self.config.n_token * (self.config.chain - 1)):
            following = F.pad(input_ids[:, 1 + j :], (0, 1 + j))[:, : input_ids.shape[1]]
            states.append(self.bridge(states[-1], embed(following)))
        return states[1 :: self.config.n_token]

    def hidden_states(self, **inputs: Any) -> Tensor:
        """Return the head's input, ``(B, S, D)``: the last hidden states after the final norm."""
        with torch.no_grad() if self.tail is None else self.tail.everywhere():
            return self.model.base_model(**inputs).last_hidden_state

    def decoder(
        self,
        mode: Mode = "sample",
        window: WindowRule = "condition",
        temperature: float = 1.0,
        top_p: float = 1.0,
        chain: int | None = None,
        constraint: Constraints = None,
        guide: Guide | None = None,
    ) -> SpeculativeDecoder:
        """Return a decoder that uses this draft.

        The arguments are those of :class:`SpeculativeDecoder`; ``chain`` defaults to its value in
        the configuration.
        """
        chain = self.config.chain if chain is None else chain
        law = mode, window, temperature, top_p
        parts = self.tail, self.bridge, chain, constraint, guide
        return SpeculativeDecoder(self.model, self.head, *law, *parts)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write configuration, shortlist and parameters into a folder, for :meth:`load`.

        The weights of the model are not written. With emission "adapter", an unembedding that
        equals the model's is not written either.
        """
        unembedding = self.model.get_output_embeddings().weight.detach()
        write_draft(Path(folder), self.config, self.state_dict(), unembedding)

    @classmethod
    def load(cls, model: Any, folder: str | os.PathLike[str]) -> Draft:
        """Load a draft that :meth:`save` wrote for ``model``; the files may be untrusted.

        Head, bridge and tail get the dtypes in which they were saved, and the model's device.
        Memory is allocated only for shapes that the file contains.

        Raises:
            ValueError: If the folder does not contain such a draft, or the model has the wrong
                width, vocabulary or layers. The message names file and key; the model is unchanged.
        """
        folder = Path(folder)
        config, shortlist = read_draft_config(folder)
        shape = _unembedding(model).weight.shape
        with contextlib.closing(SafetensorsFile(folder / TENSORS)) as file:
            dtypes = part_dtypes(file, config, shortlist, shape)
            draft = retrofit(model, config, shortlist)
            try:
                for part, dtype in dtypes.items():
                    draft.get_submodule(part).to(dtype)
                draft.load_state_dict(read_state(file, draft.state_dict()))
            except BaseException:
                draft.remove()
                raise
        return draft

    def remove(self) -> None:
        """Undo :func:`retrofit`: restore the layers of the model and ``requires_grad`` of its
        parameters."""
        if self.tail is not None:
            self.tail.remove()
        for parameter, trained in self._trained:
            parameter.requires_grad_(trained)


def retrofit(
    model: Any, config: MtpcConfig | None = None, shortlist: Tensor | Sequence[int] | None = None
) -> Draft:
    """Freeze a transformers causal LM and create a circuit head that drafts for it.

    The circuit head is initialised from the LM head, and has the LM head's dtype and device. With
    ``config.draft_layers``, LoRA for the draft path is added to the last layers in place; the
    outputs of the model itself do not change.

    Args:
        model: causal LM that computes its logits by applying its output embeddings to the last
            hidden state.
        config: settings; default is ``MtpcConfig()``.
        shortlist: ``(L,)`` int64, ids of the tokens that may be drafted, such as
            :func:`frequent_tokens` of similar texts. Default is the whole vocabulary. A list of a
            few thousand tokens of a large vocabulary makes training and drafting with the head
            proportionally cheaper; generated tokens still have exactly the model's distribution.

    Raises:
        ValueError: If the model has no output embeddings, if the head is larger than the free
            memory (the message suggests smaller settings), or as for :class:`CircuitHead` and
            :class:`DraftTail`. The model is unchanged.

    Source: arXiv 2511.11346 (docs/mtpc.md, "Head" and "Draft tail").
    """
    own, weight = list(model.parameters()), _unembedding(model).weight
    config = MtpcConfig() if config is None else config
    config = config.for_tokens(len(weight) if shortlist is None else len(shortlist))
    vocab_size, width = weight.shape
    options: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
    head = CircuitHead(width, vocab_size, **config.of_head(), **options, shortlist=shortlist)
    head.init_from_lm_head(weight)
    tail = None
    if config.draft_layers:
        tail = DraftTail(model, config.draft_layers, config.draft_rank, config.draft_alpha)
    bridge = TokenBridge(width, config.bridge, **options) if config.bridge else None
    draft = Draft(model, config, head, tail, bridge)
    for parameter in own:
        draft._trained.append((parameter, parameter.requires_grad))
        parameter.requires_grad_(False)
    return draft


def _unembedding(model: Any) -> Any:
    found, expected = model.get_output_embeddings(), "a causal LM with output embeddings"
    require(found is not None, "retrofit", "model", expected, type(model))
    return found
