"""Graphs and molecules: reading, encoders, node and edge embeddings, augmentation."""
