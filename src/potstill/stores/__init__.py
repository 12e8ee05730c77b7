"""Floor 1: what must outlive a run. Signals of a teacher on disk, joined to rows by content."""

from potstill.stores.account import Info, info
from potstill.stores.signals import Contents, Layer, SignalReader
from potstill.stores.sketch import SKETCHES, Sampled, Sketch, Top, Whole

__all__ = ["SKETCHES", "Contents", "Info", "Layer", "Sampled", "SignalReader", "Sketch", "Top", "Whole", "info"]
