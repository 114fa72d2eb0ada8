"""A folder without what prepares a model's inputs: the message names the file and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

import mmrep
from mmrep.hub.fetch import ModelFolderError
from tests.modalities.audio import audio_tiny_hf
from tests.modalities.image import image_tiny_hf
from tests.modalities.text import tiny_hf
from tests.modalities.video import video_tiny_hf

FOLDERS = {"image": image_tiny_hf, "audio": audio_tiny_hf, "video": video_tiny_hf}


@pytest.mark.parametrize(("modality", "kind", "message"), [
    ("image", "vit", r"no image processor: preprocessor_config.json .*AutoImageProcessor.from_pretrained"),
    ("image", "resnet", r"no image processor: preprocessor_config.json"),
    ("audio", "wav2vec2", r"no feature extractor: preprocessor_config.json .*AutoFeatureExtractor.from_pretrained"),
    ("audio", "ast", r"no feature extractor: preprocessor_config.json"),
    ("video", "videomae", r"no video processor: video_preprocessor_config.json or preproc.*AutoVideoProcessor.from_p"),
])  # fmt: skip
def test_no_processor(modality: str, kind: str, message: str, tmp_path: Path):
    model, _ = FOLDERS[modality].make(kind)
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelFolderError, match=message) as caught:
        mmrep.load(tmp_path)
    assert "Copy it from where the model came from" in str(caught.value)
    assert "huggingface.co" not in str(caught.value), "the folder is local: no talk of the hub"


def test_a_processor_that_cannot_be_read(tmp_path: Path):
    model, _ = image_tiny_hf.make("vit")
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ModelFolderError, match="its image processor cannot be read"):
        mmrep.load(tmp_path)


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "llama", "t5", "clip"])
def test_no_tokenizer(kind: str, tmp_path: Path):
    """Of most kinds transformers makes a tokenizer without a word, and every text would be one."""
    model, _ = tiny_hf.make(kind)
    model.save_pretrained(tmp_path)
    if kind == "clip":
        image_tiny_hf.make("clip")[1].save_pretrained(tmp_path)
    with pytest.raises(ModelFolderError, match=r"tokenizer.* tokenizer.json and tokenizer_config.json .*Copy them"):
        mmrep.load(tmp_path)


def test_a_tokenizer_config_alone_is_no_tokenizer(tmp_path: Path):
    model, tokenizer = tiny_hf.make("bert")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelFolderError, match="tokenizer"):
        mmrep.load(tmp_path)


def test_a_tokenizer_of_bytes_needs_no_vocabulary(tmp_path: Path):
    import transformers

    model, _ = tiny_hf.make("t5")
    model.config.vocab_size = 384
    model.resize_token_embeddings(384)
    model.save_pretrained(tmp_path)
    transformers.ByT5Tokenizer().save_pretrained(tmp_path)
    assert mmrep.load(tmp_path).encode(["é"]).shape == (1, 16)
