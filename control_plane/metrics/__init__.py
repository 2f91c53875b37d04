"""What operators see of a replica: counters, their Prometheus metrics, a line in the log."""
