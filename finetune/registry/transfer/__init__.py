"""Adapters between registries: copies, archives, and mirrors on the Hub and in OCI registries."""
