"""Shares: how many of each group make up a set of a wanted size."""

from collections.abc import Mapping

FINE = 1e-9  # what a product of shares may fall short of a whole number


def allotted(counts: Mapping[str, int], shares: Mapping[str, float], size: int) -> dict[str, int]:
    """How many of each group: in the shares, never more than there are, `size` in all if possible.

    Largest remainders first, then in the order of the shares.
    """
    taken = dict.fromkeys(counts, 0)
    left = min(size, sum(count for name, count in counts.items() if shares[name] > 0))
    while left:
        open_ = [name for name in counts if taken[name] < counts[name] and shares[name] > 0]
        weight = sum(shares[name] for name in open_)
        ideal = {name: left * shares[name] / weight for name in open_}
        given = {name: min(int(ideal[name] + FINE), counts[name] - taken[name]) for name in open_}
        if not any(given.values()):
            best = sorted(open_, key=lambda name: -(ideal[name] % 1))[:left]
            given = dict.fromkeys(best, 1)
        for name, more in given.items():
            taken[name] += more
            left -= more
    return taken
