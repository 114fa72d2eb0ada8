"""Masks: which tokens of a sample are visible and which are to be predicted. One file per kind."""
