"""The upkeep of a registry: verification, garbage collection, and the trial of a place."""
