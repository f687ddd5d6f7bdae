"""Runs what was exported: engines, prediction, scoring and latency."""
