"""Base layers of adapters: their weights, packed or not, and adapters merged into them."""
