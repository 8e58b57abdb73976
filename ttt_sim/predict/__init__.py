"""Predictions for measured rows: operator and whole-model latencies from the lowering and engine of ``run``."""
