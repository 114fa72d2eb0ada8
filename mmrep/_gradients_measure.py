"""One global batch of a recipe, as one process computes its gradient and as several do, in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmrep._gradients_table import Measured
from mmrep.config import ConfigError
from mmrep.data.batch import Batch
from mmrep.data.reader import Item, Reader
from mmrep.data.source import Source
from mmrep.embed.memo import Memo
from mmrep.objectives.root import Root
from mmrep.run import Run
from mmrep.training.cached import forward_backward
from mmrep.training.collectives import world
from mmrep.training.optim import build_optimizer
from mmrep.views.view import View

_SHORT = (torch.float32, torch.bfloat16, torch.float16)
_SHORTEN = (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16)


class Subject:
    """A recipe's root and one batch of its training data.

    Args:
        run: the recipe; nothing is trained.
        processes: how many share the batch.
        samples: of the global batch; cut to a multiple of ``processes``.

    Attributes:
        batch_norms: names of the layers that standardise by the statistics of the batch, as they are trained.
        quiet: names of the layers of dropout and the like, which are off.
        micro_batch: samples that each of several processes computes at a time; None = all.
        skipped: samples that could not be read.
        dtype: float64, or float32 if a tower cannot compute in that.
    """

    def __init__(self, run: Run, *, processes: int, samples: int) -> None:
        recipe = run.recipe
        views: dict[str, list[View | None]] = {f: [v.build() for v in vs] for f, vs in recipe.data.views.items()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.train.seed)  # objectives with parameters of their own start alike everywhere
            self.root = Root(
                run.untrained(), recipe.objectives, fields=recipe.data.fields, views=views, teacher=recipe.teacher
            )  # fmt: skip
        self.root.fit(run.samples)
        # No field is memoised: a frozen tower computes its features anew, which are the same.
        self._reader = Reader(
            self.root.encoders(), views=views, seed=recipe.train.seed, group=run.train_source.has_group,
            columns=self.root.columns(),
        )  # fmt: skip
        self.items, self.skipped = _read(run.train_source, self._reader, samples, recipe.train.seed)
        self.items = self.items[: len(self.items) // processes * processes]
        if len(self.items) < 3 * processes:
            raise ConfigError([f"data.train has {len(self.items)} readable samples, and {processes} processes need "
                               f"{3 * processes} to share them unequally"])  # fmt: skip
        self.processes = processes
        # Parts, if the recipe trains in parts: small enough that there are several here too.
        micro = recipe.train.micro_batch
        self.micro_batch = None if micro is None else max(2, min(micro, len(self.items) // (2 * processes)))
        self.optim = recipe.optim
        self.root.train()
        norms = {name: m for name, m in self.root.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
        self.batch_norms = [name for name, module in norms.items() if module.training]
        self.quiet = [n for n, m in self.root.named_modules() if "Drop" in type(m).__name__ and getattr(m, "p", 1)]
        self.dtype = torch.float64
        try:
            with in_double():
                self.root.double()
                for tower in self.root.model.towers.values():
                    self._example(tower)
        except (RuntimeError, TypeError, NotImplementedError):
            self.dtype = torch.float32
            self.root.float()
        self._buffers = {name: buffer.clone() for name, buffer in self.root.named_buffers()}

    @staticmethod
    def _example(tower: Any) -> None:
        encoder = tower.eval().encoder
        inputs = encoder.collate([encoder.prepare(raw) for raw in encoder.examples(2, seed=0)])
        tower(_cast(inputs, torch.float64)).sum().backward()
        tower.zero_grad(set_to_none=True)

    def shares(self, *, even: bool) -> list[int]:
        """Samples of each process; unequal, but enough for the statistics of a batch."""
        weights = [1 if even else self.processes + rank for rank in range(self.processes)]
        edges = [round(len(self.items) * w / sum(weights)) for w in accumulate(weights, initial=0)]
        return [stop - start for start, stop in pairwise(edges)]

    def many(self, engine: Accelerator) -> dict[str, Measured]:
        """Every pass on this process of several; all of them call it together, once."""
        ranks = world()
        if str(engine.distributed_type).rpartition(".")[2] in ("DEEPSPEED", "MEGATRON_LM"):
            raise ConfigError([f"check gradients compares DDP and FSDP2, not {engine.distributed_type}"])
        with self._precision():  # a temperature would go back to float32 whenever it is moved
            self.root.to(engine.device)
            self.reference = copy.deepcopy(self.root) if ranks.rank == 0 else None
            parallel, _ = engine.prepare(self.root, build_optimizer(self.root, self.optim))
        self.wrapper = type(parallel).__name__
        found: dict[str, Measured] = {}
        for name, even, live in self._passes():
            sizes = self.shares(even=even)
            start = sum(sizes[: ranks.rank])
            mine = self.items[start : start + sizes[ranks.rank]]
            batch = self._floats(self._reader.collate(mine, self.micro_batch).to(engine.device))
            with self._prepared(self.root, live):
                report = forward_backward(parallel, engine, batch)
            # The losses' convention is the mean over ranks, and DDP and FSDP have taken it of the gradients.
            losses = {k: ranks.sum(v.detach().double().reshape(())) / ranks.size for k, v in report.items()}
            found[name] = _measured(losses, self.root)
            if ranks.sum(torch.tensor([len(found[name].missing)], device=engine.device)):
                break  # DDP would refuse the next forward pass
        return found

    def one(self) -> dict[str, Measured]:
        """The same passes on one process with the whole batch, of what `many` kept before it was wrapped."""
        root = self.reference
        assert root is not None, "on the first process, after `many`"
        root.memo = Memo()
        batch = self._floats(self._reader.collate(self.items).to(root.model.device))
        found: dict[str, Measured] = {}
        for name, even, live in self._passes():
            if even:
                continue  # it is the same batch
            with self._prepared(root, live):
                report = root(batch)
                report["loss"].backward()
            found[name] = _measured({k: v.detach().double().reshape(()) for k, v in report.items()}, root)
        return found

    def _passes(self) -> list[tuple[str, bool, bool]]:
        """Name, equal shards?, batch statistics?"""
        frozen = [("frozen", False, False)] if self.batch_norms else []
        return [("trained", False, True), *frozen, ("even", True, False)]

    @contextmanager
    def _prepared(self, root: Root, live: bool) -> Iterator[None]:
        """Towers in eval mode but for batch norms, if ``live``; no gradient; the buffers of the start."""
        root.train()
        root.model.eval()
        modules = dict(root.named_modules())
        for name in self.quiet:
            modules[name].eval()
        for name in self.batch_norms:
            modules[name].training = live
        root.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, buffer in root.named_buffers():
                buffer.copy_(self._buffers[name])
        with self._precision():
            yield

    def _precision(self) -> AbstractContextManager[None]:
        return in_double() if self.dtype is torch.float64 else nullcontext()

    def _floats(self, batch: Batch) -> Batch:
        inputs = {f: [_cast(v, self.dtype) for v in vs] for f, vs in batch.inputs.items()}
        return replace(batch, inputs=inputs, parts=[self._floats(part) for part in batch.parts])


class _Double(TorchFunctionMode):
    """Computes in float64 what asks for less: losses and heads cast to float32 on purpose, which would hide a bug."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _SHORTEN:
            return args[0].double()
        args, kwargs = tuple(map(_no_short, args)), {k: _no_short(v) for k, v in (kwargs or {}).items()}
        try:
            return func(*args, **kwargs)
        except RuntimeError:
            if not any(isinstance(a, Tensor) and a.dtype in _SHORT for a in (*args, *kwargs.values())):
                raise
            return func(*map(_lengthened, args), **{k: _lengthened(v) for k, v in kwargs.items()})  # a constant


@contextmanager
def in_double() -> Iterator[None]:
    """Everything inside is computed in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Double():
            yield
    finally:
        torch.set_default_dtype(before)


def _no_short(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _SHORT else value


def _lengthened(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.dtype in _SHORT else value


def _cast(inputs: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def _read(source: Source, reader: Reader, samples: int, seed: int) -> tuple[Sequence[Item], int]:
    """The first readable samples of a shuffled epoch, and how many were not readable."""
    if source.streaming:
        records = source.stream(0, 1, seed)
    else:
        order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed)).tolist()
        records = (source.record(index) for index in order)
    good: list[Item] = []
    skipped = 0
    for record in records:
        item = reader.read(record, 0)
        if isinstance(item, Item):
            good.append(item)
        else:
            skipped += 1
        if len(good) == samples:
            break
    return good, skipped


def _measured(losses: dict[str, Tensor], root: nn.Module) -> Measured:
    gradients: dict[str, Tensor | None] = {}
    for name, parameter in root.named_parameters():
        if parameter.requires_grad:
            grad: Any = parameter.grad
            whole = grad.full_tensor() if hasattr(grad, "full_tensor") else grad  # of FSDP2's shards
            gradients[name.replace("_orig_mod.", "")] = None if whole is None else whole.detach().cpu().clone()
    return Measured({name: value.cpu() for name, value in losses.items()}, gradients)
