"""Checkpoints of other libraries as models of ours: one bridge for each library."""
