"""Held-out likelihood of a model, and what it has to beat."""
