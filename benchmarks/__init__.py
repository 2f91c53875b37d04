"""Measurements. Every figure is a ratio of things timed in the same run where there is a peer."""
