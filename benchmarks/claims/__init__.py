"""Pretrained models and texts of the reproductions, out of installed packages."""
