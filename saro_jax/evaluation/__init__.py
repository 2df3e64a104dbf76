"""Evaluation: benchmarks, how they are run, and the statistics of what comes out."""
