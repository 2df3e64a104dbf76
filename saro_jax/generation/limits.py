"""Owns the limits of a server's use: requests and tokens a minute, and budgets of a run."""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

Clock = Callable[[], float]


class Rate:
    """At most `most` units in any `period` seconds; None: no limit."""

    def __init__(self, most: float | None, period: float = 60.0, clock: Clock = time.monotonic):
        self.most, self.period, self.clock = most, period, clock
        self.taken: deque[tuple[float, float]] = deque()

    def wait(self, units: float) -> float:
        """Seconds until so many units are free; more than `most` are free when none is taken."""
        if self.most is None:
            return 0.0
        now = self.clock()
        while self.taken and self.taken[0][0] <= now - self.period:
            self.taken.popleft()
        over = sum(amount for _, amount in self.taken) + min(units, self.most) - self.most
        for at, amount in self.taken:
            if over <= 0:
                break
            over -= amount
            if over <= 0:
                return max(at + self.period - now, 1e-3)
        return 0.0

    def take(self, units: float) -> None:
        """Count units as used now."""
        if self.most is not None:
            self.taken.append((self.clock(), units))


@dataclass(frozen=True)
class Use:
    """What requests took: their number, tokens, money."""

    requests: int = 0
    tokens: int = 0
    cost: float = 0.0

    def __add__(self, other: "Use") -> "Use":
        return Use(
            self.requests + other.requests, self.tokens + other.tokens, self.cost + other.cost
        )

    def __sub__(self, other: "Use") -> "Use":
        return self + Use(-other.requests, -other.tokens, -other.cost)


class Budget:
    """What may be used in all. What is under way is reserved by its estimate until it is known."""

    def __init__(self, requests: int | None, tokens: int | None, cost: float | None):
        self.most = {"requests": requests, "tokens": tokens, "cost": cost}
        self.used, self.reserved = Use(), Use()

    def room(self, use: Use) -> bool:
        """Whether the budget has room for this beside what is used and reserved."""
        return self._over(self.used + self.reserved + use) is None

    def complaint(self, use: Use) -> str | None:
        """Which setting this would break if nothing were under way, as text, or None."""
        name = self._over(self.used + use)
        if name is None:
            return None
        return (
            f"server.max_{name}={self.most[name]:g}: {getattr(self.used, name):g} are used, and "
            f"one more request may take {getattr(use, name):g}; the same command with a larger "
            "budget continues"
        )

    def _over(self, use: Use) -> str | None:
        for name, most in self.most.items():
            if most is not None and getattr(use, name) > most + 1e-9:
                return name
        return None


def cost(prompt_tokens: int, new_tokens: int, input_price: float, output_price: float) -> float:
    """Money for tokens, prices per million; rounded so that sums do not depend on their order."""
    return round(math.fsum((prompt_tokens * input_price, new_tokens * output_price)) / 1e6, 9)
