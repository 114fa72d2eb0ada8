"""Every registered video encoder keeps the contract; what all share; and what is special to the tubelet transformer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as V
from video_files import animation, container, numbered
from video_tiny_hf import KINDS, save

from mmrep import BadSampleError
from mmrep.config import ConfigError, component
from mmrep.heads import ClsPool, MeanPool
from mmrep.modalities.video._base import Preprocess, fit_square
from mmrep.modalities.video.transformer import VideoTransformer, sincos_3d
from mmrep.registry import encoders
from mmrep.testing import check_encoder

SMALL = {"size": 16, "patch": 8, "width": 32, "depth": 2, "heads": 2}
VIT = {"type": "image-vit", "size": 16, "patch": 8, "width": 32, "depth": 1, "heads": 2}
CNN = {"type": "image-cnn", "size": 16, "widths": [8, 16], "depths": [1, 1]}
CASES = [
    ("video-transformer", SMALL),
    ("video-transformer", {**SMALL, "short": "mask", "class_token": True, "positions": "learned", "frames": 7}),
    ("video-transformer", {**SMALL, "short": "mask", "sampling": "fps", "fps": 5, "frames": 6, "tubelet": 3,
                           "dropout": 0.1, "drop_path": 0.1, "layer_scale": 1e-4, "resize": "squash"}),
    ("video-transformer", {**SMALL, "clips": 3, "frames": 4, "class_token": True}),
    ("video-transformer", {**SMALL, "clips": 2, "short": "mask", "sampling": "fps", "fps": 9, "frames": 7,
                           "class_token": True}),
    ("video-frames", {"encoder": VIT}),
    ("video-frames", {"encoder": VIT, "short": "mask", "depth": 2, "frame_pool": "cls"}),
    ("video-frames", {"encoder": VIT, "short": "mask", "depth": 1, "frozen_frames": True}),
    ("video-frames", {"encoder": VIT, "short": "mask", "depth": 2, "clips": 2, "frames": 5, "sampling": "fps",
                      "fps": 8, "frozen_frames": True}),
    ("video-frames", {"encoder": CNN, "frames": 3, "frame_pool": {"type": "attention", "heads": 2}}),
    ("video-frames", {"encoder": {"type": "timm", "model": "test_vit", "size": 32}, "frame_pool": "native",
                      "depth": 1, "frames": 2}),
]  # fmt: skip
HF_CASES = [
    *((kind, {}) for kind in KINDS if kind != "videomae-norm"),
    ("vjepa2", {"clips": 2}),
    ("timesformer", {"clips": 2}),
    ("vivit", {"pooler": True, "clips": 2}),
    ("vjepa2", {"frames": 6, "sampling": "fps"}),
]


@pytest.mark.parametrize(("name", "fields"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_contract(name: str, fields: dict):
    torch.manual_seed(0)
    check_encoder(component("encoders", name, **fields).build())


@pytest.mark.parametrize(("kind", "fields"), HF_CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_contract_of_hugging_face_models(kind: str, fields: dict, tmp_path: Path):
    save(kind, tmp_path)
    check_encoder(component("encoders", "hf-video", path=str(tmp_path), local_files_only=True, **fields).build())


def test_every_registered_video_encoder_is_among_the_cases():
    registered = {name for name, cls in encoders.load_all().items() if getattr(cls, "modality", "") == "video"}
    assert registered == {name for name, _ in CASES} | {"hf-video"}


def build(**fields) -> VideoTransformer:
    torch.manual_seed(0)
    return component("encoders", "video-transformer", **{**SMALL, **fields}).build().eval()


def test_examples_differ_in_length_size_and_kind_and_need_no_pyav():
    encoder = build(frames=24, short="mask")
    raws = encoder.examples(5, 0)
    assert [encoder.prepare(raw)["times"].numel() for raw in raws] == [5, 11, 3, 1, 23]
    assert len({type(raw) for raw in raws}) == 5
    assert raws[0][0][3, 5, 7].tolist() == EXAMPLE_PIXEL
    assert all(b"ftyp" not in raw[:12] for raw in raws if isinstance(raw, bytes))


# By hand: t=3, y=5, x=7, channel c: step 3 + 7c, phase 61c; ramp = 7 step + 5 (14 - step) + 9 t + phase.
EXAMPLE_PIXEL = [7 * 3 + 5 * 11 + 27, 7 * 10 + 5 * 4 + 27 + 61, 7 * 6 + 5 * 8 + 27 + 122]


def test_prepare_gives_the_frames_that_sampling_chooses_with_their_times():
    encoder = build(frames=3, size=16)
    item = encoder.prepare((numbered(10), 10))
    assert item["frames"].dtype == torch.uint8
    assert item["frames"].shape == (3, 3, 16, 16)
    assert [round((float(f.float().mean()) - 4) / 8) for f in item["frames"]] == [1, 5, 8]
    torch.testing.assert_close(item["times"], torch.tensor([0.1, 0.5, 0.8]))


def test_a_container_and_its_frames_are_read_alike():
    encoder = build(frames=5)
    frames = numbered(20)
    for raw in (container(frames, "ffv1", "matroska"), animation(frames, "WEBP", 100)):
        a, b = encoder.prepare(raw), encoder.prepare((frames, 10))
        torch.testing.assert_close(a["times"], b["times"], atol=1e-3, rtol=0)
        assert (a["frames"].int() - b["frames"].int()).abs().max() <= 3


def test_a_repeated_frame_is_read_once(monkeypatch: pytest.MonkeyPatch):
    encoder, calls = build(frames=8), []
    plain = encoder.prepare_frame
    monkeypatch.setattr(encoder, "prepare_frame", lambda frame: (calls.append(1), plain(frame))[1])
    item = encoder.prepare(numbered(3))
    assert len(calls) == 3
    assert torch.equal(item["frames"][2], item["frames"][7])
    assert item["times"][2] == item["times"][7]


def test_collate_pads_over_time_and_says_so():
    encoder = build(frames=8, short="mask")
    inputs = encoder.collate([encoder.prepare(numbered(n)) for n in (3, 8, 1)])
    assert inputs["valid"].sum(1).tolist() == [3, 8, 1]
    assert inputs["valid"][0].tolist() == [True] * 3 + [False] * 5
    assert inputs["frames"].shape == (3, 8, 3, 16, 16)
    assert inputs["frames"][0, 3:].max() == 0
    assert encoder.length(encoder.prepare(numbered(3))) == 3


def test_preview_is_the_middle_frame_at_its_own_size():
    picture = build().preview(numbered(11, 30, 20))
    assert isinstance(picture, Image.Image)
    assert picture.size == (30, 20)
    assert np.asarray(picture)[0, 0, 0] == 4 + 8 * 5


@pytest.mark.parametrize(("width", "height"), [(37, 61), (64, 48), (16, 16), (200, 9)])
@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_resizing_is_torchvisions(width: int, height: int, resize: str):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8))
    how = Preprocess(size=16, resize=resize, crop_share=0.8, interpolation="bilinear")
    target = [20] if resize == "crop" else [20, 20]
    want = V.center_crop(V.resize(image, target, InterpolationMode.BILINEAR), [16, 16])
    np.testing.assert_array_equal(fit_square(image, how), np.asarray(want))


def test_a_frame_that_would_grow_too_large_is_refused():
    with pytest.raises(BadSampleError, match="extreme shape"):
        build(size=64, max_pixels=100_000).prepare(np.zeros((2, 1, 3000, 3), np.uint8))


def test_normalisation():
    encoder = build(mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])
    frames = torch.randint(0, 256, (2, 4, 3, 16, 16), dtype=torch.uint8)
    want = V.normalize(frames.float() / 255, [0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
    torch.testing.assert_close(encoder.normalize(frames), want)
    torch.testing.assert_close(encoder.normalize(frames.float() / 255), want)


def test_clips_are_encoded_each_by_itself_and_averaged():
    one, three = build(frames=4, class_token=True), build(frames=4, class_token=True, clips=3)
    three.load_state_dict(one.state_dict())
    raws = [numbered(24), numbered(31)]
    inputs = three.collate([three.prepare(raw) for raw in raws])
    assert inputs["frames"].shape[:3] == (2, 3, 4)
    with torch.no_grad():
        together = three(inputs)
        alone = [one({k: v[:, clip] for k, v in inputs.items()}) for clip in range(3)]
    mean = MeanPool(MeanPool.Config(special=False), 32)
    torch.testing.assert_close(mean(together), torch.stack([mean(a) for a in alone]).mean(0))
    cls = ClsPool(ClsPool.Config(), 32)
    torch.testing.assert_close(cls(together), torch.stack([cls(a) for a in alone]).mean(0))
    grid = together.tokens.grid
    assert grid.shape == (3, 2, 2, 2)
    assert grid.special.sum(1).tolist() == [1, 1]
    assert grid.coords[0, 1 + 8 + 4 + 3].tolist() == [1, 1, 1, 1]


def test_tokens_of_one_clip_can_be_dropped_alone():
    encoder = build(frames=4, clips=2, class_token=True)
    single = build(frames=4, class_token=True)
    single.load_state_dict(encoder.state_dict())
    inputs = encoder.collate([encoder.prepare(numbered(24))])
    keep = torch.tensor([[12, 3, 16, -1, 9]])  # of the second clip: 9, 12, 16; of the first: 3
    with torch.no_grad():
        out = encoder.encode(encoder.tokenize(inputs), keep).tokens
        first, second = ({k: v[:, c] for k, v in inputs.items()} for c in (0, 1))
        a = single.encode(single.tokenize(first), torch.tensor([[3]])).tokens.values[0]
        b = single.encode(single.tokenize(second), torch.tensor([[12 - 8, 16 - 8, 9 - 8]])).tokens.values[0]
    assert out.grid.valid[0].tolist() == [True, True, True, True, False, True]
    torch.testing.assert_close(out.values[0, 0], (a[0] + b[0]) / 2)
    torch.testing.assert_close(out.values[0, 2], a[1])
    torch.testing.assert_close(out.values[0, [1, 3, 5]], b[1:])


def test_tubelets_are_what_a_linear_map_of_their_pixels_gives():
    encoder = build(frames=4, positions="learned")
    with torch.no_grad():
        encoder.temporal.zero_()
        encoder.spatial.zero_()
    inputs = encoder.collate([encoder.prepare(encoder.examples(1, 0)[0])])
    tokens = encoder.tokenize(inputs)
    frames = encoder.normalize(inputs["frames"])
    assert tokens.grid.shape == (2, 2, 2)
    for n, (t, row, column) in enumerate(tokens.grid.coords[0].int().tolist()):
        cube = frames[0, 2 * t : 2 * t + 2, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].transpose(0, 1)
        want = F.linear(cube.flatten(), encoder.tubelets.weight.flatten(1), encoder.tubelets.bias)
        torch.testing.assert_close(tokens.values[0, n], want, atol=1e-5, rtol=1e-5)


def test_a_tubelet_short_of_frames_repeats_the_last():
    encoder = build(frames=6, tubelet=3, short="mask")
    short = encoder.prepare(numbered(4))
    long = {**short, "frames": short["frames"][[0, 1, 2, 3, 3, 3]], "times": short["times"][[0, 1, 2, 3, 3, 3]]}
    six = encoder.prepare(numbered(6))
    a, b = encoder(encoder.collate([short, six])), encoder(encoder.collate([long, six]))
    assert a.tokens.grid.valid[0].all()
    torch.testing.assert_close(a.tokens.values, b.tokens.values)
    ragged = encoder(encoder.collate([encoder.prepare(numbered(2)), six])).tokens.grid
    assert ragged.valid.sum(1).tolist() == [4, 8]
    assert ragged.shape is None


def test_sincos_positions_are_those_of_the_formula():
    table = sincos_3d(3, 2, 4, 16)[0].numpy()
    for n, (t, row, column) in enumerate((t, r, c) for t in range(3) for r in range(2) for c in range(4)):
        want: list[float] = []
        for place, channels in ((t, 8), (row, 4), (column, 4)):
            angles = [place / 10000 ** (2 * i / channels) for i in range(channels // 2)]
            want += [*np.sin(angles), *np.cos(angles)]
        np.testing.assert_allclose(table[n], want, atol=1e-6)


@pytest.mark.parametrize("positions", ["learned", "sincos"])
def test_positions_tell_every_tubelet_apart_and_come_before_dropping(positions: str):
    encoder = build(frames=4, positions=positions)
    flat = {"frames": torch.full((1, 4, 3, 16, 16), 0.5), "times": torch.zeros(1, 4), "valid": torch.ones(1, 4) > 0}
    tokens = encoder.tokenize(flat)
    assert (torch.pdist(tokens.values[0]) > 1e-3).all()
    kept = encoder.encode(tokens, keep=torch.tensor([[6, 1]])).tokens
    assert kept.grid.coords[0].tolist() == [[1, 1, 0], [0, 0, 1]]


def test_learned_positions_are_interpolated_in_time_and_space():
    encoder = build(frames=8, size=32, positions="learned")
    steps = torch.arange(4.0)
    with torch.no_grad():
        encoder.temporal.copy_(100 * steps.view(1, 4, 1).expand(1, 4, 32))
        encoder.spatial.copy_((steps[:, None] + 10 * steps).reshape(1, 16, 1).expand(1, 16, 32))
    same = encoder._positions(4, 4, 4)[0, :, 0].view(4, 4, 4)
    torch.testing.assert_close(same[2, 3, 1], torch.tensor(200.0 + 3 + 10))
    assert encoder._positions(2, 4, 4).shape == (1, 32, 32)
    longer = encoder._positions(8, 4, 4)[0, :, 0].view(8, 4, 4)
    torch.testing.assert_close(longer[1:-1, 0, 0].diff(), torch.full((5,), 50.0), atol=1, rtol=0)
    smaller = encoder._positions(4, 2, 2)[0, :, 0].view(4, 2, 2)
    assert abs(float(smaller[0, 1, 0] - smaller[0, 0, 0]) - 2) < 0.5
    with pytest.raises(ValueError, match="20 x 16 cannot be cut into patches of 8"):
        encoder({"frames": torch.zeros(1, 8, 3, 20, 16), "times": torch.zeros(1, 8), "valid": torch.ones(1, 8) > 0})


def test_order_in_time_matters():
    encoder = build(frames=4)
    item = encoder.prepare(numbered(4))
    back = {**item, "frames": item["frames"].flip(0)}
    pooled = MeanPool(MeanPool.Config(), 32)(encoder(encoder.collate([item, back])))
    assert (pooled[0] - pooled[1]).abs().max() > 1e-3


def test_position_tables_do_not_decay():
    assert build(positions="learned", class_token=True).no_weight_decay() == {"temporal", "spatial", "special"}
    assert build().no_weight_decay() == set()


def test_wrong_configs_say_what_is_wrong():
    for fields, message in [
        ({"size": 30, "patch": 8}, "patch=8 does not divide size=30"),
        ({"width": 50, "heads": 3}, "heads=3 does not divide width=50"),
        ({"width": 36, "heads": 3}, "multiple of 8, got 36"),
        ({"tublet": 2}, "did you mean 'tubelet'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            component("encoders", "video-transformer", **fields)
