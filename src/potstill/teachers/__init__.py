"""Floor 3: who teaches. A teacher is a frozen function of a batch."""

from potstill.teachers.aligned import Aligned, Beside, aligned, beside
from potstill.teachers.hf import AdaptersOff, HfTeacher, adapters_off, hf
from potstill.teachers.local import Local, load_weights, local
from potstill.teachers.remembered import Remembered, build, remembered
from potstill.teachers.verified import verify

__all__ = [
    "AdaptersOff",
    "Aligned",
    "Beside",
    "HfTeacher",
    "Local",
    "Remembered",
    "adapters_off",
    "aligned",
    "beside",
    "build",
    "hf",
    "load_weights",
    "local",
    "remembered",
    "verify",
]
