"""Probes that score an encoder on real pictures."""
