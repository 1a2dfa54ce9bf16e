"""A small base model, random adapters for it, and a function that reads the pages of a slot."""

import torch
from torch import nn

from lora_ext.pool import AdapterPool, unpack

SIZES = {"up": (12, 20), "down": (20, 12), "head": (12, 5)}  # neither multiples of 8 nor equal


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        for name, (i, o) in SIZES.items():
            setattr(self, name, nn.Linear(i, o))
        self.embed = nn.Embedding(7, 12)
        self.norm = nn.Embedding(7, 12, max_norm=1.0)  # Its forward changes its weight.


def config(rank=4, targets=("up", "down"), **fields):
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 8,
        "target_modules": list(targets),
        "bias": "none",
        **fields,
    }


def state(seed, rank=4, targets=("up", "down"), bias=False, dtype=torch.float32, dora=False):
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in targets:
        i, o = SIZES[name]
        key = f"base_model.model.{name}.lora_"
        tensors[key + "A.weight"] = torch.randn(rank, i, generator=g).to(dtype)
        tensors[key + "B.weight"] = torch.randn(o, rank, generator=g).to(dtype)
        if bias:
            tensors[key + "B.bias"] = torch.randn(o, generator=g).to(dtype)
        if dora:
            tensors[key + "magnitude_vector"] = torch.randn(o, generator=g).to(dtype)
    return tensors


def make(**arguments):
    """Return a pool of three slots for the small model."""
    return AdapterPool(Base(), **{"max_slots": 3, "max_rank": 16, **arguments})


def load(pool, name, seed, rank=4, **fields):
    """Load a random adapter; ``fields`` are added to its configuration."""
    bias, dora = fields.get("lora_bias", False), fields.get("use_dora", False)
    targets = fields.pop("targets", ("up", "down"))
    tensors = state(seed, rank, targets, bias, dora=dora)
    pool.load(name, (config(rank, targets, **fields), tensors))


def fill(pool, seeds, rank=4):
    """Load an adapter named ``x<seed>`` for each seed and return the pool."""
    for seed in seeds:
        load(pool, f"x{seed}", seed, rank)
    return pool


class FailingCopies:
    """Substitute for ``copy_`` that raises at call number ``at`` (from 1) and, if ``for_good``, at
    every later call."""

    def __init__(self, at, for_good=False):
        self.count, self.at, self.for_good = 0, at, for_good

    def __call__(self, destination, source):
        self.count += 1
        if self.count == self.at or (self.for_good and self.count > self.at):
            destination.fill_(77)  # leaves a partly written tensor
            raise RuntimeError("the copy failed")
        destination.copy_(source)


def read_slot(pool, slot):
    """Return ``{module: (A, B, bias or None, scale, magnitude or None)}`` of a slot."""
    found = {}
    for name, slab in pool.modules.items():
        if slab.a_pages is None:
            continue
        rank = int(slab.ranks[slot])
        pages = [q for q in slab.page_table[slot].tolist() if q >= 0]
        assert len(pages) == -(-rank // 8), f"slot {slot}: {len(pages)} pages for rank {rank}"
        bias = None if slab.bias is None else slab.bias[slot]
        if rank:
            a, b = unpack(slab.a_pages, slab.b_pages, pages, rank)
            magnitude = slab.after[slot] if slot in slab.scaled else None
            found[name] = (a, b, bias, float(slab.scale[slot]), magnitude)
            tail = slab.b_pages[pages[-1], :, rank % 8 :] if rank % 8 else torch.zeros(1)
            assert not tail.any(), f"{name}: expected 0 beyond rank {rank}, found {tail}"
        elif bias is not None:
            assert not bias.any(), f"{name}: slot {slot} has rank 0 and a bias"
        if slot not in slab.scaled and slab.after is not None:
            assert not slab.after[slot].any(), f"{name}: magnitude without scales"
        assert rank or slot not in slab.scaled
    return found


def assert_slot_holds(pool, slot, tensors, scale):
    """Check that the slot contains exactly these tensors, bitwise, and this scale."""
    found = read_slot(pool, slot)
    expected = {key.split(".")[2] for key in tensors}
    assert found.keys() == expected
    for name, (a, b, bias, found_scale, magnitude) in found.items():
        key = f"base_model.model.{name}.lora_"
        assert torch.equal(a, tensors[key + "A.weight"].to(a.dtype))
        assert torch.equal(b, tensors[key + "B.weight"].to(b.dtype))
        assert found_scale == torch.tensor(scale, dtype=torch.float32).item()
        own = tensors.get(key + "B.bias")
        if own is not None:
            assert torch.equal(bias, own.to(bias.dtype))
        elif bias is not None:
            assert not bias.any()
        own = tensors.get(key + "magnitude_vector")
        assert (own is None) == (magnitude is None)
        assert own is None or torch.equal(magnitude, own.to(magnitude.dtype))


def assert_holds(pool, name, tensors, scale):
    """Check that the adapter's slot contains exactly these tensors, bitwise, and this scale."""
    with pool.acquire([name]) as slots:
        assert_slot_holds(pool, slots[0], tensors, scale)


def snapshot(pool):
    """Return the state of the pool: names, statistics, slots, free pages, versions of the views,
    and the tensors of every adapter."""
    numbers = pool.stats()
    slots = {r.name: r.slot for r in pool._residence.by_name.values()}
    tensors = {}
    for name, slot in slots.items():
        for module, parts in read_slot(pool, slot).items():
            tensors[name, module] = tuple(
                part.clone() if isinstance(part, torch.Tensor) else part for part in parts
            )
    free = {m: sorted(slab.free) for m, slab in pool._store.slabs.items()}
    views = {
        m: (s.version, s.a_pages is None, s.bias is None, s.after is None, dict(s.scaled))
        for m, s in pool.modules.items()
    }
    return pool.names, numbers, slots, free, views, tensors


def assert_same(before, after):
    assert before[:-1] == after[:-1]
    assert before[-1].keys() == after[-1].keys()
    for key, values in before[-1].items():
        for left, right in zip(values, after[-1][key], strict=True):
            same = torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right
            assert same, key
