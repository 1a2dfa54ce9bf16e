"""HashHop, HashChain and the solver: known texts, structure, distributions and errors."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from lora_ext.methods.reasoning import HashChain, HashHop, HashInstance, solve
from lora_ext.methods.reasoning.tasks import ALPHABET

HOP = """\
Map:
kfa2=>h5tt
h5tt=>3hid
3hid=>cadu
Start: kfa2
Hops: 2
Target: 3hid"""
CHAIN = """\
Map:
hzl6=>8gb8
8gb8=>ew2u
hzl6=>9v45
ew2u=>hf8d
9v45=>faie
Start: hzl6
Task: shortest path
Target: faie"""
BY_HAND = "Map:\nbidr=>dp0w\ndp0w=>orn8\nbidr=>q94b\nStart: bidr\nTask: shortest path\nTarget:"


def identity(batch):
    return batch


# -------------------------------------------------------------------------------------------------
# Known texts


def test_seed_determines_the_text():
    assert HashHop(3, chain_length=4, max_hops=3, seed=7).text(1) == HOP
    assert HashChain(3, chains=(2, 3, 4), num_chains=2, seed=7).text(1) == CHAIN


@pytest.mark.parametrize(("hops", "answer"), [(0, "a"), (1, "b"), (2, "c"), (10**12, "c")])
def test_walk_stops_at_the_end_of_the_chain(hops, answer):
    assert solve(f"Map:\nb=>c\na=>b\nStart: a\nHops: {hops}\nTarget:") == answer


def test_nearest_end_is_the_answer():
    assert solve(BY_HAND) == "q94b"
    instance = HashInstance(BY_HAND, "", (), "", None, ())  # solve reads only the prompt.
    assert solve(instance) == "q94b"


# -------------------------------------------------------------------------------------------------
# Structure


@given(st.integers(2, 12), st.integers(1, 14), st.booleans(), st.integers(2, 4), st.integers())
@settings(max_examples=60, deadline=None)
@pytest.mark.filterwarnings("ignore:HashHop. max_hops")
def test_hop_instance_is_a_path(chain_length, max_hops, vary, hash_length, seed):
    task = HashHop(2, chain_length, max_hops, vary, hash_length, seed)
    for instance in task:
        following = dict(instance.edges)
        assert len(instance.edges) == len(following) == chain_length - 1
        path = [instance.start]
        while path[-1] in following:
            path.append(following[path[-1]])
        assert len(set(path)) == chain_length == instance.chain_lengths[0]
        assert all(len(h) == hash_length and set(h) <= set(ALPHABET) for h in path)
        assert instance.hops == max_hops or (vary and 1 <= instance.hops <= max_hops)
        assert instance.target == path[min(instance.hops, chain_length - 1)] == solve(instance)
        assert instance.prompt.count("=>") == chain_length - 1


@given(
    st.lists(st.integers(2, 9), min_size=2, max_size=7).filter(lambda c: len(set(c)) > 1),
    st.integers(2, 5),
    st.integers(),
)
@settings(max_examples=60, deadline=None)
def test_chain_instance_has_one_shortest_chain(chains, num_chains, seed):
    for instance in HashChain(2, chains, num_chains, seed=seed):
        lengths = instance.chain_lengths
        assert len(lengths) == num_chains and set(lengths) <= set(chains)
        assert lengths[0] == min(lengths) and lengths.count(lengths[0]) == 1
        assert len(instance.edges) == sum(c - 1 for c in lengths)
        degrees = Counter(key for key, _ in instance.edges)
        assert degrees.pop(instance.start) == num_chains and set(degrees.values()) <= {1}
        values = [value for _, value in instance.edges]
        assert len({instance.start, *values}) == 1 + len(values)
        ends = [value for value in values if value not in degrees]
        assert len(ends) == num_chains and instance.target in ends
        assert instance.hops is None and solve(instance) == instance.target


def test_lengths_are_distinct_if_there_are_enough():
    for instance in HashChain(200, chains=range(2, 9), num_chains=3):
        if instance.chain_lengths[0] <= 6:
            assert len(set(instance.chain_lengths)) == 3


def test_given_lengths_are_used_without_vary_hash():
    task = HashChain(5, chains=(4, 3, 6, 2), num_chains=3, vary_hash=False)
    assert {instance.chain_lengths for instance in task} == {(3, 4, 6)}


def test_generator_and_solver_agree_on_two_thousand_instances_each():
    for task in (HashHop(2000), HashChain(2000, chains=range(2, 9))):
        assert all(solve(instance) == instance.target for instance in task)


# -------------------------------------------------------------------------------------------------
# Distributions


def chi_square(counts, expected):
    return sum((count - expected) ** 2 / expected for count in counts)


def test_shortest_length_is_uniform():
    task = HashChain(6000, chains=range(2, 9), num_chains=4, seed=1)
    counts = Counter(instance.chain_lengths[0] for instance in task)
    assert set(counts) == {2, 3, 4, 5, 6, 7}
    assert chi_square(counts.values(), 1000) < 20.5  # 0.999 quantile with 5 degrees of freedom


def test_hops_are_uniform():
    counts = Counter(instance.hops for instance in HashHop(5000, max_hops=10, seed=1))
    assert set(counts) == set(range(1, 11))
    assert chi_square(counts.values(), 500) < 27.9  # 0.999 quantile with 9 degrees of freedom


def test_lines_are_shuffled():
    task = HashHop(300, chain_length=20)
    moved = 0
    for instance in task:
        following, path = dict(instance.edges), [instance.start]
        while path[-1] in following:
            path.append(following[path[-1]])
        moved += [key for key, _ in instance.edges] != path[:-1]
    assert moved > 0.9 * 300


def test_hashes_are_distinct_even_if_few_are_possible():
    for instance in HashHop(200, chain_length=18, hash_length=1, seed=3):
        assert len({instance.start, *(value for _, value in instance.edges)}) == 18


# -------------------------------------------------------------------------------------------------
# Reproducibility


@pytest.mark.parametrize("make", [HashHop, HashChain])
def test_item_depends_only_on_seed_and_index(make):
    long, short = make(50, seed=4), make(10, seed=4)
    assert [long[i] for i in reversed(range(10))] == list(reversed(list(short)))
    assert long[3] != long[4] and make(50, seed=5)[3] != long[3]
    assert long[-1] == long[49] and long.text(2) == long[2].text


@pytest.mark.parametrize("make", [HashHop, HashChain])
def test_items_do_not_depend_on_the_number_of_workers(make):
    task = make(12, seed=2)
    for workers in (0, 2):
        loader = DataLoader(task, batch_size=5, num_workers=workers, collate_fn=identity)
        assert [item for batch in loader for item in batch] == list(task)


# -------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HashHop(-1), "HashHop: num_samples: expected at least 0, found -1"),
        (lambda: HashHop(1, chain_length=1), "HashHop: chain_length: expected at least 2, found 1"),
        (lambda: HashHop(1, max_hops=0), "HashHop: max_hops: expected at least 1, found 0"),
        (lambda: HashHop(1, hash_length=0), "HashHop: hash_length: expected at least 1, found 0"),
        (
            lambda: HashHop(1, hash_length=1),
            "HashHop: hash_length: expected a length with at least 40 .*, found 1, which gives 36",
        ),
        (
            lambda: HashChain(1, chains=(6, 8), num_chains=4, hash_length=1),
            "HashChain: hash_length: expected a length with at least 54 .*, found 1, which gives",
        ),
        (lambda: HashChain(-3), "HashChain: num_samples: expected at least 0, found -3"),
        (lambda: HashChain(1, hash_length=0), "HashChain: hash_length: expected at least 1, found"),
        (lambda: HashChain(1, chains=(1, 3)), r"HashChain: chains: .* at least 2, found \(1, 3\)"),
        (lambda: HashChain(1, chains=(3, 3)), r"HashChain: chains: .* distinct .*, found \(3, 3\)"),
        (lambda: HashChain(1, chains=()), r"HashChain: chains: .* distinct .*, found \(\)"),
        (lambda: HashChain(1, num_chains=1), "HashChain: num_chains: expected at least 2, found 1"),
        (
            lambda: HashChain(1, chains=(2, 3), num_chains=3, vary_hash=False),
            "HashChain: num_chains: expected at most 2 chains, found 3",
        ),
        (
            lambda: HashChain(1, chains=(3, 2, 2), num_chains=3, vary_hash=False),
            r"HashChain: chains: expected exactly one shortest chain, found \(3, 2, 2\)",
        ),
    ],
)
def test_errors_name_invalid_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_at_most_half_of_all_hashes_may_be_used():
    assert len(HashHop(1, chain_length=18, hash_length=1)[0].edges) == 17
    with pytest.raises(ValueError, match="at least 38 possible hashes"):
        HashHop(1, chain_length=19, hash_length=1)


def test_hops_beyond_the_chain_warn():
    with pytest.warns(UserWarning, match=r"max_hops: expected less than chain_length=5, found 5"):
        HashHop(1, chain_length=5, max_hops=5)


def test_index_out_of_range_is_refused():
    assert list(HashHop(0)) == []
    with pytest.raises(IndexError, match="HashHop: index: expected one of 3 instances, found 3"):
        HashHop(3)[3]
    with pytest.raises(IndexError, match="found -4"):
        HashHop(3)[-4]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "expected lines"),
        (BY_HAND.replace("Start", "Begin"), "expected lines"),
        (BY_HAND.replace("shortest", "longest"), "expected lines"),
        (BY_HAND.replace("q94b\n", "q94b\nbidr=>x\n"), "a unique nearest end, found .*q94b.*x"),
        ("Map:\na=>b\nb=>a\nStart: a\nTask: shortest path\nTarget:", "a chain that ends"),
        ("Map:\na=>b\na=>c\nStart: a\nHops: 1\nTarget:", r"one edge from a, found .*b.*c"),
    ],
)
def test_prompt_without_an_answer_is_refused(prompt, message):
    with pytest.raises(
        ValueError, match=f"^solve: prompt: expected {message.removeprefix('expected ')}"
    ):
        solve(prompt)
