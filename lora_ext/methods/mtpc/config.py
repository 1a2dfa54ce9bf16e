"""Settings of multi-token prediction with circuits, under the paper's symbols."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MtpcConfig:
    """Head, objective and draft tail. Values out of range are refused where they are used.

    Attributes:
        n_token: n (H in the authors' code), tokens in a window.
        rank: r (R), components of the mixture, or states of a latent.
        kind: circuit family: "ff", "cp", "hmm" or "btree".
        emission: how leaves follow from the hidden state, :class:`lora_ext.nn.CircuitHead`.
        adapter_rank: k, rank of each adapter with emission "adapter".
        contextual: transitions depend on the hidden state.
        share_transitions: one transition matrix for all steps.
        init_identity: transitions start near the identity.
        gamma: discount of later positions, in (0, 1].
        beta: weight of KL(verifier || circuit) against the cross entropy, in [0, 1].
        draft_layers: K, the last layers that carry LoRA in the draft path; 0 for none.
        draft_rank: rank of that LoRA. draft_alpha: its alpha.

    Source: arXiv 2511.11346; gamma, beta, rank and alpha of the published runs.
    """

    n_token: int = 8
    rank: int = 32
    kind: str = "btree"
    emission: str = "full"
    adapter_rank: int = 16
    contextual: bool = True
    share_transitions: bool = False
    init_identity: bool = True
    gamma: float = 0.9
    beta: float = 0.0
    draft_layers: int = 0
    draft_rank: int = 16
    draft_alpha: float = 16.0
