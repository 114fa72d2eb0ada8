"""One batch, seen lazily by the objectives: everything asked twice is computed once."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mmrep.data.batch import Batch
from mmrep.data.sample import stable_hash
from mmrep.embed.memo import Memo
from mmrep.model import Model, Tower
from mmrep.registry import UnknownNameError, near
from mmrep.schedules import Clock
from mmrep.teacher import Teacher
from mmrep.tokens import Content, Encoding, Inputs, Tokens
from mmrep.views.view import Params, View
from mmrep.world import World

FieldViews = Mapping[str, Sequence[View | None]]


class Step:
    """One batch in one forward pass.

    Args:
        model: the towers.
        batch: the batch, on the model's device.
        fields: tower name by field.
        views: per field, its views; a field without an entry has one deterministic reading.
        world: the processes that share the batch; losses gather through it.
        memo: features of frozen towers, kept by content.
        teacher: averages of the modules that some objective asked for; None = none did.
        clock: where the run is.
        guests: towers by field that belong to an objective and not to the model; see `Objective.guests`.
        attended: fields whose encoding is to have what tokens attended to; see `Objective.attended`.
    """

    def __init__(
        self,
        model: Model,
        batch: Batch,
        *,
        fields: Mapping[str, str],
        views: FieldViews,
        world: World,
        memo: Memo,
        teacher: Teacher | None = None,
        clock: Clock | None = None,
        guests: Mapping[str, Tower] | None = None,
        attended: Collection[str] = (),
    ) -> None:
        self.model = model
        self.batch = batch
        self.world = world
        self._fields = fields
        self._views = views
        self._memo = memo
        self._teacher = teacher
        self._guests = guests or {}
        self._attended = attended
        self.clock = clock or Clock()
        self._tokens: dict[tuple[str, int], Tokens] = {}
        self._contents: dict[tuple[str, int], Content] = {}
        self._taught: dict[tuple[str, int, tuple[int, ...]], Encoding] = {}
        self._taught_embeddings: dict[tuple[str, int], Tensor] = {}
        self._pooled: dict[tuple[str, int], Tensor] = {}
        self._taught_pooled: dict[tuple[str, int], Tensor] = {}
        self._inputs: dict[tuple[str, int], tuple[Inputs, Params]] = {}
        self._embeddings: dict[tuple[str, int], Tensor] = {}
        self._encodings: dict[tuple[str, int], Encoding] = {}
        self._fused: dict[str, Tensor] = {}

    @property
    def ids(self) -> list[str]:
        """Sample ids."""
        return self.batch.ids

    @property
    def labels(self) -> list[int | str | None]:
        """Sample labels."""
        return self.batch.labels

    @property
    def group(self) -> Tensor | None:
        """int64 [B]; equal for samples that are positives of each other."""
        return self.batch.group

    def tower(self, field: str) -> Tower:
        """The tower that reads ``field``."""
        if field in self._guests:
            return self._guests[field]
        if field not in self._fields:
            raise UnknownNameError(
                f"unknown field {field!r}{near(field, self._fields)} Known: {', '.join(self._fields)}"
            )
        return self.model.tower(self._fields[field])

    def present(self, field: str) -> Tensor:
        """Bool [B]: which samples have this field, or some member of this fusion."""
        if field in self.model.fusions:
            members = [self.present(member) for member in self.model.config.fusions[field].of]
            return torch.stack(members).any(0)
        self.tower(field)
        known = self.batch.present.get(field)
        return torch.zeros(len(self.batch), dtype=torch.bool, device=self.model.device) if known is None else known

    def has(self, field: str) -> bool:
        """Whether some sample of this process has the field."""
        return field in self.batch.inputs

    @property
    def teacher(self) -> Teacher:
        """The teacher of all modules that objectives named in ``taught()``."""
        assert self._teacher is not None, "an objective that reads the teacher names what it reads in taught()"
        return self._teacher

    def inputs(self, field: str, view: int = 0) -> Inputs:
        """The collated inputs of the samples that have the field, after the view's transform on the device."""
        return self._viewed(field, view)[0]

    def params(self, field: str, view: int = 0) -> Params:
        """The parameters of the transform that made the view; rows are the samples that have the field.

        They are those that the view drew sample by sample (``View.parameters``) and those of ``View.batch``.
        """
        return self._viewed(field, view)[1]

    def tokens(self, field: str, view: int = 0) -> Tokens:
        """Tokens before the encoder's layers, of the samples that have the field (rows where `present` is True)."""
        key = (field, view)
        if key not in self._tokens:
            self._tokens[key] = self.tower(field).encoder.tokenize(self.inputs(field, view))
        return self._tokens[key]

    def content(self, field: str, view: int = 0) -> Content:
        """What each of these tokens was made from."""
        key = (field, view)
        if key not in self._contents:
            self._contents[key] = self.tower(field).encoder.content(self.inputs(field, view))
        return self._contents[key]

    def encoding(self, field: str, view: int = 0) -> Encoding:
        """Tokens after the encoder's layers, of the samples that have the field (rows where `present` is True)."""
        key = (field, view)
        if key not in self._encodings:
            tower = self.tower(field)
            if field in self._attended:
                self._encodings[key] = tower.finish(tower.encoder.attended(self.tokens(field, view)))
            elif key in self._tokens:
                self._encodings[key] = tower.finish(tower.encoder.encode(self._tokens[key]))
            else:
                self._encodings[key] = tower.encoding(self.inputs(field, view))
        return self._encodings[key]

    def attention(self, field: str, view: int = 0) -> Tensor:
        """What tokens attended to in the pass that gave `encoding` and `embedding`: see `Encoder.attended`.

        An objective that asks for it names the field in `Objective.attended`.
        """
        return self.encoding(field, view).extra["attention"]

    @torch.no_grad()
    def taught(self, field: str, view: int = 0, layers: tuple[int, ...] = ()) -> Encoding:
        """The teacher's `encoding` of the whole field, without gradient; ``layers`` as in `Encoder.encode`."""
        key = (field, view, layers)
        if key not in self._taught:
            encoder = self.teacher.of(self.tower(field).encoder)
            self._taught[key] = encoder.encode(encoder.tokenize(self.inputs(field, view)), None, layers)
        return self._taught[key]

    @torch.no_grad()
    def taught_embedding(self, field: str, view: int = 0) -> Tensor:
        """The teacher's `embedding`, without gradient; rows of samples without the field are zero."""
        key = (field, view)
        if key not in self._taught_embeddings:
            tower, rows = self.tower(field), self.present(field).nonzero()[:, 0]
            if self.has(field):
                twin = self.teacher.of(tower)
                found = twin.project(twin.pool(self.taught(field, view)))
            else:
                found = torch.zeros(0, tower.dim, dtype=_dtype(tower), device=self.model.device)
            out = found.new_zeros(len(self.batch), tower.dim)
            self._taught_embeddings[key] = out.index_copy(0, rows, found)
        return self._taught_embeddings[key]

    @torch.no_grad()
    def taught_pooled(self, field: str, view: int = 0) -> Tensor:
        """The teacher's `pooled`, without gradient."""
        key = (field, view)
        if key not in self._taught_pooled:
            tower, pool = self.tower(field), self.tower(field).pool
            if self.has(field):
                found = self.teacher.of(pool)(self.taught(field, view))
            else:
                found = torch.zeros(0, pool.width, dtype=_dtype(tower), device=self.model.device)
            self._taught_pooled[key] = self._spread(field, found, pool.width)
        return self._taught_pooled[key]

    def pooled(self, field: str, view: int = 0) -> Tensor:
        """Pooled encodings [B, width], which a projector or a head would read; rows without the field are zero.

        Where no sample has the field, the zeros depend on the encoder and the pool as those of `embedding` do. An
        objective that asks for it names the field in `Objective.pooled`.
        """
        key = (field, view)
        if key not in self._pooled:
            tower = self.tower(field)
            if self.has(field):
                found = tower.pool(self.encoding(field, view))
            else:
                nothing = idle(tower.encoder) + idle(tower.pool)
                found = torch.zeros(0, tower.pool.width, device=self.model.device, dtype=_dtype(tower)) + nothing
            self._pooled[key] = self._spread(field, found, tower.pool.width)
        return self._pooled[key]

    def _spread(self, field: str, found: Tensor, width: int) -> Tensor:
        """Rows of the samples that have the field to rows of all samples."""
        if len(found) == len(self.batch):
            return found
        rows = self.present(field).nonzero()[:, 0]
        return found.new_zeros(len(self.batch), width).index_copy(0, rows, found)

    def embedding(self, field: str, view: int = 0) -> Tensor:
        """Embeddings float32 [B, dim] of a field or of a fusion; rows of samples without the field are zero.

        Where no sample has the field, the zeros still depend on every trainable parameter of the tower (with zero
        gradient), so that all processes reduce the same parameters.
        """
        if field in self.model.fusions:
            return self._fuse(field)
        key = (field, view)
        if key not in self._embeddings:
            self._embeddings[key] = self._embed(field, view)
        return self._embeddings[key]

    @torch.no_grad()
    def embedding_by(self, twin: Tower, field: str, view: int = 0) -> Tensor:
        """What a twin of the field's tower makes of the same inputs, without gradient: [B, dim]; absent rows are zero.

        Args:
            twin: a copy of the tower; where the tower is frozen it has the same encoder and pool, whose features are
                kept.
            field: of the batch.
            view: which reading.
        """
        if field in self.batch.items:
            found = twin.project(self.features(field)[self.present(field)].to(_dtype(twin)))
        elif field in self.batch.inputs:
            found = twin(self.inputs(field, view))
        else:
            found = torch.zeros(0, twin.dim, dtype=_dtype(twin), device=self.model.device)
        return self._spread(field, found, twin.dim)

    def _fuse(self, name: str) -> Tensor:
        """The embedding of a fusion. All its weights are in the graph, also where nothing is present: fusions mask."""
        if name not in self._fused:
            members = self.model.config.fusions[name].of
            embeddings = {member: self.embedding(member) for member in members}
            self._fused[name] = self.model.fuse(name, embeddings, {m: self.present(m) for m in members})
        return self._fused[name]

    def computed(self) -> dict[str, Tensor]:
        """What a collapse would show in, detached, present rows only.

        The embeddings asked for so far, by field (``field.view`` past the first); pooled features, with ``/pooled``;
        and the mean token of what the teacher encoded, with ``/teacher``: targets all alike are easy to predict.
        """
        found = {
            _named(*key): embedding.detach()[self.present(key[0])]
            for key, embedding in self._embeddings.items() if key[0] not in self._guests
        }  # fmt: skip
        for key, features in self._pooled.items():
            found[f"{_named(*key)}/pooled"] = features.detach()[self.present(key[0])]
        for (field, view, _), encoding in self._taught.items():
            grid = encoding.tokens.grid
            weight = (grid.valid & ~grid.special).to(encoding.tokens.values.dtype)[..., None]
            mean = (encoding.tokens.values * weight).sum(1) / weight.sum(1).clamp_min(1)
            found[f"{_named(field, view)}/teacher"] = mean
        return found

    def features(self, field: str) -> Tensor:
        """Pooled features of a frozen tower, float32 [B, width], without gradient; absent rows are zero."""
        tower, rows = self.tower(field), self.present(field).nonzero()[:, 0]
        if field in self.batch.items:
            found = self._memo.features(tower, self.batch.keys[field], self.batch.items[field], self.model.device)
        elif field in self.batch.inputs:
            with torch.no_grad():
                found = tower.features(self.inputs(field)).float()
        else:
            found = torch.zeros(0, tower.pool.width, device=self.model.device)
        return found.new_zeros(len(self.batch), found.shape[1]).index_copy(0, rows, found)

    def _embed(self, field: str, view: int) -> Tensor:
        tower, present = self.tower(field), self.present(field)
        if field in self.batch.items:
            features = self._memo.features(tower, self.batch.keys[field], self.batch.items[field], self.model.device)
            found = tower.project(features.to(_dtype(tower)))
        elif field in self.batch.inputs:
            if (field, view) in self._encodings:
                found = tower.project(tower.pool(self._encodings[field, view]))
            elif (field, view) in self._tokens or field in self._attended:
                found = tower.project(tower.pool(self.encoding(field, view)))
            else:
                found = tower(self.inputs(field, view))
        else:
            nothing = torch.zeros(len(self.batch), tower.dim, dtype=_dtype(tower), device=self.model.device)
            return nothing + (_idle_sharded(tower) if _is_sharded(tower) else idle(tower))
        if len(found) == len(self.batch):
            return found
        rows = present.nonzero()[:, 0]
        return found.new_zeros(len(self.batch), tower.dim).index_copy(0, rows, found)

    def _viewed(self, field: str, view: int) -> tuple[Inputs, Params]:
        key = (field, view)
        if key not in self._inputs:
            collated = self.batch.inputs[field][view]
            views = self._views.get(field, ())
            chosen = views[view] if view < len(views) else None
            params = self.batch.params[field][view] if field in self.batch.params else {}
            if chosen is not None:
                number = view if chosen.follows is None else chosen.follows
                seeds = self.batch.seeds[self.present(field)] + stable_hash(field, number)
                collated, more = chosen.batch(collated, seeds)
                params = {**params, **more}
            self._inputs[key] = collated, params
        return self._inputs[key]


def _named(field: str, view: int) -> str:
    return field if view == 0 else f"{field}.{view}"


def idle(module: nn.Module) -> Tensor:
    """Zero, with a zero gradient for every trainable parameter, so that all processes reduce the same parameters.

    Sharded parameters are left out: outside of the forward pass of their module they are not whole.
    """
    parameters = list(module.parameters())
    trained = [p for p in parameters if p.requires_grad and not isinstance(p, DTensor)]
    device = parameters[0].device if parameters else torch.device("cpu")
    return torch.zeros((), device=device) + sum(p.float().sum() * 0 for p in trained)


def _dtype(tower: Tower) -> torch.dtype:
    """That of embeddings: a model of doubles stays one."""
    return torch.float64 if next(tower.parameters()).dtype == torch.float64 else torch.float32


def _is_sharded(module: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in module.parameters())


def _idle_sharded(tower: Tower) -> Tensor:
    """`idle` under FSDP, where every process must run the forward passes of the same modules: on an example."""
    was_training = tower.training
    tower.eval()  # no statistics are taken from it, and no random numbers
    try:
        example = tower.encoder.collate([tower.encoder.prepare(tower.encoder.examples(1, 0)[0])])
        device = next(tower.parameters()).device
        return tower({name: value.to(device) for name, value in example.items()}).sum() * 0
    finally:
        tower.train(was_training)
