"""Devices: the mesh and where each array lies on it."""
