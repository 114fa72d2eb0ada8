"""Representation tokens against a slow twin, in our own encoders and a tiny CLIP; shared, saved, read out, refused."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import mmrep
from mmrep._unused import freeze_unused
from mmrep.config import ConfigError, component, parse
from mmrep.data.batch import Batch
from mmrep.finetune._injection import Injection, _widened
from mmrep.finetune.representation import NAME, injection, known_classes
from mmrep.model import Model, ModelConfig
from mmrep.objectives.root import Root
from mmrep.tower import TowerConfig
from tests.modalities.image import image_tiny_hf
from tests.modalities.text import tiny_hf

VIT = {"type": "image-vit", "size": 8, "patch": 4, "width": 16, "depth": 3, "heads": 2}
CNN = {"type": "image-cnn", "size": 8, "widths": [8], "depths": [1]}
TEXT = {"type": "text-transformer", "tokenizer": "bytes", "width": 12, "depth": 3, "heads": 2, "max_length": 24}
MMRL = {"type": "representation-tokens", "begin": 2, "count": 3, "width": 5}
MORE = {**MMRL, "rank": 2, "keep": 0.9}
CLASSES = ("red disc", "blue bar", "frame")


def build(adapter=MMRL, vit=VIT, text=TEXT, pools=("cls", "eos"), dim=6, seed=0, **fields) -> Model:
    torch.manual_seed(seed)
    image = {"encoder": vit, "pool": pools[0], "adapter": {**adapter, "read": True}, "frozen": ["projector.*"]}
    words = {"encoder": text, "pool": pools[1], "adapter": adapter, "frozen": ["projector.*"]}
    towers = {"image": parse(TowerConfig, {**image, **fields}), "text": parse(TowerConfig, words)}
    model = Model(ModelConfig(dim=dim, towers=towers)).double().eval()
    model.temperature("default").requires_grad_(False)
    with torch.no_grad():  # away from the zeros that products of low rank begin with
        for name, parameter in model.named_parameters():
            if f".{NAME}." in name:
                parameter.normal_(std=0.5)
    return model


def inputs(model, name, n=3):
    encoder = model.tower(name).encoder
    return encoder.collate([encoder.prepare(raw) for raw in encoder.examples(n, 1)])


def tokens_for(made, number):
    """What block ``number`` (of those that read tokens) is given, token by token."""
    weight = made.weight[number] if made.left is None else made.weight[0] + made.left[number] @ made.right[number]
    return torch.stack([weight @ token + made.bias[number] for token in made.tokens])


def slow(encoder, values, adapter, causal=False, valid=None):
    """Text by text, block by block, with the whole mask: the tokens stand in the sequence all the while."""
    made, K = injection(encoder), adapter["count"]
    rows, means = [], []
    for row, sequence in enumerate(values):
        x = sequence[None] if valid is None else sequence[None, valid[row]]
        for number, block in enumerate(encoder.transformer.blocks, 1):
            if number >= adapter["begin"]:
                fresh = tokens_for(made, number - adapter["begin"])[None]
                if number == adapter["begin"]:
                    x = torch.cat([x[:, :1], fresh, x[:, 1:]], 1)
                else:
                    share = adapter.get("keep", 1.0)
                    x = torch.cat([x[:, :1], share * fresh + (1 - share) * x[:, 1 : 1 + K], x[:, 1 + K :]], 1)
            x = block(x, torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()[None, None] if causal else None)
        last = x[:, 1 : 1 + K]
        means.append(F.layer_norm(last, last.shape[-1:]).mean(1))
        rows.append(torch.cat([x[:, :1], x[:, 1 + K :]], 1)[0])
    return rows, torch.cat(means)


@pytest.mark.parametrize("adapter", [MMRL, MORE], ids=["mmrl", "mmrl++"])
@pytest.mark.parametrize("causal", [False, True])
def test_it_is_a_loop_over_blocks_with_the_tokens_in_the_sequence(adapter, causal):
    model = build(adapter, text={**TEXT, "causal": causal})
    tower, batch = model.tower("image"), inputs(model, "image")
    encoding = tower.encoding(batch)
    with tower.without_adapter():  # the blocks as they are
        rows, means = slow(tower.encoder, tower.encoder.tokenize(batch).values, adapter)
    torch.testing.assert_close(encoding.tokens.values, tower.encoder.norm(torch.stack(rows)))
    torch.testing.assert_close(encoding.extra[NAME], means @ injection(tower.encoder).head.weight.T)
    words, texts = model.tower("text"), inputs(model, "text")
    plain = words.encoder.tokenize(texts)
    with words.without_adapter():
        rows, _ = slow(words.encoder, plain.values, adapter, causal, texts["valid"])
    found = words.encoding(texts).tokens.values
    for row, wanted in enumerate(rows):
        torch.testing.assert_close(found[row, texts["valid"][row]], words.encoder.norm(wanted))
    trained = [p for n, p in model.named_parameters() if p.requires_grad and "head" not in n and ".text." in n]
    mine, theirs = (
        torch.autograd.grad(loss, trained, retain_graph=True)
        for loss in (found[texts["valid"]].square().sum(), words.encoder.norm(torch.cat(rows)).square().sum())
    )
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_only_tokens_maps_and_head_train_and_the_towers_share_the_tokens():
    model = build(MORE)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    own = {"weight", "bias", "left", "right"}
    wanted = {f"towers.{t}.encoder.{NAME}.{part}" for t in ("image", "text") for part in own}
    assert trained == wanted | {f"towers.image.encoder.{NAME}.{part}" for part in ("tokens", "head.weight")}
    assert freeze_unused(model) == {}
    twin = copy.deepcopy(model)
    with torch.no_grad():
        injection(twin.tower("text").encoder).tokens.mul_(2)
    shared = injection(twin.tower("image").encoder).tokens
    assert torch.equal(shared, 2 * injection(model.tower("image").encoder).tokens)
    batch = inputs(model, "image")
    assert not torch.equal(twin.tower("image")(batch), model.tower("image")(batch))  # hooks of the copy read its own


@pytest.mark.parametrize("kind", ["own", "clip"])
def test_saved_and_loaded_with_the_decoupled_rule(kind, tmp_path: Path):
    options = {} if kind == "own" else clip(tmp_path / "clip")
    model = build({**MMRL, "begin": 2}, **options).float()
    model.save_pretrained(tmp_path / "saved")
    loaded = mmrep.load(tmp_path / "saved")
    shared = [injection(loaded.tower(name).encoder).tokens for name in ("image", "text")]
    assert shared[0] is shared[1]
    raw = model.tower("image").encoder.examples(3, 1)
    plain = loaded.encode(raw, "image")
    np.testing.assert_array_equal(plain, model.encode(raw, "image"))
    with known_classes(loaded):
        blended = loaded.encode(raw, "image")
    np.testing.assert_array_equal(loaded.encode(raw, "image"), plain)
    tower = loaded.tower("image")
    with torch.no_grad():
        second = F.normalize(tower.encoding(inputs(loaded, "image")).extra[NAME], dim=1).numpy()
    wanted = 0.7 * plain + 0.3 * second
    np.testing.assert_allclose(blended, wanted / np.linalg.norm(wanted, axis=1, keepdims=True), atol=1e-5)


def clip(folder: Path) -> dict:
    """Both halves of tiny random CLIPs, as encoders of a model."""
    for name, module in (("image", image_tiny_hf), ("text", tiny_hf)):
        torch.manual_seed(1)
        for part in module.make("clip"):
            part.save_pretrained(folder / name)
    vit, text = ({"type": f"hf-{n}", "path": str(folder / n)} for n in ("image", "text"))
    return {"vit": vit, "text": text, "pools": ("native", "native")}


def test_in_a_tiny_clip_it_is_a_loop_over_the_librarys_layers(tmp_path: Path):
    """Causal text and plain vision layers, called by hand with whole masks."""
    model = build(**clip(tmp_path))
    K = MMRL["count"]
    vision, texts = model.tower("image"), model.tower("text")
    trunk, batch = vision.encoder.trunk, inputs(model, "image")
    found = vision.encoding(batch)
    x = trunk.model.pre_layrnorm(trunk.tokenize(vision.encoder.normalize(batch["pixels"])).values)
    with torch.no_grad(), texts.without_adapter(), vision.without_adapter():
        for number, block in enumerate(trunk.blocks(), 1):
            if number >= 2:
                fresh = tokens_for(injection(vision.encoder), number - 2).expand(len(x), -1, -1)
                x = torch.cat([x[:, :1], fresh, x[:, 1 if number == 2 else 1 + K :]], 1)
            x = block(x, None)
        wanted = trunk.projection(trunk.model.post_layernorm(x[:, 0]))
    torch.testing.assert_close(found.pooled, wanted)
    words, n = inputs(model, "text"), inputs(model, "text")["valid"].sum(1)
    read = texts.encoding(words)
    inner = texts.encoder.model.text_model if hasattr(texts.encoder.model, "text_model") else texts.encoder.model
    for row, length in enumerate(n.tolist()):
        with torch.no_grad(), texts.without_adapter():
            x = inner.embeddings(words["ids"][row : row + 1, :length])
            for number, block in enumerate(texts.encoder.layer_modules(), 1):
                if number >= 2:
                    fresh = tokens_for(injection(texts.encoder), number - 2)[None]
                    x = torch.cat([x[:, :1], fresh, x[:, 1 if number == 2 else 1 + K :]], 1)
                N = x.shape[1]
                mask = torch.zeros(1, 1, N, N, dtype=x.dtype).masked_fill(~torch.ones(N, N).tril().bool(), -torch.inf)
                out = block(x, mask)
                x = out[0] if isinstance(out, tuple) else out
            last = texts.encoder._projection(inner.final_layer_norm(x[0, -1]))
        torch.testing.assert_close(read.pooled[row], last)


def test_a_mask_grows_by_what_the_first_token_sees():
    causal = torch.ones(3, 3, dtype=torch.bool).tril()
    assert torch.equal(_widened(causal, 3, 2), torch.ones(5, 5, dtype=torch.bool).tril())
    padded = torch.tensor([[True, True, False]])[:, None, None]
    wide = torch.tensor([True, True, True, True, False])
    assert torch.equal(_widened(padded, 3, 2)[0, 0, 0], wide)
    assert torch.equal(_widened(padded.expand(1, 1, 3, 3), 3, 2)[0, 0], wide.expand(5, 5))
    score = torch.zeros(3, 3).masked_fill(~causal, -9.0)
    assert torch.equal(_widened(score, 3, 2), torch.zeros(5, 5).masked_fill(~torch.ones(5, 5).tril().bool(), -9.0))


def root_of(model, **fields) -> Root:
    given = {"field": "x", "text": "text", "classes": CLASSES, "near": 0.5, "near_templates": ("a {}",), **fields}
    objectives = [component("objectives", "classify", **given), component("objectives", "anchor", fields=["x"])]
    root = Root(model, objectives, fields={"x": "image"}, views={})
    root.fit(lambda field: [])
    return root.train()


def batch_of(model) -> Batch:
    return Batch(
        ids=["0", "1", "2"], inputs={"x": [inputs(model, "image")]}, present={"x": torch.ones(3, dtype=torch.bool)},
        seeds=torch.arange(3), labels=["frame", "red disc", "blue bar"],
    )  # fmt: skip


def test_the_loss_is_that_of_mmrl():
    """Two cross-entropies and two cosines to what the towers said without tokens (equation 12, lambda 1)."""
    model = build()
    root, batch, labels = root_of(model), batch_of(model), torch.tensor([2, 0, 1])
    found = root(batch)["loss"]
    image, text = model.tower("image"), model.tower("text")

    def words(template):
        encoder = text.encoder
        return text(encoder.collate([encoder.prepare(template.format(name)) for name in CLASSES]))

    encoding = image.encoding(batch.inputs["x"][0])
    first = image.project(image.pool(encoding))
    second = F.normalize(encoding.extra[NAME], dim=1)
    classes, scale = words("{}"), model.temperature("default").scale
    with torch.no_grad(), image.without_adapter(), text.without_adapter():
        old_image, old_text = image(batch.inputs["x"][0]), words("a {}")
    wanted = 0.7 * F.cross_entropy(scale * first @ classes.T, labels)
    wanted = wanted + 0.3 * F.cross_entropy(scale * second @ classes.T, labels)
    wanted = wanted + (1 - F.cosine_similarity(first, old_image)).mean()
    wanted = wanted + (1 - F.cosine_similarity(classes, old_text)).mean()
    torch.testing.assert_close(found, wanted)
    trained = [p for p in root.parameters() if p.requires_grad]
    for a, b in zip(torch.autograd.grad(found, trained), torch.autograd.grad(wanted, trained), strict=True):
        torch.testing.assert_close(a, b)


def test_it_learns():
    root = root_of(build(MORE))
    batch, losses = batch_of(root.model), []
    before = {n: p.clone() for n, p in root.named_parameters()}
    optimizer = torch.optim.Adam([p for p in root.parameters() if p.requires_grad], lr=0.02)
    for _ in range(30):
        out = root(batch)
        losses.append(out["loss"].item())
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]
    moved = {n for n, p in root.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in root.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("wrong", "message"), [
    ({"adapter": {**MMRL, "begin": 9}}, "has 3 layers"),
    ({"vit": CNN, "pools": ("mean", "eos")}, "model.towers.image"),
])  # fmt: skip
def test_what_cannot_be_is_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        build(**wrong)


def test_tokens_are_of_one_size_and_cannot_be_merged():
    towers = {n: {"encoder": VIT, "adapter": {**MMRL, "count": k}} for n, k in (("a", 2), ("b", 3))}
    with pytest.raises(ConfigError, match=r"model\.towers\.b.*they share them"):
        Model(ModelConfig(dim=4, towers={n: parse(TowerConfig, t) for n, t in towers.items()}))
    with pytest.raises(ValueError, match="go on with the adapter"):
        build().merged()
    towers = {"a": parse(TowerConfig, {"encoder": VIT, "adapter": MMRL})}
    with pytest.raises(ValueError, match="read: true"), known_classes(Model(ModelConfig(dim=4, towers=towers))):
        pass


def test_the_rest_of_a_model_begins_as_without_it():
    """What is built after the tokens draws the numbers that it draws without them."""
    made = []
    for adapter in (None, {**MMRL, "read": True}):
        torch.manual_seed(4)
        towers = {name: parse(TowerConfig, {"encoder": VIT, "adapter": adapter}) for name in ("a", "b")}
        made.append(Model(ModelConfig(dim=4, towers=towers)).state_dict())
    assert all(torch.equal(value, made[1][name]) for name, value in made[0].items())


def test_of_no_samples_there_are_no_second_embeddings(tmp_path: Path):
    model = build(**clip(tmp_path))
    tower = model.tower("image")
    none = {name: value[:0] for name, value in inputs(model, "image").items()}
    assert tower.encoding(none).extra[NAME].shape == (0, 6)
    with known_classes(model):
        assert tower(none).shape == (0, 6)


def test_without_the_adapter_and_again_with_it():
    model = build(MORE)
    tower, batch = model.tower("image"), inputs(model, "image")
    before = tower(batch)
    with tower.without_adapter():
        assert NAME not in tower.encoding(batch).extra
    assert torch.equal(tower(batch), before)
    for part in ("tokens", "bias", "left", "right"):  # each of them matters
        value = getattr(injection(tower.encoder), part)
        with torch.no_grad():
            value.mul_(1.5)
        assert not torch.equal(tower(batch), before)
        with torch.no_grad():
            value.div_(1.5)


def test_a_pass_of_the_encoder_alone_leaves_no_trace_in_the_next():
    """Nobody took the tokens that its last block returned; the first block of the next begins with fresh ones."""
    model = build({**MMRL, "rank": 2, "keep": 0.4})
    encoder, batch = model.tower("image").encoder, inputs(model, "image")
    first = encoder(batch).tokens.values
    assert torch.equal(encoder(batch).tokens.values, first)


def test_with_a_rank_all_blocks_begin_with_one_map_and_a_bias_each():
    made = Injection(3, 5, 16, 2, rank=2, keep=None, dim=0)
    shared = F.linear(made.tokens, made.weight[0])
    for number in (0, 1):
        torch.testing.assert_close(made.fresh(number), shared + made.bias[number])
    assert made.left is not None
    assert made.left.abs().min() > 0, "a zero here, too, would never learn"
