"""The floors of ``benchmarks.startup``: scripts of torch and transformers alone, which import nothing of this project."""
