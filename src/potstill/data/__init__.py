"""Where batches come from: sources of micro-batches by number."""

from potstill.data.images import ImageData, arrays, from_dataset, images
from potstill.data.sources import ImageSource

__all__ = ["ImageData", "ImageSource", "arrays", "from_dataset", "images"]
