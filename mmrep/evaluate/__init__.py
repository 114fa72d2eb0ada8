"""Measures of finished embeddings: arrays in, numbers out. Nothing here knows a modality or a model."""

from mmrep.evaluate.diagnostics import alignment, dimension_spread, effective_rank, modality_gap, uniformity
from mmrep.evaluate.knn import knn_metrics
from mmrep.evaluate.probe import linear_probe
from mmrep.evaluate.retrieval import Relevance, retrieval_metrics, retrieval_ranks, top_k
from mmrep.evaluate.zero_shot import class_embeddings, expand_templates, zero_shot_metrics, zero_shot_probabilities

__all__ = [
    "Relevance",
    "alignment",
    "class_embeddings",
    "dimension_spread",
    "effective_rank",
    "expand_templates",
    "knn_metrics",
    "linear_probe",
    "modality_gap",
    "retrieval_metrics",
    "retrieval_ranks",
    "top_k",
    "uniformity",
    "zero_shot_metrics",
    "zero_shot_probabilities",
]
