"""Latency: how it is measured, predicted, and brought inside a budget."""
