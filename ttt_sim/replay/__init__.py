"""Traces that compute: the ops of a trace executed on the simulated schedule, and held against the reference."""
