"""Settings of multi-token prediction with circuits, named after the paper's symbols."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from lora_ext._checks import check_fields, choice, integer, require, within
from lora_ext.reference import KINDS

from ._emission import EMISSIONS

#: Circuit families.
Kind = Literal["ff", "cp", "hmm", "btree"]
#: Ways to compute leaves from hidden states: keys of
#: :data:`~lora_ext.methods.mtpc._emission.EMISSIONS`.
EmissionName = Literal["full", "expander", "adapter"]
Evidence = Literal["none", "soft"]

MOST_FULL = 4096  # largest shortlist or vocabulary for which "full" is the default
_HEAD_FIELDS = (
    "n_token", "rank", "kind", "emission", "adapter_rank", "contextual", "share_transitions",
    "init_identity", "evidence",
)  # fmt: skip


def check_structure(where: str, head: Any) -> None:
    """Raise ValueError unless the attributes of ``head`` describe a valid head; the message starts
    with ``where``."""
    kind = choice(where, "kind", head.kind, KINDS)
    if head.emission is not None:
        choice(where, "emission", head.emission, tuple(EMISSIONS))
    least = 2 if kind in ("hmm", "btree") else 1
    words = "an int", f"at least {least} for {kind!r}"
    integer(where, "n_token", head.n_token, least, expected=words)
    integer(where, "rank", head.rank, least, expected=words)
    require(kind != "ff" or head.rank == 1, where, "rank", "1 for 'ff'", head.rank)
    choice(where, "evidence", head.evidence, ("none", "soft"))
    fits = kind != "ff" or head.evidence == "none"
    require(fits, where, "evidence", "'none' for 'ff', which has no state", repr(head.evidence))
    integer(where, "adapter_rank", head.adapter_rank, 1)


@dataclass(frozen=True)
class MtpcConfig:
    """Settings of the head, the objective and the draft tail.

    Attributes:
        n_token: n (H in the authors' code), number of tokens in a window.
        rank: r (R), number of mixture components, or of states of a latent variable.
        kind: circuit family: "ff", "cp", "hmm" or "btree".
        emission: way to compute the leaves from the hidden state, see
            :class:`lora_ext.nn.CircuitHead`. None selects "full" if at most 4096 different tokens
            may be drafted (the size of the shortlist or of the vocabulary), and "adapter"
            otherwise. Our choice.
        adapter_rank: k, rank of each adapter with emission "adapter".
        contextual: whether transitions depend on the hidden state.
        share_transitions: whether all steps use the same transition matrix.
        init_identity: whether transitions start near the identity.
        gamma: discount per position of a window, in (0, 1].
        beta: weight of KL(verifier || circuit), in [0, 1]; the cross entropy has the weight
            ``1 - beta``.
        bridge: width of the :class:`lora_ext.nn.TokenBridge`, a network that advances the hidden
            state by a token that is already decided, so that the circuit covers only later tokens;
            0 for no bridge. Our choice.
        chain: number of consecutive windows of n tokens in a draft, each conditioned on the tokens
            of the previous window; at most 1024. More than 1 requires a bridge.
        draft_layers: K, number of last layers with LoRA in the draft path; 0 for no LoRA.
        draft_rank: rank of this LoRA.
        draft_alpha: alpha of this LoRA.
        evidence: "none", or "soft" for a circuit that all hidden states share; a hidden state then
            conditions this circuit through one vector of logits per position (CoDD, arXiv
            2603.00045).

    Raises:
        ValueError: If a value is out of range; the message names the field.

    Source: arXiv 2511.11346; the defaults of gamma, beta, rank and alpha are the published values.
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
    evidence: Evidence = "none"

    def __post_init__(self) -> None:
        table = {
            "gamma": within(above=0, maximum=1),
            "beta": within(0, 1),
            "bridge": within(0),
            # Limited because every window uses memory. A saved draft may be untrusted, and none of
            # its tensors has a shape with which this number could be compared.
            "chain": within(maximum=1024),
            "draft_layers": within(0),
            "draft_rank": within(1),
            "draft_alpha": within(above=0),
        }
        check_fields(self, table)
        check_structure("MtpcConfig", self)
        fits = self.chain == 1 or (self.chain > 1 and self.bridge > 0)
        require(fits, "MtpcConfig", "chain", "1, or more with a bridge", self.chain)

    def for_tokens(self, count: int) -> MtpcConfig:
        """Return a copy of the settings in which an ``emission`` of None is replaced.

        None is replaced by "full" for up to 4096 tokens, otherwise by "adapter" (our choice). The
        size of "full" is proportional to positions times components times tokens: with 8 positions,
        8 components and 49152 tokens of width 576, it is 7 GB. "adapter" uses the model's own
        unembedding.

        Args:
            count: number of tokens that may be drafted: the size of the shortlist or of the
                vocabulary.
        """
        chosen = "full" if count <= MOST_FULL else "adapter"
        return replace(self, emission=self.emission or chosen)

    def of_head(self) -> dict[str, Any]:
        """Return the settings that are arguments of :class:`CircuitHead`, by name. If ``emission``
        is None, call :meth:`for_tokens` first."""
        return {name: getattr(self, name) for name in _HEAD_FIELDS}
