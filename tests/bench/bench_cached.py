"""A large batch in micro-batches against the same batch at once: time, peak memory, and what a peer makes of it.

Run:  python tests/bench/bench_cached.py [--batch 512] [--micro 32] [--rounds 3]

The first table trains the small CLIP of `bench_training` on one batch: plainly, and in parts. The second does the same
to a sentence encoder (MiniLM's architecture, random weights) on pairs of texts, beside sentence-transformers' own two
losses, plain and cached. Times are process CPU time of forward and backward, contestants interleaved in one process,
medians; memory is what the peak resident set of a process of its own grows by over its state with the batch in place,
after a warm-up on eight samples.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_training  # beside this file
import torch

Step = Callable[[], None]
CLIP, TEXT = ("clip plain", "clip in parts"), ("text plain", "text in parts", "ST plain", "ST cached")


def clip_step(batch: int, micro: int | None) -> Step:
    import open_clip
    from PIL import Image

    from mmrep.data.reader import Reader
    from mmrep.data.sample import Sample

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, f"{bench_training.NAME}.json").write_text(json.dumps(bench_training.MODEL))
        open_clip.add_model_config(folder)
        root = bench_training.build_root()
    reader = Reader({"image": root.model.tower("image").encoder, "caption": root.model.tower("text").encoder})
    size = bench_training.SIZE
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, generator=generator)
    captions = texts(batch)
    samples = [
        Sample(id=str(i), fields={"image": Image.fromarray(pixels[i].numpy()), "caption": captions[i]})
        for i in range(batch)
    ]
    return _step(root, reader.collate([reader.read(sample, 0) for sample in samples], micro))


def texts(n: int) -> list[str]:
    generator, words = torch.Generator().manual_seed(0), bench_training.WORDS
    picks = torch.randint(0, len(words), (n, 10), generator=generator).tolist()
    return [" ".join(words[i] for i in row) for row in picks]


def _sentence_encoder(folder: Path) -> None:
    """MiniLM's architecture with random weights and a tokenizer of its own, as a Hugging Face folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *bench_training.WORDS]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(words), **shape)).save_pretrained(folder)


def text_step(folder: Path, batch: int, micro: int | None) -> Step:
    from mmrep.config import component
    from mmrep.data.reader import Reader
    from mmrep.data.sample import Sample
    from mmrep.model import Model, ModelConfig, TemperatureConfig, TowerConfig
    from mmrep.objectives.root import Root

    encoder = component("encoders", "hf-text", path=str(folder))
    tower = TowerConfig(encoder=encoder, projector=component("projectors", "identity"))
    temperatures = {"default": TemperatureConfig(scale=20.0, learned=False)}
    model = Model(ModelConfig(dim=384, towers={"text": tower}, temperatures=temperatures))
    loss = {"type": "info-nce", "symmetric": False}
    contrast = component("objectives", "contrastive", pairs=[{"between": ["a", "b"]}], use_group=False, loss=loss)
    root = Root(model, [contrast], fields={"a": "text", "b": "text"}, views={})
    reader = Reader({"a": model.tower("text").encoder, "b": model.tower("text").encoder})
    pairs = zip(texts(batch), reversed(texts(batch)), strict=True)
    samples = [Sample(id=str(i), fields={"a": a, "b": b}) for i, (a, b) in enumerate(pairs)]
    return _step(root, reader.collate([reader.read(sample, 0) for sample in samples], micro))


def their_step(folder: Path, batch: int, micro: int | None) -> Step:
    from sentence_transformers import SentenceTransformer, losses, models

    model = SentenceTransformer(modules=[models.Transformer(str(folder)), models.Pooling(384)], device="cpu")
    plain, cached = losses.MultipleNegativesRankingLoss, losses.CachedMultipleNegativesRankingLoss
    loss = plain(model) if micro is None else cached(model, mini_batch_size=micro)
    features = [model.tokenize(texts(batch)), model.tokenize(list(reversed(texts(batch))))]
    model.train()

    def run() -> None:
        model.zero_grad()
        loss([dict(f) for f in features], torch.zeros(batch, dtype=torch.long)).backward()

    return run


def _step(root: Any, batch: Any) -> Step:
    from accelerate import Accelerator

    from mmrep.training.cached import forward_backward

    engine = Accelerator(cpu=True)
    root.train()

    def run() -> None:
        root.zero_grad()
        forward_backward(root, engine, batch)

    return run


def build(name: str, folder: Path, batch: int, micro: int) -> Step:
    parts = None if name.endswith("plain") else micro
    if name in CLIP:
        return clip_step(batch, parts)
    return (their_step if name.startswith("ST") else text_step)(folder, batch, parts)


def peak_mebibytes(name: str, folder: Path, batch: int, micro: int) -> float:
    command = [sys.executable, __file__, "--measure", name, "--folder", str(folder)]
    command += ["--batch", str(batch), "--micro", str(micro)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _resident(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if key in line) / 1024


def measure(name: str, folder: Path, batch: int, micro: int) -> None:
    """Print the peak resident set of one step, in MiB over the state before it; the gradients are part of it."""
    torch.set_num_threads(1)
    build(name, folder, 8, 4)()
    step = build(name, folder, batch, micro)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    step()
    print(_resident("VmHWM") - before)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--micro", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--table", choices=["clip", "text"], action="append")
    parser.add_argument("--measure")
    parser.add_argument("--folder")
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, Path(options.folder), options.batch, options.micro)
        return
    torch.set_num_threads(1)
    print(f"batch {options.batch} in parts of {options.micro}, fp32, 1 thread, {options.rounds} rounds")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _sentence_encoder(folder)
        wanted = options.table or ["clip", "text"]
        for table in (t for t in (CLIP, TEXT) if t[0].split()[0] in wanted):
            steps = {name: build(name, folder, options.batch, options.micro) for name in table}
            times: dict[str, list[float]] = {name: [] for name in table}
            for _ in range(options.rounds):
                for name, step in steps.items():
                    start = time.process_time()
                    step()
                    times[name].append(time.process_time() - start)
            del steps
            memory = {name: peak_mebibytes(name, folder, options.batch, options.micro) for name in table}
            for name in table:
                base = "ST plain" if name.startswith("ST") else table[0]
                ratios = [a / b for a, b in zip(times[name], times[base], strict=True)]
                print(f"{name:14s} {statistics.median(times[name]):7.2f} s   {statistics.median(ratios):.2f} of plain "
                      f"({min(ratios):.2f}-{max(ratios):.2f})   peak {memory[name]:6.0f} MiB, "
                      f"{memory[name] / memory[base]:.2f} of plain")  # fmt: skip


if __name__ == "__main__":
    main()
