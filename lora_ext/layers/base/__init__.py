"""The layer below the adapters: its weight, packed or not, and adapters merged into it."""
