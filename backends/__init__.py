"""Targets: each file takes a quantized graph and returns an engine and its runner."""
