"""Targets: what a hidden token is to be predicted as. One file per kind."""
