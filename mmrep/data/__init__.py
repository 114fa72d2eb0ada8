"""Data: records with missing fields, where they come from, and how they become batches."""

from mmrep.data.batch import Batch
from mmrep.data.sample import Quarantined, Sample
from mmrep.data.source import Source

__all__ = ["Batch", "Quarantined", "Sample", "Source"]
