"""Named towers in one space, their temperatures, and what a user does with them: encode, compare, save."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import torch
from huggingface_hub import ModelCard, ModelHubMixin
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mmrep.config import Component, ConfigError, Of, component, config
from mmrep.encoder import Encoder
from mmrep.finetune.adapter import Adapter
from mmrep.fusions import Fusion
from mmrep.registry import UnknownNameError, near
from mmrep.temperature import Temperature, TemperatureConfig
from mmrep.tower import Tower, TowerConfig

if TYPE_CHECKING:
    from mmrep.embed.encode import Embeddings, Raw


@config
class FusionConfig:
    """One embedding of several members, of whatever is present of a sample.

    of: tower by member; in training a member is the field of that name. by: how they are fused.
    """

    of: Annotated[dict[str, str], Field(min_length=1)]
    by: Annotated[Component, Of("fusions")] = field(default_factory=lambda: component("fusions", "mean"))


@config
class ModelConfig:
    """dim: size of the common space. towers: by name; the name is usually the modality.

    normalize: embeddings have unit length. temperatures: by name; objectives refer to them. fusions: by name; in
    objectives and evaluations such a name stands where a field does. reductions: smaller dimensions in which embeddings
    of this space can be had, each by a linear map of its own, see `Model.reduce`; `distill` trains them.
    """

    dim: Annotated[int, Field(ge=1)]
    towers: dict[str, TowerConfig]
    normalize: bool = True
    temperatures: dict[str, TemperatureConfig] = field(default_factory=lambda: {"default": TemperatureConfig()})
    fusions: dict[str, FusionConfig] = field(default_factory=dict[str, FusionConfig])
    reductions: tuple[Annotated[int, Field(ge=1)], ...] = ()

    def __post_init__(self) -> None:
        if not self.towers:
            raise ValueError("a model needs at least one tower")
        modalities = [getattr(tower.encoder.cls, "modality", None) for tower in self.towers.values()]
        problems = [f"model.fusions.{name}: a tower has this name" for name in self.fusions if name in self.towers]
        problems += [
            f"model.reductions: {width} is not smaller than the space, which has {self.dim} dimensions"
            for width in self.reductions if width >= self.dim
        ]  # fmt: skip
        if len(set(self.reductions)) < len(self.reductions):
            problems.append(f"model.reductions: {list(self.reductions)} names one twice")
        for name, fusion in self.fusions.items():
            for member, tower in fusion.of.items():
                if tower not in self.towers and modalities.count(tower) != 1:
                    hint = near(tower, self.towers)
                    problems.append(
                        f"model.fusions.{name}.of.{member}: no tower {tower!r}{hint} Towers: {', '.join(self.towers)}"
                    )
        if problems:
            raise ConfigError(problems)


class Model(nn.Module, ModelHubMixin, library_name="mmrep", tags=["mmrep", "feature-extraction"]):
    """Named towers in one space.

    Args:
        config: towers, dimension, temperatures.
        files: per tower, the folder of what its encoder saved or learned (a tokenizer). An encoder that is given one
            builds from it alone and fetches no pretrained weights: they come from the saved state.

    Attributes:
        began: names in the state whose values are those of the saved model that a recipe starts from; None = no start.
    """

    began: frozenset[str] | None = None

    def __init__(self, config: ModelConfig, *, files: Mapping[str, Path] | None = None) -> None:
        super().__init__()
        self.config = config
        towers: dict[str, Tower] = {}
        others: list[tuple[Adapter, Encoder]] = []
        for name, tower in config.towers.items():
            try:
                towers[name] = Tower(tower, config.dim, normalize=config.normalize, files=(files or {}).get(name))
                if (adapter := towers[name].adapter) is not None:
                    adapter.tie(towers[name].encoder, others)
                    others.append((adapter, towers[name].encoder))
            except ConfigError:
                raise
            except ValueError as error:
                raise ConfigError([f"model.towers.{name}: {error}"]) from error
        self.towers = nn.ModuleDict(towers)
        self.temperatures = nn.ModuleDict({n: Temperature(t) for n, t in config.temperatures.items()})
        fusions: dict[str, Fusion] = {}
        for name, fusion in config.fusions.items():
            try:
                fusions[name] = fusion.by.build(config.dim, tuple(fusion.of))
            except ValueError as error:
                raise ConfigError([f"model.fusions.{name}: {error}"]) from error
        self.fusions = nn.ModuleDict(fusions)
        self.reductions = nn.ModuleDict({str(width): _prefix(config.dim, width) for width in config.reductions})

    @property
    def dim(self) -> int:
        """Size of the common space."""
        return self.config.dim

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def modalities(self) -> list[str]:
        """The modalities of the towers, each once."""
        return list(dict.fromkeys(self.tower(name).modality for name in self.config.towers))

    def supports(self, modality: str) -> bool:
        """Whether some tower reads this modality (or has this name)."""
        return modality in self.modalities or modality in self.config.towers

    def tower(self, name: str) -> Tower:
        """The tower with this name, or the only tower of this modality.

        Raises:
            UnknownNameError: there is none, or several towers share the modality.
        """
        if name in self.towers:
            return cast(Tower, self.towers[name])
        same = [n for n, t in self.towers.items() if cast(Tower, t).modality == name]
        if len(same) == 1:
            return cast(Tower, self.towers[same[0]])
        if same:
            raise UnknownNameError(f"towers {', '.join(same)} all read {name!r}: name the tower instead")
        raise UnknownNameError(
            f"this model has no tower or modality {name!r}{near(name, self.towers)} It has: {', '.join(self.towers)}"
        )

    def temperature(self, name: str) -> Temperature:
        """The temperature called ``name``.

        Raises:
            UnknownNameError: there is none.
        """
        if name not in self.temperatures:
            raise UnknownNameError(
                f"this model has no temperature {name!r}{near(name, self.temperatures)} "
                f"It has: {', '.join(self.temperatures) or 'none'}"
            )
        return cast(Temperature, self.temperatures[name])

    def fuse(self, name: str, embeddings: Mapping[str, Tensor], present: Mapping[str, Tensor] | None = None) -> Tensor:
        """One embedding a sample by the fusion called ``name``.

        Args:
            name: of one of ``config.fusions``.
            embeddings: by member, [B, dim]; a member that is left out is present nowhere.
            present: by member, bool [B]; None = everywhere.

        Returns:
            [B, dim], of unit length if the model normalises; zeros where nothing is present.

        Raises:
            UnknownNameError: no such fusion.
            ValueError: a name that is no member, or none at all.
        """
        if name not in self.fusions:
            known = ", ".join(self.fusions) or "none"
            raise UnknownNameError(f"this model has no fusion {name!r}{near(name, self.fusions)} It has: {known}")
        fusion = cast(Fusion, self.fusions[name])
        for member in embeddings:
            if member not in fusion.members:
                members = ", ".join(fusion.members)
                hint = near(member, fusion.members)
                raise ValueError(f"fusion {name!r} has no member {member!r}{hint} It has: {members}")
        if not embeddings:
            raise ValueError(f"fusion {name!r} needs the embeddings of one of {', '.join(fusion.members)} at least")
        some = next(iter(embeddings.values()))
        nothing, everywhere = torch.zeros_like(some), torch.ones(len(some), dtype=torch.bool, device=some.device)
        values = torch.stack([embeddings.get(member, nothing) for member in fusion.members], 1)
        given = {member: everywhere if present is None else present[member] for member in embeddings}
        out = fusion(values, torch.stack([given.get(member, ~everywhere) for member in fusion.members], 1))
        out = out if out.dtype == torch.float64 else out.float()
        return F.normalize(out, dim=-1) if self.config.normalize else out

    def reduce(self, embeddings: Tensor, width: int, *, normalize: bool | None = None) -> Tensor:
        """Embeddings of the common space, of whatever tower or fusion, in fewer dimensions.

        By the linear map that ``config.reductions`` has for this width (Stella, Zhang et al. 2024, arXiv:2412.19048);
        where it has none, the first dimensions (Matryoshka, Kusupati et al. 2022, arXiv:2205.13147). One map serves all
        modalities, so that what is reduced by it can be compared.

        Args:
            embeddings: [..., dim].
            width: at least 1, at most dim.
            normalize: to unit length; None = as the model does.

        Returns:
            [..., width], float32 or as wide as ``embeddings``.

        Raises:
            ValueError: no such width.
        """
        if not 1 <= width <= self.dim:
            raise ValueError(f"a width is between 1 and the model's {self.dim}; got {width}")
        if width == self.dim:
            return embeddings
        reduced = embeddings[..., :width]
        if str(width) in self.reductions:
            weight = cast(nn.Linear, self.reductions[str(width)]).weight
            reduced = F.linear(embeddings, weight.to(embeddings.dtype))
        reduced = reduced if reduced.dtype == torch.float64 else reduced.float()
        normalize = self.config.normalize if normalize is None else normalize
        return F.normalize(reduced, dim=-1) if normalize else reduced

    def encode(self, inputs: Raw, modality: str | None = None, **options: Any) -> Embeddings:
        """Embed raw values. See `mmrep.embed.encode.encode` for every option; the names are sentence-transformers'.

        Args:
            inputs: one raw value, a list of them, or ``{"image": [...], "text": [...]}``.
            modality: tower name or modality of a value or list. May be left out only if the model has one tower.
            **options: ``prompt_name, prompt, batch_size, show_progress_bar, normalize_embeddings, precision,
                truncate_dim, device, convert_to_tensor``. And ``fusion``, the name of one of the model's: the lists of
                a dict are then the members of whole samples, None where one is missing, see
                `mmrep.embed.fused.encode_fused`.

        Returns:
            numpy float32 [n, dim] in the caller's order; [dim] for one value; a dict for a dict, but one array of
            fused embeddings for a ``fusion``.
        """
        if options.get("fusion") is not None:
            from mmrep.embed.fused import encode_fused

            return encode_fused(self, inputs, **options)
        from mmrep.embed.encode import encode

        options.pop("fusion", None)
        return encode(self, inputs, modality, **options)

    def encode_query(self, inputs: Raw, modality: str | None = None, **options: Any) -> Embeddings:
        """`encode` with the prompt called ``query``, where the encoder has one."""
        return self.encode(inputs, modality, **{"prompt_name": ("query",), **options})

    def encode_document(self, inputs: Raw, modality: str | None = None, **options: Any) -> Embeddings:
        """`encode` with the prompt called ``document``, ``passage`` or ``corpus``, the first that the encoder has."""
        return self.encode(inputs, modality, **{"prompt_name": ("document", "passage", "corpus"), **options})

    def similarity(self, a: Any, b: Any) -> Tensor:
        """Cosine similarity of embeddings [n, dim] and [m, dim] (arrays or tensors): float32 tensor [n, m]."""
        rows, columns = (F.normalize(torch.atleast_2d(torch.as_tensor(x).float()), dim=-1) for x in (a, b))
        return rows @ columns.T

    def merged(self) -> Model:
        """An equal model without adapters: see `mmrep.finetune.adapter.merged`."""
        from mmrep.finetune.adapter import merged

        return merged(self)

    def clamp_temperatures(self) -> None:
        """Apply every temperature's bounds; the trainer calls it after each optimizer step."""
        for name in self.temperatures:
            self.temperature(name).clamp_()

    def _save_pretrained(self, save_directory: Path) -> None:
        from mmrep.hub.folder import write

        write(self, save_directory)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Model:  # type: ignore[override]
        """Load a saved model from a folder or from the Hugging Face hub.

        Args:
            pretrained_model_name_or_path: a folder, or a hub id.
            **options: ``revision, token, cache_dir, force_download, local_files_only`` (as huggingface_hub's),
                ``device``, and ``check_fingerprint=False`` to load in spite of a mismatch.
        """
        from mmrep.hub.folder import load

        return load(pretrained_model_name_or_path, **options)

    def export(self, target: str, folder: str | Path, *, tower: str | None = None, base: str | None = None) -> Path:
        """Write the model in the layout of another library.

        Args:
            target: ``hf`` (transformers), ``sentence-transformers``, ``open_clip``, ``onnx``, or ``peft``: an adapter
                alone, without the model that it is in.
            folder: absent or empty.
            tower: the only one to write; None = all, where the target has room for them.
            base: for ``peft``, the model that the adapter is for, a folder or a hub id; None = the tower's own path.

        Returns:
            The folder.

        Raises:
            ExportError: the target cannot express this model; the message names the part.
        """
        from mmrep.hub.exports.export import export

        return export(self, target, folder, tower=tower, base=base)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The README.md of a saved model."""
        from mmrep.hub.card import model_card

        return model_card(self, **kwargs)


def _prefix(dim: int, width: int) -> nn.Linear:
    """A map that begins as the first dimensions; it draws no random numbers."""
    made = nn.Linear(dim, width, bias=False, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        made.weight.copy_(torch.eye(width, dim))
    return made


def parameter_counts(model: Model) -> Mapping[str, tuple[int, int]]:
    """Per tower: (all parameters, trainable parameters)."""
    return {
        name: (sum(p.numel() for p in t.parameters()), sum(p.numel() for p in t.parameters() if p.requires_grad))
        for name, t in model.towers.items()
    }
