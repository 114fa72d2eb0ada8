"""The training loop, distributed collectives, optimizer groups, checkpoints and exact resume."""
