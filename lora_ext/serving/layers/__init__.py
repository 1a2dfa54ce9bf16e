"""Layers that replace base modules and apply the adapters of a pool."""
