"""Hugging Face vision models: ViT, DINOv2 and 3, Swin, ConvNeXt, and the vision part of CLIP, SigLIP and their like.

In a recipe::

    encoder: {type: hf-image, path: facebook/dinov2-small}
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from PIL import Image
from pydantic import Field
from torch import Tensor

from mmrep.config import config
from mmrep.hub.pretrained import locate
from mmrep.modalities.image._base import ImageEncoder
from mmrep.modalities.image._hf_load import load, rebuild
from mmrep.modalities.image._hf_processor import Reader
from mmrep.modalities.image._hf_vit import ViTTrunk
from mmrep.modalities.image._native import collate_patches, to_patches
from mmrep.modalities.image.decode import MAX_PIXELS
from mmrep.tokens import Content, Encoding, Inputs, Tokens
from mmrep.views import View


@config
class HFImageConfig:
    """path: a folder, a hub id, or `package:name/folder` for a folder inside an installed Python package.

    revision: hub branch, tag or commit. local_files_only: never touch the network. projection: go through the
    projection into the joint space that a CLIP-like checkpoint has. pooler: keep the pooling layer of ViT, DeiT and
    BEiT, for pool `native`; None = if the checkpoint has values for it. background: colour behind transparency, 0..255.
    max_pixels: larger pictures are refused unread.
    """

    path: str
    revision: str | None = None
    local_files_only: bool = False
    projection: bool = True
    pooler: bool | None = None
    background: tuple[int, int, int] = (255, 255, 255)
    max_pixels: Annotated[int, Field(ge=1)] = MAX_PIXELS


class HFImage(ImageEncoder):
    """A Hugging Face vision model without its task head, and its image processor.

    The processor resizes and crops in the loader; the device rescales and normalises, so that a batch view such as
    `image-augment` sees values in 0..1. Decoding is ours: turned by EXIF, transparency over ``background``. A view that
    chooses a size gets it by our own resizing with the processor's filter, and positions are interpolated as the
    library does. Tokens are the library's ``last_hidden_state`` (CLIP's are not normed); ``pooled`` is its
    ``pooler_output``, or behind the projection its ``image_embeds``; layers are its ``hidden_states``, n = 1 for the
    output of the first block.

    Of convolutional networks and Swin, tokens are the cells of the last map; they can neither drop tokens nor give
    layers. SigLIP 2 of flexible resolution reads pictures at their own aspect ratio; its inputs are those of
    `image-vit` with ``resize: native``.
    """

    Config = HFImageConfig
    # What vision transformers can do; an instance narrows it to what its model can.
    supports = frozenset({"tokens", "drop_tokens", "mask_token", "layers", "content"})

    def __init__(self, config: HFImageConfig, files: Path | None = None) -> None:
        if files is not None and (files / "config.json").is_file():
            trunk, hf_config, processor = rebuild(files, projection=config.projection)
        else:
            trunk, hf_config, processor = load(
                locate(config.path), revision=config.revision, local_files_only=config.local_files_only,
                projection=config.projection, pooler=config.pooler,
            )  # fmt: skip
        reader = Reader(processor, config.path, native=trunk.native)
        preprocess = reader.preprocess(background=config.background, max_pixels=config.max_pixels)
        super().__init__(config, files, preprocess=preprocess)
        self.trunk, self.hf_config, self.reader = trunk, hf_config, reader
        self.width, self.depth, self.pooled_width = trunk.width, trunk.depth, trunk.pooled_width
        self.supports, self.native = trunk.supports, trunk.native
        self.patch: int | None = trunk.patch

    def fitted(self, picture: Image.Image, chosen: int | None) -> Any:
        """See `ImageEncoder.fitted`: by the processor, unless a view has chosen a size.

        Raises:
            BadSampleError: ``extreme shape``.
        """
        if chosen is not None:
            return super().fitted(picture, chosen)
        self.reader.check_shape(picture.size, self.preprocess.max_pixels)
        return self.reader(picture).permute(1, 2, 0).numpy()

    def prepare(self, raw: Any, *, view: View | None = None, seed: int = 0) -> Inputs:
        """One picture to ``{"pixels": [3, H, W]}``, or SigLIP 2's ``patches`` and ``shape``; see `decode`.

        Pixels are uint8, or float32 in 0..1 where the processor scales before it resizes.

        Raises:
            BadSampleError: the picture cannot be read.
        """
        item = super().prepare(raw, view=view, seed=seed)
        return (
            to_patches(item["pixels"], self.patch, self.preprocess.background) if self.native and self.patch else item
        )

    def collate(self, items: Sequence[Inputs]) -> Inputs:
        """Stack pictures of one size, or pad patches."""
        return collate_patches(items) if self.native else super().collate(items)

    def length(self, item: Inputs) -> int:
        """The number of patches, where it differs between pictures."""
        return len(item["patches"]) if self.native else 1

    def normalize(self, pixels: Tensor) -> Tensor:
        """Uint8, or float in 0..1, [B, 3, H, W], to standardised floats in the dtype of the weights.

        In float32 until the end, as the library's processor does: in bfloat16 a mean would lose its digits.
        """
        return self.reader.normalize(pixels).to(next(self.trunk.parameters()).dtype)

    def tokenize(self, inputs: Inputs) -> Tokens:
        """Pixels [B, 3, H, W], or patches, to tokens [B, N, D]."""
        if self.native:
            assert isinstance(self.trunk, ViTTrunk)
            return self.trunk.tokenize_patches(inputs, self._patches(inputs))
        return self.trunk.tokenize(self.normalize(inputs["pixels"]))

    def encode(self, tokens: Tokens, keep: Tensor | None = None, layers: Sequence[int] = ()) -> Encoding:
        """Run the model over the kept tokens; layers are block outputs, before the final norm."""
        self.check_request(keep, layers)
        return self.trunk.encode(tokens, keep, layers)

    def content(self, inputs: Inputs) -> Content:
        """See `Encoder.content`: the normalised pixels of each patch, [B, N, 3 * patch * patch], channels first."""
        if not isinstance(self.trunk, ViTTrunk):
            return super().content(inputs)
        return Content(self._patches(inputs)) if self.native else self.trunk.content(self.normalize(inputs["pixels"]))

    def save_files(self, folder: Path) -> None:
        """Write the model's own config.json and its processor's preprocessor_config.json."""
        self.hf_config.save_pretrained(folder)
        self.reader.processor.save_pretrained(folder)

    def no_weight_decay(self) -> set[str]:
        """Learned positions, class and register tokens, and the query of a pooling head."""
        return {f"trunk.{name}" for name in self.trunk.no_weight_decay()}

    def _patches(self, inputs: Inputs) -> Tensor:
        patches, side = inputs["patches"], self.patch or 1
        return self.normalize(patches.reshape(-1, 3, side, side)).reshape(patches.shape)
