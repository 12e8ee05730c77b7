"""Floor 4: who teaches whom."""

from potstill.schemes.offline import Offline, Plan

__all__ = ["Offline", "Plan"]
