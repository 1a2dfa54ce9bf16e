"""Adapters packed into pages of eight ranks, and the tables and memory of each module's pages.

A page contains 8 consecutive ranks of an adapter in one module with I inputs and O outputs. Page
``p`` of the adapter in a slot is page ``q`` of the P pages of the module::

    a_pages[q, j, :] = lora_A[8p + j, :]      (P, 8, I)
    b_pages[q, :, j] = lora_B[:, 8p + j]      (P, O, 8)      q = page_table[slot, p]

The last page of an adapter is padded with zeros. Pages of float8_e4m3fn also have a scale, a power
of two: see :func:`quantised`. ``csrc/include/lora_ext/lora.h`` describes the same layout for the
kernels.
"""

from __future__ import annotations

import functools
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lora_ext._checks import require
from lora_ext.adapter import (
    AdapterConfig,
    AdapterSource,
    LinearSpec,
    ModelIndex,
    Replaced,
    read_adapter,
)
from lora_ext.kinds import Factors, Kind

from ._memory import HostMemory, memory_on

PAGE = 8
_ALIGNMENT = 64  # in bytes; start of each tensor in a mapping


def page_count(rank: int) -> int:
    """Return the number of pages that an adapter with this rank needs in a module."""
    return -(-rank // PAGE)


def page_bytes(spec: LinearSpec) -> int:
    """Return the size in bytes of one page of a module, ``8 * (I + O) * itemsize``."""
    return PAGE * (spec.in_features + spec.out_features) * page_dtype(spec).itemsize


def page_dtype(spec: LinearSpec) -> torch.dtype:
    """Return the dtype of the pages of a module."""
    return torch.float8_e4m3fn if spec.float8 else spec.dtype


def in_words(nbytes: int) -> str:
    """Format a number of bytes with a unit, such as ``20.0 GiB``."""
    size, unit = float(nbytes), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} bytes" if unit == "bytes" else f"{size:.1f} {unit}"


#: Fields of :class:`PackedModule` and :class:`ModuleSlab` that hold one vector per adapter.
VECTORS = ("bias", "after", "before")
TENSORS = ("a", "b", *VECTORS)


@dataclass(frozen=True)
class PackedModule:
    """Factors of an adapter for one module, packed into n pages in host memory."""

    a: Tensor  # (n, 8, I); for E experts (E * n, 8, I), ordered by expert
    b: Tensor  # (n, O, 8); for E experts (E * n, O, 8)
    rank: int
    scale: float
    of_bias: bool = False  # whether `after` scales the bias of the base layer, too
    scales: Sequence[float] = ()  # of the pages; if empty, each has `scale`
    # Vectors of `Factors`. `after` and `before` have at least float32 precision, as in PEFT.
    bias: Tensor | None = None  # (O,)
    after: Tensor | None = None  # (O,)
    before: Tensor | None = None  # (I,)

    @property
    def nbytes(self) -> int:
        """Size of pages, bias and scales in bytes."""
        tensors = (getattr(self, name) for name in TENSORS)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@dataclass(frozen=True)
class PackedAdapter:
    """Adapter in host memory, checked and packed into pages."""

    config: AdapterConfig
    modules: dict[str, PackedModule]
    replaced: dict[str, Replaced] = field(default_factory=dict)
    leftover: tuple[str, ...] = ()  # keys and fields that strict=False skipped
    generation: int = 0  # number of the load that added it to the pool; 0 before

    @property
    def rank(self) -> int:
        """Largest rank of the adapter in any module."""
        return max((part.rank for part in self.modules.values()), default=0)

    @property
    def nbytes(self) -> int:
        """Size of pages, vectors and weights of replaced modules in bytes."""
        return sum(part.nbytes for part in (*self.modules.values(), *self.replaced.values()))


def read_packed(
    source: AdapterSource, index: ModelIndex, max_rank: int, strict: bool = True
) -> PackedAdapter:
    """Read an adapter and pack it into pages, one module at a time.

    Raises:
        ValueError: If :func:`lora_ext.adapter.read_adapter` rejects the adapter, or if a value is
            not finite in the dtype of the pages.
    """
    modules: dict[str, PackedModule] = {}
    replaced: dict[str, Replaced] = {}
    with read_adapter(source, index, max_rank, strict) as adapter:
        for spec, factors in adapter.modules():
            packed = pack(spec, factors)
            for part in TENSORS:
                # Checked after the conversion to spec.dtype, since it may overflow float16.
                _check_finite(getattr(packed, part), adapter.where_is(spec.name, part))
            if spec.float8:
                where, kind = adapter.where_is(spec.name, "a"), adapter.config.kind
                weighs = factors.after is not None and kind.needs_weight
                found = kind.title if weighs else f"{spec.experts} experts"
                fits = not weighs and spec.experts == 1
                expected = "an ordinary adapter in pages of torch.float8_e4m3fn"
                require(fits, where, spec.name, expected, found, NotImplementedError)
                packed = _quantised(spec, packed, where)
            modules[spec.name] = packed
        for spec, whole in adapter.replaced():
            kept = whole.each(functools.partial(_host, spec))
            argument = "modules_to_save" if whole.rows is None else "trainable_token_indices"
            for values in kept:
                _check_finite(values, f"AdapterPool: {argument}: {spec.name}")
            replaced[spec.name] = kept
    return PackedAdapter(adapter.config, modules, replaced, adapter.leftover)


def _check_finite(values: Tensor | None, where: str) -> None:
    if values is not None and not torch.isfinite(values).all():
        raise ValueError(f"{where}: expected finite values in {values.dtype}, found NaN or inf")


def _host(spec: LinearSpec, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Copy a tensor to host memory, which is pinned if the module is on a CUDA device.

    Floating-point values are converted to ``dtype``, by default to the dtype of the pages.
    """
    if dtype is None:
        dtype = spec.dtype if values.is_floating_point() else values.dtype
    pin = spec.device.type == "cuda"
    return torch.empty(values.shape, dtype=dtype, pin_memory=pin).copy_(values)


def pack(spec: LinearSpec, factors: Factors) -> PackedModule:
    """Pack factors ``a`` (E * r, I) and ``b`` (O, r * E) into pages in host memory.

    The memory is pinned for modules on CUDA devices, except for pages that will be quantised, which
    are float32.
    """
    a, b, experts = factors.a, factors.b, spec.experts
    rank, pin = a.shape[0] // experts, spec.device.type == "cuda" and not spec.float8
    n, count = page_count(rank), page_count(rank) * experts
    dtype = torch.float32 if spec.float8 else spec.dtype
    a_pages = torch.zeros(count, PAGE, a.shape[1], dtype=dtype, pin_memory=pin)
    b_pages = torch.zeros(count, b.shape[0], PAGE, dtype=dtype, pin_memory=pin)
    a_rows, inputs = a_pages.view(experts, n * PAGE, a.shape[1]), a.shape[1]
    a_rows[:, :rank].copy_(a.reshape(experts, rank, inputs))
    each_b = b.reshape(b.shape[0], rank, experts).permute(2, 0, 1)  # (E, O, r)
    for p in range(n):
        ranks = each_b[..., p * PAGE : (p + 1) * PAGE]  # (E, O, <= 8)
        b_pages.view(experts, n, -1, PAGE)[:, p, :, : ranks.shape[2]].copy_(ranks)
    vectors = {name: own for name in VECTORS if (own := factors.tensors.get(name)) is not None}
    for name, own in vectors.items():
        wide = None if name == "bias" else torch.promote_types(spec.dtype, torch.float32)
        vectors[name] = _host(spec, own, wide)
    of_bias = factors.after is not None and factors.after.of_bias
    return PackedModule(a_pages, b_pages, rank, factors.scaling, of_bias, (), **vectors)


def quantised(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round pages ``a (n, 8, I)`` and ``b (n, O, 8)`` of float32 to float8_e4m3fn.

    Rank j of page p is divided by powers of two, ``2**i`` in ``a`` and ``2**k`` in ``b``, that make
    its values at most 448, the largest of the dtype. The product ``2**(i + k)`` is the same for all
    ranks of a page: a rank with a smaller product is divided by larger powers in both factors. The
    error of a value w is at most ``max(abs(w) / 16, 2**i / 1024)``, or with k in ``b``.

    Returns:
        The pages, and ``i + k`` of each page ``(n,)``.
    """
    i, k = _exponent(a.abs().amax(2)), _exponent(b.abs().amax(1))  # (n, 8)
    used = (a != 0).any(2) & (b != 0).any(1)
    product = (i + k).masked_fill(~used, -(1 << 20)).amax(1, keepdim=True)  # (n, 1)
    more = (product - i - k) * used
    i, k = i + more // 2, k + (more + 1) // 2
    a, b = a.double() * _power(-i)[:, :, None], b.double() * _power(-k)[:, None]
    return a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), product[:, 0] * used.any(1)


def _exponent(largest: Tensor) -> Tensor:
    """Return the least integers e with ``largest <= 448 * 2**e``; any for 0."""
    mantissa, exponent = torch.frexp(largest)
    return exponent.long() - 9 + (mantissa > 448 / 512)


def _power(exponent: Tensor) -> Tensor:
    """Return ``2**exponent`` exactly, as float64."""
    return (exponent + 1023 << 52).view(torch.float64)


def _quantised(spec: LinearSpec, packed: PackedModule, where: str) -> PackedModule:
    a, b, exponents = quantised(packed.a, packed.b)
    scales = (packed.scale * _power(exponents)).tolist()
    low, high = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    expected = "products of scales that are normal float32 numbers"
    fits = all(low <= abs(s) <= high for s in scales) or packed.scale == 0
    require(fits, where, spec.name, expected, scales)
    pages = (_host(spec, page, torch.float8_e4m3fn) for page in (a, b))
    return replace(packed, **dict(zip("ab", pages, strict=True)), scales=scales)


def with_float8_pages(index: ModelIndex, max_rank: int) -> ModelIndex:
    """Return the index of a pool with float8_e4m3fn pages; raise if the pool cannot have them."""
    found = [f"max_rank={max_rank}"] if max_rank > 256 else []
    for spec in index.specs.values():
        if spec.dtype == torch.float64:
            found.append(f"{spec.name!r} in {spec.dtype}")
    expected = "a max_rank of at most 256 and modules in 16 bits or float32"
    where = "AdapterPool: dtype=torch.float8_e4m3fn"
    require(not found, where, "model", expected, (*found, "")[0], NotImplementedError)
    changed = {
        kind: {name: replace(spec, float8=True) for name, spec in getattr(index, kind).items()}
        for kind in ("linear", "embedding", "experts")
    }
    return replace(index, **changed)


def in_one_mapping(adapter: PackedAdapter) -> PackedAdapter:
    """Copy an adapter's pages to one mapping of host memory, which is freed as a whole.

    Tensors of a few pages that are freed one by one leave gaps in the heap, which take about half
    of their size. Adapters without pages or in pinned memory are returned unchanged.
    """
    parts = adapter.modules
    if not parts or any(part.a.is_pinned() for part in parts.values()):
        return adapter
    size = sum(part.nbytes + len(TENSORS) * _ALIGNMENT for part in parts.values())
    left, modules = HostMemory(size).tensor, {}
    for module, part in parts.items():
        moved: dict[str, Tensor] = {}
        for name in TENSORS:
            if (value := getattr(part, name)) is not None:
                to = left[: value.nbytes].view(value.dtype).view(value.shape)
                moved[name] = to.copy_(value)
                left = left[-(-value.nbytes // _ALIGNMENT) * _ALIGNMENT :]
        modules[module] = replace(part, **moved)
    return replace(adapter, modules=modules)


def unpack(
    a_pages: Tensor, b_pages: Tensor, pages: Sequence[int], rank: int
) -> tuple[Tensor, Tensor]:
    """Copy an adapter's factors in a module, ``lora_A`` (r, I) and ``lora_B`` (O, r), from pages.

    Args:
        a_pages, b_pages: all pages of the module, from a :class:`ModuleSlab`.
        pages: indices of the adapter's pages: the entries of its row in ``page_table`` except -1.
        rank: rank r of the adapter, from ``ranks`` of the slab.

    Raises:
        TypeError: If the pages are float8_e4m3fn, which have scales.
    """
    dtype, scaled = a_pages.dtype, a_pages.dtype == torch.float8_e4m3fn
    require(not scaled, "unpack", "a_pages", "pages without scales", dtype, TypeError)
    index = torch.as_tensor(pages, dtype=torch.int64, device=a_pages.device)
    a = a_pages[index].flatten(0, 1)  # (8n, I)
    b = b_pages[index].permute(1, 0, 2).flatten(1)  # (O, 8n)
    return a[:rank], b[:, :rank]


class Scaled(NamedTuple):
    """Scaling of a module's outputs by the adapter in one slot."""

    version: int  # `ModuleSlab.version` when the adapter was published
    kind: Kind
    of_bias: bool


@dataclass
class ModuleSlab:
    """Tensors of one module that the serving layer reads in every forward.

    The tensors are None until an adapter that targets the module is loaded. From then on they are
    never replaced by other tensors, so a captured CUDA graph may use their addresses. ``bias`` and
    ``after`` are allocated for the first adapter with ``lora_bias`` or scaled outputs. The rows of
    a slot change only while the slot is not pinned.

    The adapter of slot s adds ``scale[s] * (B A x + bias[s])``; as in PEFT, the bias is scaled,
    too. For a slot in ``scaled``, the output including this term is also scaled, by factors that
    the adapter's kind computes from ``after[s]`` (:meth:`lora_ext.kinds.Kind.after`).

    P is the number of pages, and S the number of rows of the tables: one per slot. If the module is
    a parameter of E experts, slot s has the E rows from ``s * E`` on, and S is ``slots * E``.
    """

    in_features: int
    out_features: int
    dtype: torch.dtype = torch.float32  # of the update; pages may be float8_e4m3fn instead
    float8: bool = False  # whether they are; their scales are `page_scale`
    a_pages: Tensor | None = None  # (P, 8, I)
    b_pages: Tensor | None = None  # (P, O, 8)
    page_table: Tensor | None = None  # int32 (S, ceil(max_rank / 8)); -1 where there is no page
    ranks: Tensor | None = None  # int32 (S,), 0 if the slot's adapter does not target this module
    scale: Tensor | None = None  # float32 (S,), alpha / r or alpha / sqrt(r); unused in mixtures
    # The next three are None before the first mixture, or with float8 pages before the first
    # adapter; see :mod:`lora_ext.pool._mixtures`. `page_scale` (float32) and `groups` (int32) have
    # the shape of page_table: the scale of the page, and the adapter's index in its mixture (0
    # outside of mixtures). `members` (slots, MAX_MEMBERS) int32 lists the slots of the adapters of
    # each slot, then -1.
    page_scale: Tensor | None = None
    groups: Tensor | None = None
    members: Tensor | None = None
    # Number of weights per row of a batch in compiled graphs, the same in all modules: 0 as long
    # as every weight was 1, and above 1 after the first mixture.
    mixed: int = 0
    bias: Tensor | None = None  # (S, O), or None while no adapter has a bias
    after: Tensor | None = None  # (S, O), or None while no adapter scales outputs
    # (S + 1, I), scales of the inputs, or None while no adapter has any. The last row is for the
    # base model (slot -1). It contains ones, as do the rows of adapters without such scales.
    before: Tensor | None = None
    version: int = 0  # number of published adapters that target this module
    # Slots whose adapter scales the outputs of this module, on the host. A change replaces the
    # mapping by a new one, so a forward can read it without a lock.
    scaled: Mapping[int, Scaled] = field(default_factory=dict)
    # Weight and bias of each slot whose adapter replaces the module. Changes replace the mapping.
    replaced: Mapping[int, Replaced] = field(default_factory=dict)
    # Whether any adapter has replaced the module so far. Unlike `replaced` it changes at most once,
    # so a compiled graph that depends on it is recompiled at most once.
    was_replaced: bool = False
    experts: int = 1  # E


class TableRow(NamedTuple):
    """Entries of one slot in the tables of a module. The slot has n pages for each expert."""

    pages: list[int]  # ordered by expert
    rank: int
    scales: list[float]  # of each of the n pages
    groups: list[int]  # weight column of each of the n pages
    scale: float = 0.0  # of the adapter; unused in mixtures


class TableBlock:
    """Tables of the modules that the same load targeted for the first time.

    The modules are on one device and have the same number of experts. Their tables are stacked, so
    writing a slot needs only one copy per table. All slots are empty at first.
    """

    def __init__(
        self, names: Sequence[str], slots: int, max_pages: int, device: torch.device, experts: int
    ):
        m, slots = len(names), slots * experts
        self.names, self.experts = names, experts
        self.page_table = torch.full((m, slots, max_pages), -1, dtype=torch.int32, device=device)
        self.ranks = torch.zeros(m, slots, dtype=torch.int32, device=device)
        self.scale = torch.zeros(m, slots, dtype=torch.float32, device=device)
        #: Tables ``page_scale`` and ``groups`` of :class:`ModuleSlab`; empty before a mixture.
        self.mixed: tuple[Tensor, ...] = ()

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """All tables."""
        return self.page_table, self.ranks, self.scale, *self.mixed

    @property
    def nbytes(self) -> int:
        """Size of the tables in bytes."""
        return sum(table.nbytes for table in self.tables)

    def new_mixed(self) -> tuple[Tensor, ...]:
        """Return new tensors of zeros for ``mixed``."""
        groups = torch.zeros_like(self.page_table)
        return groups.float(), groups

    def copies(
        self, slot: int, rows: Mapping[str, TableRow], mixed: tuple[Tensor, ...] = ()
    ) -> list[tuple[Tensor, Tensor]]:
        """Return the copies (destination, source) that write the rows of a slot to the tables.

        The destinations are the tensors ``mixed`` if given, and all tables otherwise.
        """
        m, pin, experts = len(self.names), self.ranks.is_cuda, self.experts
        shape = m, experts, self.page_table.shape[2]
        table = torch.full(shape, -1, dtype=torch.int32, device="cpu", pin_memory=pin)
        ranks = torch.zeros(m, experts, dtype=torch.int32, device="cpu", pin_memory=pin)
        scale = torch.zeros(m, experts, dtype=torch.float32, device="cpu", pin_memory=pin)
        page_scale = torch.zeros(shape, dtype=torch.float32, device="cpu", pin_memory=pin)
        groups = torch.zeros(shape, dtype=torch.int32, device="cpu", pin_memory=pin)
        for i, name in enumerate(self.names):
            row = rows.get(name)
            if row is not None:
                own = torch.tensor(row.pages, dtype=torch.int32).view(experts, -1)
                n = own.shape[1]
                table[i, :, :n], ranks[i], scale[i] = own, row.rank, row.scale
                page_scale[i, :, :n] = torch.tensor(row.scales, dtype=torch.float32)
                groups[i, :, :n] = torch.tensor(row.groups, dtype=torch.int32)
        slots = slice(slot * experts, (slot + 1) * experts)
        own = (page_scale, groups) if mixed else (table, ranks, scale, page_scale, groups)
        return [(to[:, slots], t) for to, t in zip(mixed or self.tables, own, strict=False)]


class Slab:
    """Memory and free pages of one module.

    The A and B parts of a page are adjacent, so more memory at the end adds whole pages. Pages with
    the smallest indices are used first, and physical memory is allocated only up to the last used
    page.

    Attributes:
        a, b: pages ``(P, 8, I)`` and ``(P, O, 8)``, the same tensors as long as the pool exists.
            They are not initialised, but tables refer only to pages that were written.
        free: indices of the pages that no adapter uses, in descending order.
    """

    def __init__(self, spec: LinearSpec, pages: int):
        self.pages = pages
        self.page_bytes = page_bytes(spec)
        self.free = list(reversed(range(pages)))
        try:
            # Ops read page 0 in place of pages that no row uses, so it must always exist.
            self.memory = memory_on(spec.device, pages * self.page_bytes, self.page_bytes)
        except (RuntimeError, OSError) as error:  # includes torch.OutOfMemoryError
            raise MemoryError(
                f"AdapterPool: pages: expected room for {pages} pages of {spec.name!r} ("
                f"{in_words(pages * self.page_bytes)}), found none ({error}); pass a smaller pages="
            ) from error
        i, page = spec.in_features, PAGE * (spec.in_features + spec.out_features)
        values = self.memory.tensor.view(page_dtype(spec))
        # set_ instead of views, because torch.compile adds guards for inputs that are views.
        self.a, self.b = (
            values.new_empty(0).set_(values.untyped_storage(), start, size, (page, size[2], 1))
            for start, size in ((0, (pages, PAGE, i)), (PAGE * i, (pages, spec.out_features, PAGE)))
        )

    def bytes_for(self, free: Sequence[int], round_up: int = 1) -> int:
        """Return the size in bytes of the memory up to the last used page.

        Args:
            free: indices of the free pages in descending order.
            round_up: the number of pages is rounded up to a multiple of this number.
        """
        # `free` begins with the free pages at the end of the memory: entry i is page P - 1 - i.
        # For the first entry i that is another page, page P - 1 - i is the last used one.
        used = self.pages - bisect(
            range(len(free)), False, key=lambda i: free[i] != self.pages - 1 - i
        )
        return self.memory.rounded(-(-used // round_up) * round_up * self.page_bytes)
