"""Hugging Face vision models: equal to the library's own call, processor and model, on random checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from image_tiny_hf import KINDS, MAPS, UNPOOLED, VITS, make, save
from PIL import Image

from mmrep.config import component
from mmrep.encoder import BadSampleError
from mmrep.heads import NativePool
from mmrep.modalities.image._hf_processor import Reader
from mmrep.modalities.image.hf import HFImage
from mmrep.testing import check_encoder
from mmrep.tokens import keep_special

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
Made = tuple[Path, Any, Any]
Folder = Callable[[str], Made]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """``made("vit")``: a folder with a random checkpoint, the library's model that it was saved from, its processor."""
    known: dict[str, Made] = {}

    def get(kind: str) -> Made:
        if kind not in known:
            folder = tmp_path_factory.mktemp(kind)
            known[kind] = (folder, *save(kind, folder))
        return known[kind]

    return get


def build(folder: Path, **fields: Any) -> HFImage:
    return component("encoders", "hf-image", path=str(folder), local_files_only=True, **fields).build().eval()


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Waves and noise: both a smooth and a rough part."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    channels = {"L": 1, "RGB": 3, "RGBA": 4}[mode]
    waves = np.stack([np.sin(x / (3 + c + seed) + c) + np.cos(y / (4 + c)) for c in range(channels)], -1)
    values = (waves * 50 + 128 + rng.integers(-25, 25, waves.shape)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(values[..., 0] if mode == "L" else values)


ODD = [picture(37, 53), picture(61, 23, 1), picture(16, 16, 2), picture(17, 40, 3)]


def inputs_of(encoder: HFImage, pictures: list[Image.Image]) -> dict[str, torch.Tensor]:
    return encoder.collate([encoder.prepare(raw) for raw in pictures])


def core(model: Any) -> Any:
    """The vision model itself."""
    return getattr(model, "vision_model", getattr(model, "vit", model))


def library(model: Any, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor | None, tuple[torch.Tensor, ...]]:
    """Last hidden state, pooled and hidden states, as a transformers user gets them."""
    call = getattr(model, "get_image_features", model if core(model) is not getattr(model, "vit", 0) else core(model))
    with torch.no_grad():
        out = call(**inputs, output_hidden_states=True)
    pooled = out.image_embeds if "image_embeds" in out else out.get("pooler_output")
    return out.last_hidden_state, pooled, out.hidden_states


@pytest.mark.parametrize("kind", KINDS)
def test_contract(kind: str, made: Folder):
    check_encoder(build(made(kind)[0]))


@pytest.mark.parametrize("kind", VITS)
def test_tokens_layers_and_pooled_are_the_librarys(kind: str, made: Folder):
    folder, model, processor = made(kind)
    encoder = build(folder)
    inputs = inputs_of(encoder, ODD)
    want, pooled, hidden = library(model, **processor(images=ODD, return_tensors="pt"))
    with torch.no_grad():
        got = encoder.encode(encoder.tokenize(inputs), layers=(2, 1))
    N = got.tokens.values.shape[1]
    for ours, theirs in ((got.tokens.values, want), (got.layers[0], hidden[2]), (got.layers[1], hidden[1])):
        valid = got.tokens.grid.valid
        torch.testing.assert_close(ours[valid], theirs[:, :N][valid], **CLOSE)
    assert want.std() > 0.1
    if kind in UNPOOLED:
        assert got.pooled is None
        assert encoder.pooled_width is None
    else:
        torch.testing.assert_close(NativePool(NativePool.Config(), encoder.width)(got), pooled, **CLOSE)
        assert pooled.std() > 0.05


def in_order(values: torch.Tensor) -> torch.Tensor:
    """A map [B, C, H, W] as tokens."""
    return values.flatten(2).mT if values.ndim == 4 else values


@pytest.mark.parametrize("kind", MAPS)
def test_maps_and_pooled_are_the_librarys(kind: str, made: Folder):
    folder, model, processor = made(kind)
    encoder = build(folder)
    assert encoder.supports == {"tokens"}
    want, pooled, _ = library(model, **processor(images=ODD, return_tensors="pt"))
    with torch.no_grad():
        got = encoder(inputs_of(encoder, ODD))
    torch.testing.assert_close(got.tokens.values, in_order(want), **CLOSE)
    torch.testing.assert_close(got.pooled, pooled.flatten(1), **CLOSE)
    assert want.std() > 0.1
    assert pooled.std() > 0.02
    if want.ndim == 4:
        assert got.tokens.grid.shape == tuple(want.shape[2:])
    pixels = torch.rand(2, 3, 54, 42, generator=torch.Generator().manual_seed(0))
    told = {"interpolate_pos_encoding": True} if kind == "swin-absolute" else {}
    want, pooled, _ = library(model, pixel_values=encoder.normalize(pixels), **told)
    with torch.no_grad():
        got = encoder({"pixels": pixels})
    torch.testing.assert_close(got.tokens.values, in_order(want), **CLOSE)
    torch.testing.assert_close(got.pooled, pooled.flatten(1), **CLOSE)
    if kind == "swin":
        assert got.tokens.grid.shape == (14, 11)  # 27 and 21 patches, the last of each filled up
    with pytest.raises(ValueError, match=r"does not support 'drop_tokens'.*hf-image"):
        encoder.encode(got.tokens, torch.tensor([[0], [1]]))


@pytest.mark.parametrize("kind", ["swin", "convnext", "dinov3-convnext"])
def test_cells_of_maps_are_where_the_grid_says(kind: str, made: Folder):
    """A spot in the lower right corner changes the token there most."""
    encoder = build(made(kind)[0])
    side = encoder.reader.size[0]
    pixels = torch.full((1, 3, side, side), 0.5)
    spotted = pixels.clone()
    spotted[:, :, -side // 4 :, : side // 4] += 0.1
    grids = encoder.tokenize({"pixels": pixels}).grid
    changed = (encoder({"pixels": spotted}).tokens.values - encoder({"pixels": pixels}).tokens.values)[0].abs().sum(1)
    changed[grids.special[0]] = 0
    row, column = grids.coords[0, int(changed.argmax())].tolist()
    assert row >= grids.shape[0] // 2 > column


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_the_librarys(kind: str, made: Folder):
    folder, _, processor = made(kind)
    encoder = build(folder).bfloat16()
    model = type(made(kind)[1]).from_pretrained(folder).eval().bfloat16()
    batch = {k: v.bfloat16() if v.is_floating_point() else v
             for k, v in processor(images=ODD, return_tensors="pt").items()}  # fmt: skip
    want, pooled, _ = library(model, **batch)
    with torch.no_grad():
        got = encoder(inputs_of(encoder, ODD))
    valid = got.tokens.grid.valid
    theirs = in_order(want)[:, : valid.shape[1]][valid]
    assert got.tokens.values.dtype == torch.bfloat16
    if kind == "siglip2":  # padded to another length, so summed in another order
        torch.testing.assert_close(got.tokens.values[valid], theirs, atol=0.06, rtol=0.02)
    elif kind == "align":  # its mean and deviation are measured, and differ in the last digit of float32
        torch.testing.assert_close(got.tokens.values[valid], theirs, atol=0.01, rtol=0.02)
    else:
        assert torch.equal(got.tokens.values[valid], theirs)
        if kind not in UNPOOLED:
            rough = {"atol": 0.01, "rtol": 0.02} if kind in (*MAPS, "siglip") else {"atol": 0, "rtol": 0}
            torch.testing.assert_close(got.pooled, pooled.flatten(1), **rough)


@pytest.mark.parametrize("kind", ["vit", "dinov2", "dinov3", "clip", "siglip", "siglip2"])
def test_grey_and_transparent_pictures_are_read_as_the_library_reads_them(kind: str, made: Folder):
    folder, _, processor = made(kind)
    encoder = build(folder)
    palette = picture(30, 41, 5).quantize(9)
    palette.info["transparency"] = 2
    raws = [picture(33, 21, 4, "L"), picture(19, 45, 6, "RGBA"), palette]
    batch = processor(images=raws, do_convert_rgb=True, return_tensors="pt")
    ours = inputs_of(encoder, raws)
    if kind == "siglip2":
        N = ours["valid"].shape[1]
        assert torch.equal(ours["valid"], batch["pixel_attention_mask"][:, :N].bool())
        assert torch.equal(ours["shape"], batch["spatial_shapes"])
        got = encoder.content(ours).values.view(3, N, 3, 4, 4).permute(0, 1, 3, 4, 2).flatten(2)
        assert torch.equal(got[ours["valid"]], batch["pixel_values"][:, :N][ours["valid"]])
    else:
        torch.testing.assert_close(encoder.normalize(ours["pixels"]), batch["pixel_values"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("backend", ["torchvision", "pil"])
def test_both_backends_of_processors_are_cut_in_two(backend: str, made: Folder):
    for kind in ("vit", "dinov2", "clip", "siglip"):
        processor = transformers.AutoImageProcessor.from_pretrained(made(kind)[0], backend=backend)
        assert processor.backend == backend
        reader = Reader(processor, "here", native=False)
        for raw in ODD:
            want = torch.as_tensor(processor(images=raw, return_tensors="pt")["pixel_values"])
            torch.testing.assert_close(reader.normalize(reader(raw)[None]), want, atol=2e-6, rtol=2e-6)


def on_kept(kind: str, model: Any, processor: Any, at: torch.Tensor, raws: list[Image.Image]) -> Any:
    """The library's own forward without the embeddings of other tokens than those at ``at``; BEiT's hides them."""
    vision, batch = core(model), processor(images=raws, return_tensors="pt")
    if kind.startswith("beit"):
        mask = torch.zeros(len(raws), 17, dtype=torch.long)
        mask[:, at] = 1
        model.set_attn_implementation("eager")  # the library adds a mask of bools to the bias otherwise: no mask at all
        out, pooled, hidden = library(model, **batch, attention_mask=mask)
        model.set_attn_implementation("sdpa")
        norm = vision.pooler.layernorm
        pooled = pooled if norm is None else norm(out[:, at[1:]].mean(1))  # the library's counts what is hidden
        return out[:, at], pooled, tuple(layer[:, at] for layer in hidden)
    handles = [vision.embeddings.register_forward_hook(
        lambda module, args, out: (out[0][:, at], *out[1:]) if isinstance(out, tuple) else out[:, at]
    )]  # fmt: skip
    if kind.startswith("data2vec"):
        biases = [module for name, module in vision.named_modules() if name.endswith("relative_position_bias")]
        handles += [bias.register_forward_hook(lambda module, args, out: out[:, :, at][..., at]) for bias in biases]
    if kind == "dinov3":
        handles.append(vision.rope_embeddings.register_forward_hook(
            lambda module, args, out: tuple(part[at[3:] - 3] for part in out)
        ))  # fmt: skip
    if kind == "siglip2":
        batch["pixel_attention_mask"] = batch["pixel_attention_mask"][:, at]
    try:
        return library(model, **batch)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("kind", VITS)
def test_kept_tokens_are_the_library_run_on_them(kind: str, made: Folder):
    folder, model, processor = made(kind)
    encoder = build(folder)
    raws = [picture(16, 16, 7), picture(20, 20, 8)]
    tokens = encoder.tokenize(inputs_of(encoder, raws))
    special = int(tokens.grid.special[0].sum())
    keep = torch.tensor([[9, 2, 12, 5]]).expand(2, -1) + special
    at = keep_special(keep, tokens.grid)[0]
    want, pooled, hidden = on_kept(kind, model, processor, at, raws)
    with torch.no_grad():
        got = encoder.encode(tokens, keep, layers=[1])
    assert got.tokens.values.shape == (2, special + 4, 16)
    torch.testing.assert_close(got.tokens.values, want, **CLOSE)
    torch.testing.assert_close(got.layers[0], hidden[1], **CLOSE)
    if pooled is not None:
        torch.testing.assert_close(got.pooled, pooled, **CLOSE)


@pytest.mark.parametrize("kind", ["dinov2-registers", "dinov3", "clip", "siglip", "siglip2", "beit"])
def test_samples_of_different_numbers_of_kept_tokens_do_not_meet(kind: str, made: Folder):
    encoder = build(made(kind)[0])
    inputs = inputs_of(encoder, ODD[:2])
    tokens = encoder.tokenize(inputs)
    special = int(tokens.grid.special[0].sum())
    with torch.no_grad():
        both = encoder.encode(tokens, torch.tensor([[1, 5, -1, -1], [2, 3, 7, 0]]) + special, layers=[1])
        one = encoder.encode(encoder.tokenize({k: v[:1] for k, v in inputs.items()}), torch.tensor([[1, 5]]) + special,
                             layers=[1])  # fmt: skip
    n = special + 2
    torch.testing.assert_close(both.tokens.values[:1, :n], one.tokens.values, **CLOSE)
    torch.testing.assert_close(both.layers[0][:1, :n], one.layers[0], **CLOSE)
    torch.testing.assert_close(both.pooled[:1], one.pooled, **CLOSE)


@pytest.mark.parametrize("kind", ["vit", "deit", "dinov2", "dinov2-registers", "dinov3", "clip", "altclip", "siglip",
                                  "beit", "beit-absolute", "data2vec", "data2vec-absolute"])  # fmt: skip
def test_pictures_of_another_size_have_the_librarys_positions(kind: str, made: Folder):
    folder, model, _ = made(kind)
    encoder = build(folder)
    pixels = torch.rand(2, 3, 26, 20, generator=torch.Generator().manual_seed(0))
    fitted = {} if kind.startswith(("dino", "beit", "data2vec")) else {"interpolate_pos_encoding": True}
    want, pooled, _ = library(model, pixel_values=encoder.normalize(pixels), **fitted)
    with torch.no_grad():
        got = encoder({"pixels": pixels})
    assert got.tokens.grid.shape == (6, 5)  # the library leaves out what fills no patch
    torch.testing.assert_close(got.tokens.values, want, **CLOSE)
    torch.testing.assert_close(got.pooled, pooled, **CLOSE)
    assert encoder.content({"pixels": pixels}).values.shape == (2, got.tokens.values.shape[1], 48)


@pytest.mark.parametrize("kind", ["vit", "dinov2-registers", "dinov3", "clip", "siglip"])
def test_the_grid_says_where_tokens_are(kind: str, made: Folder):
    """Only the patch whose pixels change has another embedding; what hides it leaves its position."""
    encoder = build(made(kind)[0])
    inputs = inputs_of(encoder, ODD[:1])
    plain = encoder.tokenize(inputs)
    special = {"vit": 1, "dinov2-registers": 4, "dinov3": 3, "clip": 1, "siglip": 0}[kind]
    assert plain.grid.special[0].tolist() == [True] * special + [False] * 16
    for n in (special, special + 6, special + 15):
        row, column = plain.grid.coords[0, n].int().tolist()
        pixels = inputs["pixels"].clone()
        at = (0, slice(None), row * 4 + 1, column * 4 + 2)
        pixels[at] = pixels[at] ^ 255 if pixels.dtype == torch.uint8 else 1 - pixels[at]
        changed = (encoder.tokenize({"pixels": pixels}).values - plain.values).abs().amax(2)[0] > 1e-6
        assert changed.nonzero().flatten().tolist() == [n]
        content = (encoder.content({"pixels": pixels}).values - encoder.content(inputs).values)[0].abs().amax(1) > 0
        assert content.nonzero().flatten().tolist() == [n]


@pytest.mark.parametrize("kind", VITS)
def test_values_without_positions_are_the_patches_alone(kind: str, made: Folder):
    """Equal patches at different places: their values differ by their positions, exactly."""
    encoder = build(made(kind)[0])
    tokens = encoder.tokenize(inputs_of(encoder, [Image.new("RGB", (16, 16), (9, 130, 200))]))
    bare = (tokens.values - tokens.positions)[0][~tokens.grid.special[0]]
    torch.testing.assert_close(bare, bare[:1].expand_as(bare), atol=1e-6, rtol=1e-5)
    if kind not in ("dinov3", "beit", "data2vec"):
        assert (tokens.positions[0].std(0) > 1e-3).all()


@pytest.mark.parametrize("kind", ["vit", "dinov2-registers", "dinov3", "clip", "altclip", "siglip", "siglip2", "beit",
                                  "swin", "convnext", "resnet", "align"])  # fmt: skip
def test_gradients_are_the_librarys(kind: str, made: Folder):
    folder, _, processor = made(kind)
    model = type(made(kind)[1]).from_pretrained(folder).eval()
    encoder = build(folder)
    call = getattr(model, "get_image_features", model)
    out = call(**processor(images=ODD, return_tensors="pt"))
    out.pooler_output.square().sum().backward()
    encoder(inputs_of(encoder, ODD)).pooled.square().sum().backward()
    theirs = dict(core(model).named_parameters())
    for name, parameter in encoder.trunk.model.named_parameters():
        want = theirs[name].grad
        torch.testing.assert_close(parameter.grad, want, atol=1e-5 * float(want.abs().max() + 1), rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_saved_model_needs_nothing_but_its_files(kind: str, made: Folder, tmp_path: Path):
    place, files = tmp_path / "checkpoint", tmp_path / "files"
    files.mkdir()
    shutil.copytree(made(kind)[0], place)
    encoder = build(place)
    encoder.save_files(files)
    shutil.rmtree(place)
    again = HFImage(encoder.config, files=files).eval()
    again.load_state_dict(encoder.state_dict())
    assert isinstance(again.trunk.model, type(encoder.trunk.model))
    with torch.no_grad():
        first, second = (e(inputs_of(e, ODD)) for e in (encoder, again))
    exactly = {"atol": 1e-6 if kind == "align" else 0, "rtol": 0}  # a convolution that depends on where weights lie
    torch.testing.assert_close(first.tokens.values, second.tokens.values, **exactly)
    if kind not in UNPOOLED:
        torch.testing.assert_close(first.pooled, second.pooled, **exactly)
    assert {p.name for p in files.iterdir()} == {"config.json", "preprocessor_config.json"}
    assert encoder.state_dict().keys() <= {name for name, _ in (*encoder.named_parameters(), *encoder.named_buffers())}


@pytest.mark.parametrize("kind", ["clip", "metaclip2", "altclip", "chinese-clip"])
def test_without_the_projection_pooled_is_the_vision_models(kind: str, made: Folder, tmp_path: Path):
    folder, model, processor = made(kind)
    encoder = build(folder, projection=False)
    with torch.no_grad():
        got = encoder(inputs_of(encoder, ODD)).pooled
        want = model.vision_model(**processor(images=ODD, return_tensors="pt")).pooler_output
    torch.testing.assert_close(got, want, **CLOSE)
    assert encoder.pooled_width is None
    assert not any("projection" in name for name, _ in encoder.trunk.named_parameters() if "patch" not in name)
    encoder.save_files(tmp_path)
    again = HFImage(encoder.config, files=tmp_path)
    again.load_state_dict(encoder.state_dict())


def test_a_processor_that_shifts_or_normalises_twice_is_measured():
    for fields in ({"rescale_offset": True, "rescale_factor": 1 / 127.5, "include_top": False, "do_normalize": False},
                   {"include_top": True}):  # fmt: skip
        processor = transformers.EfficientNetImageProcessor(size={"height": 20, "width": 16}, **fields)
        reader = Reader(processor, "here", native=False)
        want = processor(images=ODD[0], return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(reader.normalize(reader(ODD[0])[None]), want, atol=1e-5, rtol=1e-5)
        assert reader.size == (20, 16)


def test_processors_that_cannot_be_cut_in_two_are_refused():
    class Bent(transformers.ViTImageProcessor):
        def normalize(self, image: torch.Tensor, *args: Any, **fields: Any) -> torch.Tensor:
            return super().normalize(image, *args, **fields).tanh()

    with pytest.raises(ValueError, match="does more than resize, crop, scale and normalise"):
        Reader(Bent(size={"height": 16, "width": 16}), "here", native=False)
    uncropped = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, do_center_crop=False)
    with pytest.raises(ValueError, match="pictures of several sizes"):
        Reader(uncropped, "here", native=False)


def test_views_choose_sizes_and_see_floats_in_0_to_1(made: Folder):
    crop = component("views", "image-crop", size=8).build()
    for kind, dtype in (("dinov2", torch.uint8), ("dinov3", torch.uint8), ("clip", torch.uint8)):
        encoder = build(made(kind)[0])
        item = encoder.prepare(ODD[0], view=crop, seed=1)
        assert item["pixels"].shape == (3, 8, 8)
        assert item["pixels"].dtype == dtype
        assert encoder(encoder.collate([item])).tokens.grid.shape == (2, 2)
        whole = inputs_of(encoder, ODD[:1])["pixels"]
        floats = whole if whole.is_floating_point() else whole.float() / 255
        assert 0 <= float(floats.min()) < float(floats.max()) <= 1
        torch.testing.assert_close(encoder.normalize(floats), encoder.normalize(whole), atol=1e-5, rtol=1e-5)
    native = build(made("siglip2")[0])
    item = native.prepare(ODD[0], view=crop, seed=1)
    assert item["shape"].tolist() == [2, 2]


def test_extreme_shapes_are_refused_before_they_are_resized(made: Folder):
    line = Image.new("RGB", (30_000, 1))
    with pytest.raises(BadSampleError, match="30000 x 1 pixels, resized to 20") as error:
        build(made("clip")[0], max_pixels=1_000_000).prepare(line)
    assert error.value.cause == "extreme shape"
    assert build(made("vit")[0]).prepare(line)["pixels"].shape == (3, 16, 16)


def test_poolers_are_kept_where_there_are_values(made: Folder):
    assert build(made("vit")[0], pooler=False)(inputs_of(build(made("vit")[0]), ODD[:1])).pooled is None
    assert build(made("vit")[0], pooler=True).pooled_width == 16
    for kind in ("vit-classifier", "dinov2"):
        with pytest.raises(ValueError, match="pooler is asked for"):
            build(made(kind)[0], pooler=True)


def test_other_checkpoints_are_refused(made: Folder, tmp_path: Path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    transformers.BertModel(transformers.BertConfig(vocab_size=9, **sizes)).save_pretrained(tmp_path / "bert")
    with pytest.raises(
        ValueError, match="is a 'bert' model, which hf-image does not know; it knows vit, deit, vit_msn"
    ):
        build(tmp_path / "bert")
    bare = shutil.copytree(made("vit")[0], tmp_path / "bare")
    (bare / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="has no image processor"):
        build(bare)
    model, processor = make("vit")
    pickled = tmp_path / "pickled"
    processor.save_pretrained(pickled)
    model.config.save_pretrained(pickled)
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds no safetensors weights"):
        build(pickled)


def test_a_tower_gives_the_librarys_embedding(made: Folder, tmp_path: Path):
    """Pool `native` and no projector of ours: the joint space of the checkpoint, also when saved and loaded."""
    from mmrep.config import parse
    from mmrep.hub.folder import load
    from mmrep.model import Model, ModelConfig

    folder, model, processor = made("clip")
    tower = {"encoder": {"type": "hf-image", "path": str(folder)}, "pool": "native", "projector": "identity"}
    ours = Model(parse(ModelConfig, {"dim": 12, "towers": {"image": tower}})).eval()
    _, want, _ = library(model, **processor(images=ODD, return_tensors="pt"))
    want = torch.nn.functional.normalize(want, dim=-1)
    got = ours.encode(ODD, "image", show_progress_bar=False, normalize_embeddings=True)
    torch.testing.assert_close(torch.as_tensor(got), want, **CLOSE)
    ours.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved").encode(ODD, "image", show_progress_bar=False, normalize_embeddings=True)
    torch.testing.assert_close(torch.as_tensor(again), want, **CLOSE)


@pytest.mark.parametrize("kind", ["beit", "dinov3", "siglip", "swin", "resnet"])
def test_blocks_computed_again_have_the_same_gradient(kind: str, made: Folder):
    """Also with dropped tokens: what a block is told of their places must not be forgotten until then."""
    from mmrep.checkpointing import checkpoint_blocks

    plain, again = build(made(kind)[0]), build(made(kind)[0])
    assert checkpoint_blocks(again)
    assert len(plain.layer_modules()) == 2 == len(again.layer_modules())
    for encoder in (plain, again):
        encoder.train()
        if kind == "dinov3":
            encoder.trunk.model.rope_embeddings.eval()  # it would draw a random scale
        torch.manual_seed(0)  # of dropped paths
        tokens = encoder.tokenize(inputs_of(encoder, ODD))
        keep = None if kind in MAPS else torch.tensor([[9, 4, 12]]).expand(4, -1)
        encoder.encode(tokens, keep).tokens.values.square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, **CLOSE)


def test_nothing_is_learned_from_training_pictures(made: Folder, tmp_path: Path):
    """A recipe asks every encoder to; ours of bands would learn a mean."""
    config = component("encoders", "hf-image", path=str(made("vit")[0])).config
    HFImage.fit(config, iter(ODD), tmp_path)
    assert not list(tmp_path.iterdir())


def test_learned_positions_and_class_tokens_do_not_decay(made: Folder):
    assert build(made("dinov2-registers")[0]).no_weight_decay() == {
        f"trunk.model.embeddings.{name}" for name in ("cls_token", "register_tokens", "position_embeddings")
    }
