"""Synthesizers: each file takes a trained model and returns a calibration set."""
