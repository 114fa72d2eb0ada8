"""Frames through an image encoder: equal to the image encoder on each frame; saving, freezing, fitting."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from video_files import number, numbered

from mmrep.config import ConfigError, component, parse
from mmrep.heads import ClsPool, MeanPool
from mmrep.hub.folder import load, write
from mmrep.modalities.image.vit import ImageViT
from mmrep.modalities.video.frames import VideoFrames
from mmrep.model import Model, ModelConfig

VIT = {"type": "image-vit", "size": 16, "patch": 8, "width": 32, "depth": 1, "heads": 2}
TIMM = {"type": "timm", "model": "test_vit", "size": 32}


def build(**fields) -> VideoFrames:
    torch.manual_seed(0)
    return component("encoders", "video-frames", **{"encoder": VIT, "frames": 4, **fields}).build().eval()


def batch(encoder: VideoFrames, *lengths: int) -> dict:
    return encoder.collate([encoder.prepare(numbered(n, 24, 20)) for n in lengths])


def test_a_token_is_the_pooled_encoding_of_its_frame():
    for pool, cls in (("mean", MeanPool), ("cls", ClsPool)):
        encoder = build(frame_pool=pool)
        inputs = batch(encoder, 4, 4)
        assert inputs["frames"].shape == (2, 4, 3, 16, 16)
        image: ImageViT = encoder.inner
        head = cls(cls.Config(), 32)
        with torch.no_grad():
            out = encoder(inputs)
            for i, frame in enumerate(numbered(4, 24, 20)):
                alone = head(image(image.collate([image.prepare(Image.fromarray(frame))])))[0]
                torch.testing.assert_close(out.tokens.values[0, i], alone, atol=1e-5, rtol=1e-5)
        assert out.tokens.grid.shape == (4,)
        torch.testing.assert_close(out.tokens.grid.coords[0, :, 0], torch.arange(4) / 25)


def test_the_native_pool_has_the_width_of_the_pooled_vector():
    torch.manual_seed(0)
    encoder = build(encoder=TIMM, frame_pool="native", frames=2)
    inputs = batch(encoder, 2)
    with torch.no_grad():
        want = encoder.inner({"pixels": inputs["frames"][0]}).pooled
        torch.testing.assert_close(encoder(inputs).tokens.values[0], want)
    assert encoder.width == want.shape[1]


def test_padding_repeats_the_last_frame_and_is_marked():
    encoder = build(short="mask", depth=1)
    inputs = batch(encoder, 2, 4)
    assert inputs["valid"].tolist() == [[True, True, False, False], [True] * 4]
    assert torch.equal(inputs["frames"][0, 3], inputs["frames"][0, 1])


def test_order_in_time_matters_only_with_a_transformer_over_time():
    frames = numbered(4, 24, 20)
    for depth, differs in ((0, False), (1, True)):
        encoder = build(depth=depth)
        inputs = encoder.collate([encoder.prepare(frames), encoder.prepare(frames[::-1])])
        pooled = MeanPool(MeanPool.Config(), 32)(encoder(inputs))
        assert bool((pooled[0] - pooled[1]).abs().max() > 1e-3) is differs


def test_what_it_supports_depends_on_its_depth():
    assert build(depth=2).supports == {"tokens", "drop_tokens", "layers"}
    plain = build()
    assert plain.supports == {"tokens"}
    with pytest.raises(ValueError, match="drop_tokens"):
        plain.encode(plain.tokenize(batch(plain, 4)), keep=torch.tensor([[0]]))


def test_frozen_frames_get_no_gradient_and_stay_in_eval_mode():
    encoder = build(encoder={**VIT, "dropout": 0.5}, depth=1, frozen_frames=True).train()
    assert encoder.training
    assert not encoder.inner.training
    encoder(batch(encoder, 4)).tokens.values.square().sum().backward()
    assert all(p.grad is None for p in encoder.inner.parameters())
    assert all(p.grad is not None for p in encoder.transformer.parameters())
    thawed = build(depth=1).train()
    thawed(batch(thawed, 4)).tokens.values.square().sum().backward()
    assert all(p.grad is not None for p in thawed.inner.parameters())


def test_it_is_rebuilt_from_its_files_with_the_preprocessing_of_the_image_encoder(tmp_path: Path):
    encoder = build(encoder={**TIMM, "mean": [0.1, 0.2, 0.3]}, frame_pool="native", frames=2)
    encoder.save_files(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["frames"]
    assert (tmp_path / "frames" / "timm.json").is_file()
    again = VideoFrames(encoder.config, files=tmp_path).eval()
    again.load_state_dict(encoder.state_dict())
    inputs = batch(encoder, 2)
    assert torch.equal(again(inputs).tokens.values, encoder(inputs).tokens.values)
    empty = tmp_path / "empty"
    empty.mkdir()
    build().save_files(empty)
    assert not any(empty.iterdir())


def test_a_saved_model_gives_the_same_embeddings(tmp_path: Path):
    """With the check of its fingerprint, and written twice into one folder."""
    towers = {"video": {"encoder": {"type": "video-frames", "encoder": TIMM, "frames": 2, "depth": 1}}}
    model = Model(parse(ModelConfig, {"dim": 8, "towers": towers})).eval()
    for _ in range(2):
        write(model, tmp_path)
    videos = [numbered(4), numbered(9)]
    np.testing.assert_array_equal(load(tmp_path).encode(videos), model.encode(videos))


def test_the_image_encoder_learns_from_middle_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen = []

    def fit(cls, config, samples, folder):
        seen.extend(number(frame) for frame in samples)
        assert len(list(samples)) == 2, "samples may be read twice"
        (folder / "learned.txt").write_text("x")

    monkeypatch.setattr(ImageViT, "fit", classmethod(fit))
    encoder = build()
    VideoFrames.fit(encoder.config, [numbered(5), b"broken", numbered(9)], tmp_path)
    assert seen == [2, 4]
    assert (tmp_path / "frames" / "learned.txt").is_file()


def test_nothing_is_written_where_nothing_is_learned(tmp_path: Path):
    VideoFrames.fit(build().config, [numbered(5)], tmp_path)
    assert not any(tmp_path.iterdir())


def test_decay_follows_the_image_encoder():
    assert build(depth=1).no_weight_decay() == {"positions", "inner.positions", "inner.special"}


def test_only_image_encoders_fit():
    with pytest.raises(ConfigError, match=r"'text-transformer' reads text; frames are pictures: one of .*image-vit"):
        component("encoders", "video-frames", encoder={"type": "text-transformer"})
    with pytest.raises(ValueError, match="heads=5 does not divide the width of the pooled frames, 32"):
        build(depth=1, heads=5)


def test_numpy_frames_of_every_size_are_read_by_the_image_encoder():
    encoder = build()
    a, b = (encoder.prepare(np.repeat(numbered(4, w, h), 2, 0)) for w, h in ((24, 20), (50, 90)))
    assert a["frames"].shape == b["frames"].shape == (4, 3, 16, 16)


@pytest.mark.parametrize("clips", [1, 2])
def test_what_is_asked_of_a_hidden_frame_is_what_the_frozen_image_encoder_made_of_it(clips: int):
    encoder = build(depth=1, frozen_frames=True, short="mask", clips=clips)
    inputs = batch(encoder, 2, 4)
    content, tokens = encoder.content(inputs), encoder.tokenize(inputs)
    assert not content.values.requires_grad
    pixels = inputs["frames"].flatten(0, -4)
    alone = MeanPool(MeanPool.Config(), 32)(encoder.inner({"pixels": pixels})).view(2, clips * 4, 32)
    torch.testing.assert_close(content.values, alone)
    torch.testing.assert_close(tokens.values - tokens.positions, content.values)
    assert torch.equal(content.observed.all(-1), tokens.grid.valid)
    assert content.observed.all(-1).sum(1).tolist() == [2 * clips, 4 * clips]


def test_masked_frame_embeddings_are_an_autoencoder_of_them():
    from mmrep.data.batch import Batch
    from mmrep.data.sample import stable_hash
    from mmrep.model import TowerConfig
    from mmrep.objectives.root import Root

    video = component("encoders", "video-frames", encoder=VIT, frames=4, depth=1, frozen_frames=True, short="mask")
    objective = component(
        "objectives", "masked", field="v", mask={"type": "random", "ratio": 0.5},
        predictor={"type": "transformer", "width": 16, "depth": 1, "heads": 2},
    )  # fmt: skip
    torch.manual_seed(0)
    model = Model(ModelConfig(dim=32, towers={"video": TowerConfig(encoder=video)}))
    root = Root(model, [objective], fields={"v": "video"}, views={}).train()
    encoder, (masked,) = model.tower("video").encoder, root.objectives.values()
    inputs = batch(encoder, 2, 4)
    given = Batch(ids=["a", "b"], inputs={"v": [inputs]}, present={"v": torch.ones(2, dtype=torch.bool)},
                  seeds=torch.tensor([3, 4]))  # fmt: skip
    tokens = encoder.tokenize(inputs)
    mask, errors = masked.masker(tokens.grid, given.seeds + stable_hash("v", 0, "mask", None)), []
    frames = encoder.content(inputs).values
    for i, count in enumerate((1, 2)):
        hidden = [n for n in mask.target[i, 0].tolist() if n >= 0]
        seen = [n for n in mask.visible[i, 0].tolist() if n >= 0]
        assert len(hidden) == count
        alone = encoder.tokenize({key: value[i : i + 1, : 2 * count] for key, value in inputs.items()})
        context = encoder.encode(alone, torch.tensor([seen])).tokens
        out = masked.predictor(context, torch.tensor([seen]), alone, torch.tensor([hidden]))[0]
        errors.append((out - frames[i, hidden]).square().mean())
    torch.testing.assert_close(root(given)["loss"], torch.stack(errors).mean())


def test_frames_that_learn_are_no_target():
    assert build(depth=1, frozen_frames=True).supports == VideoFrames.supports
    assert not build(depth=1).supports & {"content", "mask_token"}
    assert not build(frozen_frames=True).supports & {"content", "mask_token"}
    with pytest.raises(ValueError, match="content"):
        build(depth=1).content(batch(build(depth=1), 4))
