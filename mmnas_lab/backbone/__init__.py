"""Frozen encoders: raw samples to pooled multi-level features."""
