"""Pallas kernels and what they share; plain arrays in and out, nothing of ours imported."""
