"""A table that comes with scikit-learn: 569 tumours by 30 measures of their cells, benign or malignant."""

from __future__ import annotations

import numpy as np

from mmrep.config import config
from mmrep.data.source import Source, SourceConfig


@config
class TumoursConfig(SourceConfig):
    """test: every fifth row, or the others. holes: share of values that are missing."""

    test: bool = False
    holes: float = 0.05
    label: str | None = "kind"


class Tumours(Source):
    """Columns ``cells`` [30], standardised with the training rows' statistics, and ``kind``."""

    Config = TumoursConfig
    columns = ("cells", "kind")

    def __init__(self, config):
        from sklearn.datasets import load_breast_cancer

        super().__init__(config)
        values, kinds = load_breast_cancer(return_X_y=True)
        held = np.arange(len(values)) % 5 == 0
        values = (values - values[~held].mean(0)) / values[~held].std(0)
        values[np.random.default_rng(0).uniform(size=values.shape) < config.holes] = np.nan
        self._rows = np.flatnonzero(held == config.test)
        self._values, self._kinds = values, kinds

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, index):
        row = self._rows[index]
        kind = "benign" if self._kinds[row] else "malignant"
        return self.make_sample({"cells": self._values[row], "kind": kind}, str(row))
