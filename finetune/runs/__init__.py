"""Runs: a training run and its folder, the saved adapter, sweeps, and the learning-rate range test."""
