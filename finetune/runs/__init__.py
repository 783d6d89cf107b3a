"""Runs: checks before the slow part, a training run and its folder, sweeps, and the search for a learning rate."""
