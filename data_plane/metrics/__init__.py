"""What operators see of an engine: counters, their Prometheus metrics, a line in the log."""
