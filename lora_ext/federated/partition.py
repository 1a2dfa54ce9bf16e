"""Partitions of labelled samples in which clients have different distributions of classes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lora_ext._checks import integer, number, require

Shares = list[NDArray[np.int64]]
_TRIES = 100


def partition_pathological(
    labels: ArrayLike, n_clients: int, classes_per_client: int, *, seed: int, min_per_share: int = 2
) -> Shares:
    """Assign samples of only a few classes to each client.

    Every class is assigned to the same number of clients, up to a difference of one. The samples of
    a class are divided among its clients in proportions drawn from Dirichlet(1).

    Args:
        labels: class of each sample, ``(samples,)``.
        n_clients: number of clients.
        classes_per_client: exact number of classes of each client.
        seed: seed of the random numbers; the global random state is not used.
        min_per_share: minimum number of samples that a client has of each of its classes.

    Returns:
        for each client, the indices of its samples in ascending order. Each sample belongs to
        exactly one client.

    Raises:
        ValueError: If an argument is out of range; if ``classes_per_client`` exceeds the number of
            classes, or is so small that some class has no client; or if a class has too few samples
            for its clients.

    Source: the partition in the logs of Fed-HeLLo (arXiv 2506.12213). That classes have equal
    numbers of clients is our choice.
    """
    where = "partition_pathological"
    classes, members = _by_class(where, labels)
    integer(where, "n_clients", n_clients, 1)
    integer(where, "classes_per_client", classes_per_client, 1)
    integer(where, "min_per_share", min_per_share, 0)
    integer(where, "seed", seed, 0)
    most = len(classes)
    name, count = "classes_per_client", classes_per_client
    require(count <= most, where, name, f"at most {most}, the number of classes", count)
    least = math.ceil(most / n_clients)
    require(count >= least, where, name, f"at least {least}, so that every class is used", count)
    generator = np.random.default_rng(seed)
    owners: list[list[int]] = [[] for _ in classes]
    for client in range(n_clients):
        fewest = generator.random(most) + [len(each) for each in owners]  # breaks ties at random
        for index in np.argsort(fewest)[:classes_per_client]:
            owners[index].append(client)
    shares: list[list[Any]] = [[] for _ in range(n_clients)]
    for name, own, clients in zip(classes, members, owners, strict=True):
        least = min_per_share * len(clients)
        expected = f"at least {least} samples of class {name}, {min_per_share} per client"
        require(len(own) >= least, where, "labels", expected, len(own))
        wanted = generator.dirichlet(np.ones(len(clients))) * (len(own) - least)
        sizes = min_per_share + _rounded(wanted, len(own) - least)
        _deal(generator.permutation(own), sizes, [shares[client] for client in clients])
    return _sorted(shares)


def partition_dirichlet(
    labels: ArrayLike, n_clients: int, alpha: float, *, seed: int, min_size: int = 1
) -> Shares:
    """Divide each class among all clients, in proportions drawn from Dirichlet(alpha).

    Args:
        labels: class of each sample, ``(samples,)``.
        n_clients: number of clients.
        alpha: parameter of the distribution, above 0. Small values give a client few classes, large
            values similar parts of all classes.
        seed: seed of the random numbers; the global random state is not used.
        min_size: minimum number of samples of a client. At most a hundred splits are drawn until
            every client has that many samples.

    Returns:
        for each client, the indices of its samples in ascending order. Each sample belongs to
        exactly one client.

    Raises:
        ValueError: If an argument is out of range, or if in every drawn split some client has fewer
            than ``min_size`` samples.
    """
    where = "partition_dirichlet"
    _, members = _by_class(where, labels)
    integer(where, "n_clients", n_clients, 1)
    integer(where, "min_size", min_size, 0)
    integer(where, "seed", seed, 0)
    number(where, "alpha", alpha, above=0, expected="a finite number above 0")
    samples = sum(map(len, members))
    least = n_clients * min_size
    require(samples >= least, where, "labels", f"at least {least} samples", samples)
    generator = np.random.default_rng(seed)
    smallest = 0
    for _ in range(_TRIES):
        shares: list[list[Any]] = [[] for _ in range(n_clients)]
        for own in members:
            parts = generator.dirichlet(np.full(n_clients, float(alpha)))
            _deal(generator.permutation(own), _rounded(parts * len(own), len(own)), shares)
        smallest = min(sum(map(len, share)) for share in shares)
        if smallest >= min_size:
            return _sorted(shares)
    expected = f"a split with at least {min_size} samples per client within {_TRIES} draws"
    found = f"{smallest} in the last draw; raise alpha or lower min_size"
    raise ValueError(f"{where}: min_size: expected {expected}, found {found}")


def _by_class(where: str, labels: ArrayLike) -> tuple[list[Any], Shares]:
    """Return the classes, and for each class the indices of its samples."""
    array = np.asarray(labels)
    require(array.ndim == 1 and array.size > 0, where, "labels", "shape (N,), N > 0", array.shape)
    classes, inverse = np.unique(array, return_inverse=True)
    return classes.tolist(), [np.flatnonzero(inverse == i) for i in range(len(classes))]


def _rounded(wanted: NDArray[np.float64], total: int) -> NDArray[np.int64]:
    """Round sizes to integers with the sum ``total``: round down, except the sizes with the largest
    remainders."""
    sizes = np.floor(wanted).astype(np.int64)
    order = np.argsort(sizes - wanted, kind="stable")
    sizes[order[: total - int(sizes.sum())]] += 1
    return sizes


def _deal(samples: NDArray[np.int64], sizes: NDArray[np.int64], to: list[list[Any]]) -> None:
    for part, share in zip(np.split(samples, np.cumsum(sizes)[:-1]), to, strict=True):
        share.append(part)


def _sorted(shares: list[list[Any]]) -> Shares:
    return [np.sort(np.concatenate(share)) for share in shares]
