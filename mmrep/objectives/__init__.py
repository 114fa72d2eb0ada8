"""Objectives: what one training step computes."""
