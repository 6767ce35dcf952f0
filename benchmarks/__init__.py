"""Benchmarks of torchshm against what people use today, one quantity a module.

``python -m benchmarks`` runs them all; ``README.md`` beside this file says how they measure.
"""
