"""Floor 3: who teaches. A teacher is a frozen function of a batch, or a writer of text."""

from potstill.teachers.aligned import Aligned, Beside, aligned, beside
from potstill.teachers.average import Average, average
from potstill.teachers.batch import batch_jobs
from potstill.teachers.endpoint import endpoint
from potstill.teachers.ensemble import Ensemble, Routed, ensemble, routed
from potstill.teachers.fake import fake
from potstill.teachers.hf import AdaptersOff, HfTeacher, adapters_off, hf
from potstill.teachers.local import Local, load_weights, local
from potstill.teachers.local_writer import local_writer
from potstill.teachers.remembered import Built, Remembered, build, remembered
from potstill.teachers.scored import Scored, scored
from potstill.teachers.spread import spread
from potstill.teachers.told import Told, told
from potstill.teachers.verified import Verified, verify

__all__ = [
    "AdaptersOff",
    "Aligned",
    "Average",
    "Beside",
    "Built",
    "Ensemble",
    "HfTeacher",
    "Local",
    "Remembered",
    "Routed",
    "Scored",
    "Told",
    "Verified",
    "adapters_off",
    "aligned",
    "average",
    "batch_jobs",
    "beside",
    "build",
    "endpoint",
    "ensemble",
    "fake",
    "hf",
    "load_weights",
    "local",
    "local_writer",
    "remembered",
    "routed",
    "scored",
    "spread",
    "told",
    "verify",
]
