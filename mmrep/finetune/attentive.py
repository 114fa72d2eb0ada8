"""A head that reads tokens: attention pooling and a linear layer, alone or with the encoder below it."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from torch.nn import functional as F

from mmrep.config import component
from mmrep.finetune.heads import one_tower
from mmrep.model import Model
from mmrep.tower import Tower


class AttentiveHead(BaseEstimator):
    """Attention pooling over the encoder's tokens, then a linear layer; trained by AdamW.

    Where the tokens say what their mean does not (one object in a picture), this reads more than a linear head. It
    follows a one-cycle learning rate. The model that is given is never changed: end to end, a copy of its tower trains.

    Args:
        model: whose tokens are read.
        modality: tower or modality; None where the model has one tower.
        task: ``classes`` (cross-entropy, ``y`` [n] names or numbers), ``labels`` (``y`` [n, labels] of 0 and 1), or
            ``numbers`` (squared error of standardised ``y`` [n] or [n, outputs]).
        end_to_end: train the encoder too, at ``encoder_lr``.
        epochs: passes over the data.
        lr: of the head.
        encoder_lr: of the encoder.
        weight_decay: of matrices.
        batch_size: values a step.
        seed: of weights and batches.
    """

    def __init__(
        self, model: Model, modality: str | None = None, *, task: Literal["classes", "labels", "numbers"] = "classes",
        end_to_end: bool = False, epochs: int = 20, lr: float = 1e-2, encoder_lr: float = 1e-4,
        weight_decay: float = 0.01, batch_size: int = 32, seed: int = 0,
    ) -> None:  # fmt: skip
        self.model = model
        self.modality = modality
        self.task = task
        self.end_to_end = end_to_end
        self.epochs = epochs
        self.lr = lr
        self.encoder_lr = encoder_lr
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.seed = seed

    def fit(self, raw: Sequence[Any], y: Any) -> AttentiveHead:
        """Train the head, and end to end a copy of the tower.

        Raises:
            ValueError: an unknown task, or another number of targets than of values.
        """
        tower = one_tower(self.model, self.modality)
        items = [tower.encoder.prepare(value) for value in raw]
        targets = self._targets(y)
        if len(items) != len(targets):
            raise ValueError(f"{len(items)} values and {len(targets)} targets")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.tower_ = copy.deepcopy(tower) if self.end_to_end else tower
            outputs = len(self.classes_) if self.task == "classes" else targets.shape[1]
            pool = component("pools", "attention", heads=math.gcd(4, tower.encoder.width)).build(tower.encoder.width)
            self.head_ = nn.ModuleDict({"pool": pool, "linear": nn.Linear(tower.encoder.width, outputs)})
            self.head_.to(self._device)
            self._train(items, targets.to(self._device))
        return self

    def _train(self, items: list[Any], targets: Tensor) -> None:
        groups: list[dict[str, Any]] = [{"params": list(self.head_.parameters()), "lr": self.lr}]
        if self.end_to_end:
            self.tower_.encoder.requires_grad_(True)
            groups.append({"params": list(self.tower_.encoder.parameters()), "lr": self.encoder_lr})
        places = torch.randperm(len(items)).split(self.batch_size)
        optimizer = torch.optim.AdamW(groups, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, [g["lr"] for g in groups], total_steps=self.epochs * len(places)
        )
        # A frozen encoder gives the same tokens in every epoch: its batches stay together and are encoded once.
        kept = None if self.end_to_end else [self._tokens([items[i] for i in p], grad=False) for p in places]
        for _ in range(self.epochs):
            if kept is None:
                places = torch.randperm(len(items)).split(self.batch_size)
            for number in torch.randperm(len(places)).tolist():
                place = places[number]
                self.head_.train()
                encoding = kept[number] if kept is not None else self._tokens([items[i] for i in place], grad=True)
                self._loss(self._logits(encoding), targets[place.to(targets.device)]).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
        self.head_.eval()
        if self.end_to_end:
            self.tower_.eval()

    def predict(self, raw: Sequence[Any]) -> NDArray[Any]:
        """Classes [n], labels [n, labels] of 0 and 1, or numbers in the shape of ``y``."""
        logits = self._outputs(raw)
        if self.task == "classes":
            return self.classes_[logits.argmax(1).numpy()]
        if self.task == "labels":
            return (logits > 0).int().numpy()
        numbers = logits.double().numpy() * self.scale_ + self.mean_
        return numbers[:, 0] if self.flat_ else numbers

    def predict_proba(self, raw: Sequence[Any]) -> NDArray[np.float32]:
        """[n, classes] or [n, labels].

        Raises:
            ValueError: the task is about numbers.
        """
        if self.task == "numbers":
            raise ValueError("a regression has no probabilities; use predict")
        logits = self._outputs(raw)
        return (logits.softmax(1) if self.task == "classes" else logits.sigmoid()).numpy()

    def score(self, raw: Sequence[Any], y: Any) -> float:
        """Accuracy; the share of values all of whose labels are right; or R^2."""
        found, wanted = self.predict(raw), np.asarray(y)
        if self.task == "numbers":
            from sklearn.metrics import r2_score

            return float(r2_score(wanted, found))
        right = found == wanted
        return float(right.mean() if right.ndim == 1 else right.all(1).mean())

    @torch.no_grad()
    def _outputs(self, raw: Sequence[Any]) -> Tensor:
        check_is_fitted(self, "head_")
        items = [self.tower_.encoder.prepare(value) for value in raw]
        starts = range(0, len(items), self.batch_size)
        parts = [self._logits(self._tokens(items[i : i + self.batch_size], grad=False)) for i in starts]
        return torch.cat(parts).float().cpu()

    def _tokens(self, items: list[Any], *, grad: bool) -> Any:
        tower: Tower = self.tower_
        was_training = tower.training
        tower.encoder.train(grad)
        try:
            inputs = {k: v.to(self._device) for k, v in tower.encoder.collate(items).items()}
            with torch.set_grad_enabled(grad):
                return tower.encoder(inputs)
        finally:
            tower.train(was_training)

    def _logits(self, encoding: Any) -> Tensor:
        return self.head_["linear"](self.head_["pool"](encoding).float())

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.task == "classes":
            return F.cross_entropy(logits, targets)
        if self.task == "labels":
            return F.binary_cross_entropy_with_logits(logits, targets)
        return F.mse_loss(logits, targets)

    def _targets(self, y: Any) -> Tensor:
        values = np.asarray(y)
        if self.task == "classes":
            self.classes_, numbers = np.unique(values, return_inverse=True)
            return torch.as_tensor(numbers)
        if self.task == "labels":
            return torch.as_tensor(values.astype(np.float32))
        if self.task != "numbers":
            raise ValueError(f"task is 'classes', 'labels' or 'numbers', got {self.task!r}")
        self.flat_ = values.ndim == 1
        table = values.astype(float).reshape(len(values), -1)
        self.mean_, self.scale_ = table.mean(0), np.maximum(table.std(0), 1e-12)
        return torch.as_tensor((table - self.mean_) / self.scale_).float()

    @property
    def _device(self) -> torch.device:
        return self.model.device
