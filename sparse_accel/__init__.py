"""Sparse transfer learning on today's torch: SparseML recipes, run through accelerate."""

__version__ = "0.1.0"
