"""Random operations on a pool, compared with a dict from names to expected adapters."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from pool_support import Base, assert_slot_holds, config, state

from lora_ext.pool import AdapterPool, PoolFullError, UnknownAdapterError

NAMES = st.sampled_from(["a", "b", "c", "d", "e"])
RANKS = st.integers(1, 16)
KINDS = st.sampled_from(["plain", "bias", "dora"])
TARGETS = st.sampled_from([("up", "down"), ("up",), ("down", "head"), ("up", "down", "head")])


class PoolMachine(RuleBasedStateMachine):
    """State machine of a pool. ``meaning`` maps names to the expected (tensors, scale). A lease is
    stored with the values of its slots at the time of its creation."""

    def __init__(self):
        super().__init__()
        self.pool = AdapterPool(Base(), max_slots=3, max_rank=16, pages=4)
        self.meaning = {}
        self.leases = []
        self.seed = 0

    def adapter(self, rank, targets, kind):
        self.seed += 1
        bias, dora = kind == "bias", kind == "dora"
        tensors = state(self.seed, rank, targets, bias, dora=dora)
        return (config(rank, targets, lora_bias=bias, use_dora=dora), tensors), (tensors, 8 / rank)

    @rule(name=NAMES, rank=RANKS, where=TARGETS, kind=KINDS)
    def load(self, name, rank, where, kind):
        source, meaning = self.adapter(rank, where, kind)
        try:
            self.pool.load(name, source)
        except ValueError:
            assert name in self.meaning
        except PoolFullError:
            assert name not in self.meaning and self.leases
        else:
            assert name not in self.meaning
            self.meaning[name] = meaning

    @rule(name=NAMES, rank=RANKS, where=TARGETS, kind=KINDS)
    def update(self, name, rank, where, kind):
        source, meaning = self.adapter(rank, where, kind)
        try:
            self.pool.update(name, source)
        except UnknownAdapterError:
            assert name not in self.meaning
        except PoolFullError:
            assert name in self.meaning and self.leases
        else:
            self.meaning[name] = meaning

    @rule(name=NAMES)
    def unload(self, name):
        try:
            self.pool.unload(name)
        except UnknownAdapterError:
            assert name not in self.meaning
        else:
            del self.meaning[name]

    @rule(names=st.lists(st.one_of(st.none(), NAMES), min_size=1, max_size=3))
    def acquire(self, names):
        try:
            lease = self.pool.acquire(names)
        except UnknownAdapterError:
            assert not set(names) - {None} <= self.meaning.keys()
        except PoolFullError:
            pass  # The invariant checks that no adapter was lost or pinned.
        else:
            self.leases.append((lease, [n and self.meaning[n] for n in names]))

    @rule(data=st.data())
    def release(self, data):
        if self.leases:
            index = data.draw(st.integers(0, len(self.leases) - 1))
            self.pool.release(self.leases.pop(index)[0])

    @rule(rank=RANKS)
    def fail_to_load(self, rank):
        source, _ = self.adapter(rank, ("up", "down"), "plain")
        source[1]["base_model.model.down.lora_B.weight"][0, 0] = float("nan")
        try:
            self.pool.load("broken", source)
        except ValueError:
            return
        raise AssertionError("NaN was loaded")

    @invariant()
    def every_name_and_every_lease_means_what_it_should(self):
        pool = self.pool
        assert sorted(pool.names) == sorted(self.meaning)
        for name, resident in pool._residence.by_name.items():
            assert_slot_holds(pool, resident.slot, *self.meaning[name])
        for lease, meanings in self.leases:
            for slot, meaning in zip(lease, meanings, strict=True):
                assert (slot == -1) == (meaning is None)
                if meaning is not None:
                    assert_slot_holds(pool, slot, *meaning)

    @invariant()
    def every_page_is_free_or_has_one_owner(self):
        pool, store = self.pool, self.pool._store
        live = [r for r in store.residents if r is not None]
        assert all(r.pins or not r.retired for r in live), "a retired slot without pins is a leak"
        for module, slab in store.slabs.items():
            owned = [p for r in live for p in r.pages.get(module, ())]
            assert sorted([*owned, *slab.free]) == list(range(pool.pages))
        assert sorted([*store.free_slots, *(r.slot for r in live)]) == list(range(pool.max_slots))
        pins = sum(slot >= 0 for lease, _ in self.leases for slot in lease)
        assert pool.stats()["pins"] == pins
        assert pool.stats()["cache_bytes"] == sum(a.nbytes for a in pool._residence.cache.values())


PoolMachine.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    database=None,
)
TestPool = PoolMachine.TestCase
