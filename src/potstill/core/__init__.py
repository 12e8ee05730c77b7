"""Floor 0: the nouns, the catalog, the run folder, the errors."""
