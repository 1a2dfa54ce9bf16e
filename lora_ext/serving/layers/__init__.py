"""Layers that serve a pool's adapters and replace base modules."""
