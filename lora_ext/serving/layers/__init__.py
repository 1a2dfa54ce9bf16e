"""The layers that serve a pool's adapters, each in the place of a base module."""
