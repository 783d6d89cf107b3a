"""The maintenance of a registry: verification, garbage collection, and the check of a location."""
