"""Mixtures of a pool: several adapters on one row, without copies of their factors.

A mixture of adapters k = 0, 1, ... has a slot, but no pages of its own. Its rows in the tables
list the pages of all its adapters, one after the other, so one call of an op computes::

    y[t] = base(x[t]) + sum_k weights[t, k] * scale[k] * B[k] A[k] x[t]

For each page, ``page_scale`` is the scale of its adapter, and ``groups`` is the adapter's index k,
which selects the weight. Rows of a batch with the same adapters share the slot for any weights.
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_ext._checks import require

from ._pages import PAGE, TableRow
from ._store import PageStore, Resident

_WHERE = "AdapterPool.acquire: names"


def joined_rows(store: PageStore, members: Sequence[Resident]) -> dict[str, TableRow]:
    """Return a mixture's row in the tables of each module, by module.

    Raises:
        NotImplementedError: If an adapter cannot be in a mixture.
        ValueError: If the adapters have more pages in a module than a row of its table can list.
    """
    for member in members:
        check_weighted(store, member)
        expected, name = "an ordinary adapter in a mixture", repr(member.name)
        found = "an aLoRA adapter (alora_invocation_tokens); use it alone"
        require(not member.invocation, _WHERE, name, expected, found, NotImplementedError)
    rows: dict[str, TableRow] = {}
    for module in dict.fromkeys(module for member in members for module in member.rows):
        own = [(k, m.rows[module]) for k, m in enumerate(members) if module in m.rows]
        scales = [scale for _, row in own for scale in row.scales]
        if len(scales) > store.max_pages:
            raise ValueError(
                f"{_WHERE}: expected a mixture of at most {store.max_pages} pages per module "
                f"(max_rank={store.max_rank}), found {[m.name for m in members]!r:.200}, which "
                f"needs {len(scales)} in {module!r}; create the pool with a larger max_rank"
            )
        pages = [
            page
            for expert in range(store.index.specs[module].experts)
            for _, row in own
            for page in row.pages[expert * len(row.scales) :][: len(row.scales)]
        ]
        groups = [k for k, row in own for _ in row.scales]
        rows[module] = TableRow(pages, PAGE * len(scales), scales, groups, (*scales, 0.0)[0])
    return rows


def check_weighted(store: PageStore, resident: Resident) -> None:
    """Raise NotImplementedError if an adapter does more than add updates that can be weighted."""
    found = [
        f"{store.modules[module].scaled[resident.slot].kind.title} at {module!r}"
        for module in resident.scaled
    ]
    found += [f"scales of the inputs of {module!r}" for module in sorted(resident.befores)]
    for module, view in store.modules.items():
        if resident.slot in view.replaced:
            whole = view.replaced[resident.slot].rows is None
            argument = "modules_to_save" if whole else "trainable_token_indices"
            found.append(f"{argument} at {module!r}")
    if found:
        raise NotImplementedError(
            f"{_WHERE}: {resident.name!r}: expected an adapter that only adds an update to every "
            f"output, found {found[0]}; use it alone, with a weight of 1"
        )
