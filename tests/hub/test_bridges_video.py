"""Joint checkpoints of transformers with a video tower: what their own calls give."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import mmrep
from mmrep.config import component
from tests.hub import joint_toys

TEXTS = ["w1 w2 w3", "w9", "w4 " * 30]


def video(count: int, height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255 - 40 * seed, (count, height, width, 3), dtype=np.uint8)


VIDEOS = [video(4, 30, 41, 0), video(4, 64, 20, 1), video(4, 16, 16, 2)]


def tower(path, **fields):
    return component("encoders", "hf-video", path=str(path), local_files_only=True, **fields).build().eval()


@pytest.mark.parametrize("images", ["VideoMAEImageProcessor", "CLIPImageProcessor"])
def test_x_clips_towers_are_the_librarys(images, tmp_path):
    model, processor = joint_toys.xclip(tmp_path, images)
    ours = mmrep.load(tmp_path)
    pixels = [processor(videos=list(frames), return_tensors="pt")["pixel_values"] for frames in VIDEOS]
    pixels = torch.stack([p.reshape(4, 3, 16, 16) for p in pixels])
    coded = processor.tokenizer(TEXTS, return_tensors="pt", padding=True, truncation=True, max_length=16)
    with torch.no_grad():
        videos = F.normalize(model.get_video_features(pixels).pooler_output, dim=1)
        coded = {name: coded[name] for name in ("input_ids", "attention_mask")}
        texts = F.normalize(model.get_text_features(**coded).pooler_output, dim=1)
    np.testing.assert_allclose(ours.encode(VIDEOS, "video"), videos, atol=2e-5)
    np.testing.assert_allclose(ours.encode(TEXTS, "text"), texts, atol=2e-5)
    assert (videos[0] - videos[1]).abs().max() > 1e-3
    assert torch.equal(ours.temperature("default").log_scale, model.logit_scale.detach().reshape(1))
    one = ours.encode(VIDEOS[:1], "video")  # frames of other videos are no neighbours
    np.testing.assert_allclose(one[0], videos[0], atol=2e-5)
    ours.save_pretrained(tmp_path / "again")
    again = mmrep.load(tmp_path / "again")
    np.testing.assert_array_equal(again.encode(VIDEOS, "video"), ours.encode(VIDEOS, "video"))
    np.testing.assert_array_equal(again.encode(TEXTS, "text"), ours.encode(TEXTS, "text"))


def test_x_clips_tokens_and_layers_and_gradients_are_the_librarys(tmp_path):
    model, processor = joint_toys.xclip(tmp_path)
    encoder = tower(tmp_path)
    pixels = processor(videos=list(VIDEOS[0]), return_tensors="pt")["pixel_values"]
    out = model.vision_model(pixels[0], output_hidden_states=True)
    inputs = encoder.collate([encoder.prepare(VIDEOS[0])])
    got = encoder.encode(encoder.tokenize(inputs), layers=[1, 2])

    def ordered(values):  # [4, 17, D]: class tokens first
        return torch.cat([values[:, 0], values[:, 1:].flatten(0, 1)])[None]

    torch.testing.assert_close(got.tokens.values, ordered(out.last_hidden_state), atol=1e-5, rtol=1e-4)
    for layer, theirs in zip(got.layers, out.hidden_states[1:], strict=True):
        torch.testing.assert_close(layer, ordered(theirs), atol=1e-5, rtol=1e-4)
    assert got.tokens.grid.special.sum() == 4
    assert got.tokens.grid.shape == (4, 4, 4)
    got.pooled.square().sum().backward()
    model.get_video_features(pixels).pooler_output.square().sum().backward()
    theirs = dict(model.named_parameters())
    for name, parameter in encoder.model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-4, rtol=1e-3, msg=name)


def test_x_clip_of_several_clips_and_without_its_space(tmp_path):
    joint_toys.xclip(tmp_path)
    encoder = tower(tmp_path, clips=2)
    eight = np.concatenate([VIDEOS[0], VIDEOS[0][::-1]])
    inputs = encoder.collate([encoder.prepare(eight)])
    single = tower(tmp_path)
    with torch.no_grad():
        both = encoder(inputs)
        rows = single({key: value[0] for key, value in inputs.items()})
        torch.testing.assert_close(both.pooled, rows.pooled.mean(0, keepdim=True))
        none = {key: value[:0] for key, value in inputs.items()}
        assert encoder(none).pooled.shape == (0, 12)
        bare = tower(tmp_path, projection=False)
        assert bare(bare.collate([bare.prepare(eight)])).pooled is None
    assert not any("mit" in n or "projection" in n or "post_layernorm" in n for n, _ in bare.named_parameters())
    bare.save_files(tmp_path / "files")
    again = type(bare)(bare.config, files=tmp_path / "files").eval()
    again.load_state_dict(bare.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(again(bare.collate([bare.prepare(eight)])).tokens.values,
                                   bare(bare.collate([bare.prepare(eight)])).tokens.values)  # fmt: skip


def test_x_clip_reads_the_preprocessing_file_of_its_released_checkpoints(tmp_path):
    """A file of before version 5: the name of the extractor, and one number for the size."""
    joint_toys.xclip(tmp_path)
    wanted = mmrep.load(tmp_path).encode(VIDEOS, "video")
    path = tmp_path / "processor_config.json"
    fields = json.loads(path.read_text())["image_processor"]
    path.unlink()
    del fields["image_processor_type"]
    fields |= {"feature_extractor_type": "VideoMAEFeatureExtractor", "size": 20, "crop_size": 16}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    np.testing.assert_array_equal(mmrep.load(tmp_path).encode(VIDEOS, "video"), wanted)
