"""Quantizers: each file takes a graph, a plan and a calibration set and returns its parameters."""
