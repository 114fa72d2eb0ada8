"""Embeddings on disk: a vector index that can be searched, saved and reopened."""

from mmrep.embed.index import Hit, Index

__all__ = ["Hit", "Index"]
