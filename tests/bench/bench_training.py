"""A training step of a small CLIP: open_clip's own `train_one_epoch`, a hand-written loop, and mmrep's trainer.

Run:  python tests/bench/bench_training.py [--precision bf16] [--batch 128] [--words 4 12] [--compile]

All three train the same open_clip model (a ViT of 64 patches, 6 layers and width 256; a causal text transformer of 6
layers and width 256, 77 places) from the same weights on the same ready batches: reading and collating are not timed.
open_clip gets float pictures and texts padded to 77 places, as its loader gives them; mmrep gets what its loader gives,
bytes and texts padded to the longest of the batch. Contestants are interleaved in one process; figures are medians of
process CPU time (and of wall time) over rounds, with the quartiles.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional as F

NAME = "bench-small"
SIZE, PLACES = 64, 77
MODEL = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": SIZE, "patch_size": 8, "width": 256, "head_width": 64, "layers": 6},
    "text_cfg": {"context_length": PLACES, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 6},
}
LR, DECAY, BETAS, EPS, CLIP = 5e-4, 0.2, (0.9, 0.98), 1e-6, 1.0
WORDS = "a the red blue small old bird house river of on under photo two running child green train with snow".split()


class Data:
    """The same samples in the form of each library."""

    def __init__(self, root: Any, batches: int, size: int, words: tuple[int, int]) -> None:
        from PIL import Image

        from mmrep.data.batch import Batch

        generator = torch.Generator().manual_seed(0)

        def number(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (), generator=generator))

        self.ours, self.theirs = [], []
        image, text = root.model.tower("image").encoder, root.model.tower("text").encoder
        for _ in range(batches):
            pixels = torch.randint(0, 256, (size, SIZE, SIZE, 3), dtype=torch.uint8, generator=generator)
            captions = [" ".join(WORDS[number(0, len(WORDS) - 1)] for _ in range(number(*words))) for _ in range(size)]
            pictures = image.collate([image.prepare(Image.fromarray(p.numpy())) for p in pixels])
            self.ours.append(Batch(
                ids=[str(i) for i in range(size)],
                inputs={"image": [pictures], "caption": [text.collate([text.prepare(c) for c in captions])]},
                present=dict.fromkeys(("image", "caption"), torch.ones(size, dtype=torch.bool)),
                seeds=torch.arange(size),
            ))  # fmt: skip
            self.theirs.append((image.normalize(pictures["pixels"]), text.tokenizer(captions)))


class Loader:
    """Ready batches as an endless map-style loader."""

    epoch = 0

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches
        self.steps_per_epoch = len(batches)

    def __iter__(self) -> Iterator[Any]:
        yield from self.batches
        self.epoch += 1

    def end_epoch(self) -> None: ...
    def close(self) -> None: ...
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def build_root() -> Any:
    from mmrep.config import component
    from mmrep.model import Model, ModelConfig, TowerConfig
    from mmrep.objectives.root import Root

    def tower(kind: str) -> TowerConfig:
        return TowerConfig(
            encoder=component("encoders", f"open-clip-{kind}", model=NAME),
            pool=component("pools", "native"), projector=component("projectors", "identity"),
        )  # fmt: skip

    torch.manual_seed(0)
    model = Model(ModelConfig(dim=256, towers={"image": tower("image"), "text": tower("text")}))
    pairs = [{"between": ["image", "caption"]}]
    contrast = component("objectives", "contrastive", pairs=pairs, use_group=False)
    return Root(model, [contrast], fields={"image": "image", "caption": "text"}, views={})


def their_model(root: Any) -> Any:
    """open_clip's model with the weights of ours."""
    import open_clip

    model = open_clip.create_model(NAME, output_dict=True)
    image, text = root.model.tower("image").encoder.trunk.visual, root.model.tower("text").encoder.text
    model.visual.load_state_dict(image.state_dict())
    missing = model.load_state_dict(text.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert all(key.startswith("visual.") or key == "logit_scale" for key in missing.missing_keys)
    return model


def groups(model: Any) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    plain = [p for n, p in named if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n]
    rest = [p for n, p in named if all(p is not q for q in plain)]
    return [{"params": plain, "weight_decay": 0.0}, {"params": rest, "weight_decay": DECAY}]


def open_clip_loop(model: Any, data: Data, precision: str) -> Callable[[int], None]:
    from open_clip.loss import ClipLoss
    from open_clip_train.train import train_one_epoch

    optimizer = torch.optim.AdamW(groups(model), lr=LR, betas=BETAS, eps=EPS)
    args = SimpleNamespace(
        device="cpu", precision={"fp32": "fp32", "bf16": "amp_bf16"}[precision], distill=False, accum_freq=1,
        skip_scheduler=True, grad_clip_norm=CLIP, horovod=False, rank=0, local_rank=0, world_size=1, wandb=False,
        log_every_n_steps=10, batch_size=len(data.ours[0]), distributed=False, log_local=False,
    )  # fmt: skip

    def run(steps: int) -> None:
        chosen = [data.theirs[i % len(data.theirs)] for i in range(steps)]
        loader = type("Batches", (list,), {"num_batches": steps, "num_samples": steps * args.batch_size})(chosen)
        source = SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)
        train_one_epoch(model, {"train": source}, ClipLoss(), 0, optimizer, None, None, None, args)

    return run


def by_hand(model: Any, data: Data, precision: str) -> Callable[[int], None]:
    """What a careful user writes: autocast, fused AdamW, cross-entropy of the logits both ways."""
    optimizer = torch.optim.AdamW(groups(model), lr=LR, betas=BETAS, eps=EPS, fused=True)

    def run(steps: int) -> None:
        for i in range(steps):
            pictures, texts = data.theirs[i % len(data.theirs)]
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                a, b = model.encode_image(pictures, normalize=True), model.encode_text(texts, normalize=True)
                logits = model.logit_scale.exp() * a @ b.T
                target = torch.arange(len(logits))
                loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()

    return run


def ours(root: Any, data: Data, precision: str, compile: bool) -> Callable[[int], None]:
    from mmrep.schedules import Schedule
    from mmrep.training.optim import OptimConfig
    from mmrep.training.trainer import TrainConfig, Trainer

    optim = OptimConfig(lr=LR, weight_decay=DECAY, schedule=Schedule(shape="constant"), clip_norm=CLIP)
    options: dict[str, Any] = {"compile": True} if compile else {}
    train = TrainConfig(steps=1, precision="bf16" if precision == "bf16" else "fp32", **options)
    trainer = Trainer(root, Loader(data.ours), train=train, optim=optim)

    def run(steps: int) -> None:
        trainer.total_steps = trainer.step + steps
        trainer.fit()

    return run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--words", type=int, nargs=2, default=(4, 12))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable(logging.INFO)
    import open_clip

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, f"{NAME}.json").write_text(json.dumps(MODEL))
        open_clip.add_model_config(folder)
        root = build_root()
        data = Data(root, 4, options.batch, tuple(options.words))
        model = their_model(root)
    with torch.no_grad():  # the same function: else the comparison would be of two models
        a, b = root.model.tower("text")(data.ours[0].inputs["caption"][0]), model.encode_text(data.theirs[0][1], True)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        a, b = root.model.tower("image")(data.ours[0].inputs["image"][0]), model.encode_image(data.theirs[0][0], True)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    contestants = {
        "open_clip train_one_epoch": open_clip_loop(copy.deepcopy(model), data, options.precision),
        "by hand, fused AdamW": by_hand(model, data, options.precision),
        "mmrep": ours(root, data, options.precision, options.compile),
    }
    for run in contestants.values():
        run(2)
    cpu: dict[str, list[float]] = {name: [] for name in contestants}
    wall: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(options.rounds):
        for name, run in contestants.items():
            start, started = time.process_time(), time.perf_counter()
            run(options.steps)
            cpu[name].append((time.process_time() - start) / options.steps)
            wall[name].append((time.perf_counter() - started) / options.steps)
    places = [view["ids"].shape[1] for batch in data.ours for view in batch.inputs["caption"]]
    print(f"{options.precision}, batch {options.batch}, {options.threads} thread(s), captions of at most {max(places)} "
          f"of {PLACES} places, {options.rounds} rounds of {options.steps} steps")  # fmt: skip
    base = next(iter(contestants))
    for name in contestants:
        ratios = [b / t for b, t in zip(cpu[base], cpu[name], strict=True)]
        walls = [b / t for b, t in zip(wall[base], wall[name], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{name:28s} {1000 * statistics.median(cpu[name]):8.0f} ms CPU a step   samples/s x {middle:.2f} "
              f"({low:.2f}-{high:.2f})   by wall time x {statistics.median(walls):.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
