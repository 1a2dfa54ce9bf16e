"""Selection of the adapters that a layer's forward uses, and of the rows that use each adapter."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lora_ext._checks import require
from lora_ext._torch import compiles
from lora_ext.kinds import variants
from lora_ext.rows import Assignment, Layout, Names, Rows, _context, _rows, _traced, layer_names

from .base._merging import Merging


class Participants(Merging):
    """Base class of :class:`LoraLayer` that selects the adapters of a forward."""

    #: Whether each adapter is switched on. If all are off, the forward computes ``base(x)``.
    adapter_active: dict[str, bool]
    #: Names of the adapters that are switched off only while the layer is in training mode.
    off_in_training: frozenset[str]
    disable_adapters: bool

    #: True if the input is ``(tokens, sequences, features)``.
    tokens_first = False

    #: True if the rows are ids, as in an embedding. Such ids may be positions that all sequences of
    #: the batch share.
    _of_tokens = False

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Names of all adapters, in the order of ``adapter_ids``."""
        return tuple(self.r)

    def _participants(
        self, leading: torch.Size, device: torch.device, adapter_ids: Tensor | Names | Assignment
    ) -> tuple[list[str], Rows | None]:
        """Return the names of the adapters that a forward uses, and the adapter of each row.

        If there are no names, the forward computes only the base layer. The rows are None if all
        adapters apply to all rows.
        """
        if self.disable_adapters:
            if self._merged:
                self.unmerge()
            return [], None
        rows = self._rows(leading, device, adapter_ids)
        if self._merged:
            merged = "are merged into the base weight and"
            if rows is not None:
                why = f"{self.merged_adapters} {merged} apply to every row"
                raise ValueError(f"adapter_ids: {why}; unmerge them first")
            off = [m.name for m in self._merged if not self._is_on(m.name)]
            if off:
                why = f"{off} {merged} cannot be switched off"
                raise ValueError(f"adapter_active: {why}; unmerge them first")
            return [], None
        if _rows.several_processes():
            rows = self._rows_of_all(rows, leading, device)
            if rows is not None:
                return list(self.adapter_names), rows
        if rows is None:
            active = [n for n in self._active if self._is_on(n)]
            if self.alora_invocation_tokens:
                for name in active:
                    if name in self.alora_invocation_tokens:  # an aLoRA adapter needs token ids
                        raise _traced.no_rows(repr(name))
            return active, None
        return (list(self.adapter_names) if rows.used else []), rows

    def _rows_of_all(
        self, rows: Rows | None, leading: torch.Size, device: torch.device
    ) -> Rows | None:
        """Return the rows with all trained adapters marked as used, even those without rows.

        The reason is given in :func:`lora_ext.rows._rows.together`. Returns None if all active
        adapters apply to every row and no other adapter is trained.
        """
        # Every process reads the parameters of all adapters in the same order: ZeRO-3 gathers a
        # parameter when it is read, which is a collective operation of all processes.
        asked = [any(p.requires_grad for p in self._parameters_of(name)) for name in self.r]
        trained: set[int] = set()
        if torch.is_grad_enabled():
            trained = {i for i, n in enumerate(self.r) if asked[i] and self._is_on(n)}
        if rows is None:
            active = {i for i, n in enumerate(self.r) if n in self._active and self._is_on(n)}
            if len(active) > 1 or trained <= active:
                return None
            rows = _rows.everywhere(min(active, default=-1), leading.numel(), device)
        return _rows.together(rows, tuple(trained))

    def _is_on(self, name: str) -> bool:
        """Return whether an adapter is switched on in the layer's current mode."""
        return self.adapter_active[name] and not (self.training and name in self.off_in_training)

    def _rows(
        self, leading: torch.Size, device: torch.device, adapter_ids: Tensor | Names | Assignment
    ) -> Rows | None:
        block = None
        if adapter_ids is None and not compiles():
            block = _context.current(layer_names.handle)
            if block is None:
                return None
        names = self.adapter_names
        if isinstance(adapter_ids, Tensor):
            enabled = tuple(self._is_on(name) for name in names)
            rows = _rows.rows_of(adapter_ids, len(names), leading, enabled, self.tokens_first)
            if rows.ids.dim() > 1:
                self._refuse_rescaled(names[i] for i in rows.used)
            return rows
        reachable = tuple(n if self._is_on(n) else "" for n in names)  # "" matches no name
        if adapter_ids is not None:
            made = isinstance(adapter_ids, Assignment)
            assignment = adapter_ids if made else Assignment.of(adapter_ids)
            self._check_known((*assignment.members, *assignment.unused))
            self._refuse_rescaled(assignment.weighted)
            layout = Layout(leading, device, self.tokens_first)
            return assignment.rows_among(reachable, layout, mixes=True)
        if block is not None:
            self._refuse_rescaled(block.assignment.weighted)
            where = leading, device, self.tokens_first, self._of_tokens
            return block.rows_among(reachable, *where, mixes=True)
        if not _context.any_block:
            return None
        where = leading, device, self.tokens_first, self._of_tokens
        return _traced.layer_rows(reachable, self._default_position(), *where)

    def _refuse_rescaled(self, names: Iterable[str]) -> None:
        """Raise NotImplementedError if one of the mixed adapters ``names`` scales outputs."""
        for name, kind in ((name, kind) for name in names for kind in variants("LORA")):
            title, scales = kind.title, getattr(self, kind.when).get(name, False)
            expected = f"adapters without {title} in rows with weights or several adapters"
            where, found = type(self).__name__, f"{name!r}, which uses {title}"
            require(not scales, where, "adapter_names", expected, found, NotImplementedError)

    def _default_position(self) -> int:
        active = [n for n in self._active if self._is_on(n)]
        if len(active) == 1 and active[0] in self.alora_invocation_tokens:
            return _traced.NOBODY
        if len(active) > 1:
            expected = "expected one active adapter in a compiled graph with `adapters` blocks"
            raise NotImplementedError(f"{type(self).__name__}: {expected}, found {active}")
        return self.adapter_names.index(active[0]) if active else -1
