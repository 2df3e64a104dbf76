"""Owns the version of saro_jax; importing the package does no work."""

__version__ = "0.1.0"
