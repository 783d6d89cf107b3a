"""Metrics, as pure functions of predictions and references; nothing here imports torch."""
