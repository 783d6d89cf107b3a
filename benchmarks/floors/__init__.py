"""Floors of ``benchmarks.startup``: torch and transformers alone, without an import of this project."""
