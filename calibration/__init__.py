"""Calibration data: load preference data, and split it into a calibration set and held-out pairs."""
