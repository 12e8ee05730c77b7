"""Floor 3: who teaches. A teacher is a frozen function of a batch."""

from potstill.teachers.local import Local, load_weights, local

__all__ = ["Local", "load_weights", "local"]
