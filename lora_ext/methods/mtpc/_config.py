"""Settings of multi-token prediction with circuits, under the paper's symbols; which heads there
are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from lora_ext._checks import check_fields, choice, integer, require, within
from lora_ext.reference import KINDS

from ._emission import EMISSIONS

#: The families of circuits.
Kind = Literal["ff", "cp", "hmm", "btree"]
#: How leaves follow from hidden states: the keys of
#: :data:`~lora_ext.methods.mtpc._emission.EMISSIONS`.
EmissionName = Literal["full", "expander", "adapter"]

MOST_FULL = 4096  # tokens for which an unembedding for each position and component is small
_OF_HEAD = (
    "n_token", "rank", "kind", "emission", "adapter_rank", "contextual", "share_transitions",
    "init_identity",
)  # fmt: skip


def check_structure(
    where: str, n_token: int, rank: int, kind: str, emission: str | None, adapter_rank: int
) -> None:
    """Raise ValueError where no head has this structure; ``where`` starts the message."""
    choice(where, "kind", kind, KINDS)
    if emission is not None:
        choice(where, "emission", emission, tuple(EMISSIONS))
    least = 2 if kind in ("hmm", "btree") else 1
    words = "an int", f"at least {least} for {kind!r}"
    integer(where, "n_token", n_token, least, expected=words)
    integer(where, "rank", rank, least, expected=words)
    require(kind != "ff" or rank == 1, where, "rank", "1 for 'ff'", rank)
    integer(where, "adapter_rank", adapter_rank, 1)


@dataclass(frozen=True)
class MtpcConfig:
    """Head, objective and draft tail.

    Attributes:
        n_token: n (H in the authors' code), tokens in a window.
        rank: r (R), components of the mixture, or states of a latent.
        kind: circuit family: "ff", "cp", "hmm" or "btree".
        emission: how leaves follow from the hidden state, :class:`lora_ext.nn.CircuitHead`. None
            is chosen by what is drafted: "full" for up to 4096 tokens, "adapter" for more. Ours.
        adapter_rank: k, rank of each adapter with emission "adapter".
        contextual: transitions depend on the hidden state.
        share_transitions: one transition matrix for all steps.
        init_identity: transitions start near the identity.
        gamma: discount of later positions, in (0, 1].
        beta: weight of KL(verifier || circuit) against the cross entropy, in [0, 1].
        bridge: width of the network that takes a decided token into the hidden state, so that the
            circuit stands behind it (:class:`lora_ext.nn.TokenBridge`); 0 for none. Ours.
        chain: with a bridge, how many windows of n tokens stand one behind the other, each behind
            the last token of the one before; at most 1024.
        draft_layers: K, the last layers that carry LoRA in the draft path; 0 for none.
        draft_rank: rank of that LoRA. draft_alpha: its alpha.

    Raises:
        ValueError: a value out of range, naming the field.

    Source: arXiv 2511.11346; gamma, beta, rank and alpha of the published runs.
    """

    n_token: int = 8
    rank: int = 32
    kind: Kind = "btree"
    emission: EmissionName | None = None
    adapter_rank: int = 16
    contextual: bool = True
    share_transitions: bool = False
    init_identity: bool = True
    gamma: float = 0.9
    beta: float = 0.0
    bridge: int = 0
    chain: int = 1
    draft_layers: int = 0
    draft_rank: int = 16
    draft_alpha: float = 16.0

    def __post_init__(self) -> None:
        table = {
            "gamma": within(above=0, maximum=1),
            "beta": within(0, 1),
            "bridge": within(0),
            # No tensor of a file shows this number, and memory is taken for all windows.
            "chain": within(maximum=1024),
            "draft_layers": within(0),
            "draft_rank": within(1),
            "draft_alpha": within(above=0),
        }
        check_fields(self, table)
        check_structure(
            "MtpcConfig", self.n_token, self.rank, self.kind, self.emission, self.adapter_rank
        )
        fits = self.chain == 1 or (self.chain > 1 and self.bridge > 0)
        require(fits, "MtpcConfig", "chain", "1, or more with a bridge", self.chain)

    def for_tokens(self, count: int) -> MtpcConfig:
        """The settings with an emission, for a draft of so many tokens: the shortlist's, or the
        vocabulary's. Our choice: "full" grows with positions times components times tokens, and has
        7 GB for 8 x 8 x 49152 tokens of width 576; "adapter" has the model's own unembedding."""
        chosen = "full" if count <= MOST_FULL else "adapter"
        return replace(self, emission=self.emission or chosen)

    def of_head(self) -> dict[str, Any]:
        """Return the arguments of a :class:`CircuitHead` that follow from the settings; no head is
        made before :meth:`for_tokens` has chosen an emission."""
        return {name: getattr(self, name) for name in _OF_HEAD}
