"""How much of the supervisor's time one guest may take."""

from __future__ import annotations


class Budget:
    """A bucket of tokens that refills; times are monotonic seconds.

    Args:
        burst: how many tokens fit.
        rate: how many come back a second.
    """

    def __init__(self, burst: float, rate: float, now: float) -> None:
        self._burst = burst
        self._rate = rate
        self._tokens = burst
        self._last = now

    def take(self, cost: float, now: float) -> float:
        """Takes cost and returns 0, or takes nothing and returns the seconds to wait for it."""
        wait = self.wait(cost, now)
        if not wait:
            self._tokens -= cost
        return wait

    def wait(self, cost: float, now: float) -> float:
        """The seconds until there is enough for cost; takes nothing."""
        self._tokens = min(self._burst, self._tokens + (now - self._last) * self._rate)
        self._last = now
        return max(0.0, (min(cost, self._burst) - self._tokens) / self._rate)
