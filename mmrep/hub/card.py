"""The model card (README.md) of a saved model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

if TYPE_CHECKING:
    from mmrep.model import Model


def model_card(model: Model, *, results: str = "", data: str = "", recipe: str = "") -> ModelCard:
    """Write the card: what the model embeds, how to use it, how it was made.

    Args:
        model: the model.
        results: a Markdown table of what was measured, if anything was.
        data: what it was trained on, in words.
        recipe: the command that made it.
    """
    metadata = ModelCardData(
        library_name="mmrep", pipeline_tag="feature-extraction", tags=["mmrep", "multimodal", *model.modalities]
    )
    from mmrep.model import parameter_counts

    counts = parameter_counts(model)
    rows = [
        f"| {name} | {model.tower(name).modality} | {tower.encoder.type} | {tower.pool.type} | "
        f"{counts[name][0] / 1e6:.2f} M ({counts[name][1] / 1e6:.2f} M trained) |"
        for name, tower in model.config.towers.items()
    ]
    first = next(iter(model.config.towers))
    text: list[Any] = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# Embeddings of {', '.join(model.modalities)} in one space of {model.dim} dimensions",
        "| tower | modality | encoder | pool | parameters |\n|---|---|---|---|---|\n" + "\n".join(rows),
        f'```python\nimport mmrep\n\nmodel = mmrep.load("path/to/this/folder")\n'
        f'vectors = model.encode([...], modality="{first}")\n```',
        f"## Data\n\n{data}" if data else "",
        f"## Results\n\n{results}" if results else "",
        f"## Made by\n\n```\n{recipe}\n```" if recipe else "",
    ]
    return ModelCard("\n\n".join(part for part in text if part) + "\n")
