"""Base layers of adapters: access to weights, packed copies of weights, and merged adapters."""
