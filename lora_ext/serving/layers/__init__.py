"""Layers that replace base modules and add the updates of a pool's adapters."""
