"""Heads on a model, in scikit-learn's manner: ``fit(raw, y)``, ``predict(raw)``, ``score(raw, y)``.

`LinearHead`, `MultiLabelHead` and `RegressionHead` are scikit-learn estimators on embeddings, which are computed once a
call and not trained. `AttentiveHead` (in `mmrep.finetune.attentive`) reads tokens, and can train the encoder too. All
work inside scikit-learn's tools; mind that cloning one, as cross-validation does, copies its model.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MultiLabelBinarizer, StandardScaler
from sklearn.utils.validation import check_is_fitted

from mmrep.model import Model
from mmrep.tower import Tower

Of = Literal["embedding", "pooled"]


class _Head(BaseEstimator):
    """What heads on embeddings share.

    Args:
        model: it embeds; None = ``raw`` is an array of embeddings [n, D] already.
        modality: tower or modality that reads ``raw``; None where the model has one tower.
        of: the ``embedding``, or the ``pooled`` features before the projector, which often classify better.
        batch_size: values a forward pass.
    """

    def __init__(
        self, model: Model | None = None, modality: str | None = None, *, of: Of = "embedding", batch_size: int = 32
    ) -> None:
        self.model = model
        self.modality = modality
        self.of = of
        self.batch_size = batch_size

    def _read(self, raw: Any) -> NDArray[np.float64]:
        """[n, D]."""
        if self.of not in ("embedding", "pooled"):
            raise ValueError(f"of is 'embedding' or 'pooled', got {self.of!r}")
        if self.model is None:
            found = np.asarray(raw)
            if found.ndim != 2:
                raise ValueError(f"a head without a model reads embeddings [n, D], got shape {found.shape}")
        elif self.of == "embedding":
            found = self.model.encode(list(raw), self.modality, batch_size=self.batch_size)
        else:
            found = pooled(one_tower(self.model, self.modality), list(raw), self.batch_size)
        return np.asarray(found, dtype=np.float64)


class LinearHead(ClassifierMixin, _Head):
    """Logistic regression on standardised embeddings; ``y`` [n] are class names or numbers.

    Args:
        model: as all heads.
        modality: likewise.
        of: likewise.
        batch_size: likewise.
        C: inverse strength of the L2 penalty.
    """

    def __init__(
        self, model: Model | None = None, modality: str | None = None, *, of: Of = "embedding", batch_size: int = 32,
        C: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__(model, modality, of=of, batch_size=batch_size)
        self.C = C

    def fit(self, raw: Any, y: Any) -> LinearHead:
        """Embed and fit."""
        x, labels = _same_length(self._read(raw), y)
        self.head_ = make_pipeline(StandardScaler(), LogisticRegression(C=self.C, max_iter=1000)).fit(x, labels)
        self.classes_ = self.head_.classes_
        return self

    def predict(self, raw: Any) -> NDArray[Any]:
        """Classes [n]."""
        check_is_fitted(self)
        return self.head_.predict(self._read(raw))

    def predict_proba(self, raw: Any) -> NDArray[np.float64]:
        """[n, classes], in the order of ``classes_``."""
        check_is_fitted(self)
        return self.head_.predict_proba(self._read(raw))


class MultiLabelHead(ClassifierMixin, _Head):
    """A logistic regression for each label; `score` is the share of samples all of whose labels are right.

    Args:
        model: as all heads.
        modality: likewise.
        of: likewise.
        batch_size: likewise.
        C: inverse strength of the L2 penalty.
        threshold: probability from which a label is given.
    """

    def __init__(
        self, model: Model | None = None, modality: str | None = None, *, of: Of = "embedding", batch_size: int = 32,
        C: float = 1.0, threshold: float = 0.5,
    ) -> None:  # fmt: skip
        super().__init__(model, modality, of=of, batch_size=batch_size)
        self.C = C
        self.threshold = threshold

    def fit(self, raw: Any, y: Sequence[Collection[Any]] | NDArray[Any]) -> MultiLabelHead:
        """Embed and fit; ``y`` is a collection of labels for each value, or a table [n, labels] of 0 and 1."""
        x = self._read(raw)
        self.binarizer_ = None if _is_table(y) else MultiLabelBinarizer().fit(cast(Any, y))
        x, table = _same_length(x, self._table(y))
        self.classes_ = np.arange(table.shape[1]) if self.binarizer_ is None else self.binarizer_.classes_
        one = LogisticRegression(C=self.C, max_iter=1000)
        self.head_ = make_pipeline(StandardScaler(), OneVsRestClassifier(one)).fit(x, table)
        return self

    def predict_proba(self, raw: Any) -> NDArray[np.float64]:
        """[n, labels], in the order of ``classes_``."""
        check_is_fitted(self)
        return self.head_.predict_proba(self._read(raw))

    def predict(self, raw: Any) -> Any:
        """As ``y`` was given: a tuple of labels for each value, or a table [n, labels] of 0 and 1."""
        table = (self.predict_proba(raw) >= self.threshold).astype(int)
        return table if self.binarizer_ is None else self.binarizer_.inverse_transform(table)

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Share of values all of whose labels are right."""
        right = (self._table(self.predict(X)) == self._table(y)).all(1)
        return float(np.average(right, weights=sample_weight))

    def _table(self, y: Any) -> NDArray[np.int64]:
        return np.asarray(y if self.binarizer_ is None else self.binarizer_.transform(y), dtype=int)


class RegressionHead(RegressorMixin, _Head):
    """Ridge regression on standardised embeddings; ``y`` is [n] or [n, outputs]. `score` is R^2.

    Args:
        model: as all heads.
        modality: likewise.
        of: likewise.
        batch_size: likewise.
        alpha: strength of the L2 penalty.
    """

    def __init__(
        self, model: Model | None = None, modality: str | None = None, *, of: Of = "embedding", batch_size: int = 32,
        alpha: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__(model, modality, of=of, batch_size=batch_size)
        self.alpha = alpha

    def fit(self, raw: Any, y: Any) -> RegressionHead:
        """Embed and fit."""
        x, values = _same_length(self._read(raw), y)
        self.head_ = make_pipeline(StandardScaler(), Ridge(alpha=self.alpha)).fit(x, values.astype(float))
        return self

    def predict(self, raw: Any) -> NDArray[np.float64]:
        """Numbers, in the shape of ``y``."""
        check_is_fitted(self)
        return self.head_.predict(self._read(raw))


def one_tower(model: Model, modality: str | None) -> Tower:
    """The tower of this name or modality; without one the only one.

    Raises:
        ValueError: the model has several and none is named.
    """
    if modality is None and len(model.towers) != 1:
        raise ValueError(
            f"this model reads {', '.join(model.towers)}: say which, as modality={next(iter(model.towers))!r}"
        )
    return model.tower(modality or next(iter(model.towers)))


def pooled(tower: Tower, raw: Sequence[Any], batch_size: int) -> NDArray[np.float32]:
    """Pooled features [n, width] in eval mode, without a gradient."""
    import torch

    was_training, device = tower.training, next(tower.parameters()).device
    tower.eval()
    try:
        items = [tower.encoder.prepare(value) for value in raw]
        with torch.no_grad():
            parts = [
                tower.features(
                    {k: v.to(device) for k, v in tower.encoder.collate(items[i : i + batch_size]).items()}
                ).float().cpu()
                for i in range(0, len(items), batch_size)
            ]  # fmt: skip
    finally:
        tower.train(was_training)
    return torch.cat(parts).numpy()


def _same_length(x: NDArray[Any], y: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    labels = np.asarray(y)
    if len(labels) != len(x):
        raise ValueError(f"{len(x)} values and {len(labels)} targets")
    return x, labels


def _is_table(y: Any) -> bool:
    return isinstance(y, np.ndarray) and y.ndim == 2
