"""Serving: a stream of requests on one system, each sequence with a state of its own, batched as they come."""
