"""Pretrained models and texts of the reproductions, from installed packages."""
