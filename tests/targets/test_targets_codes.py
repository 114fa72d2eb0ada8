"""Code targets: random projections, k-means that moves, residual codes; each against a slow twin."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mmrep.config import component
from mmrep.targets._codebook import Codebook, Figures, nearest, perplexity
from mmrep.tokens import Content
from mmrep.world import LocalWorld
from tests.targets.targets_steps import DEPTH, PATCH, batch, masked, root, step

SMALL = {
    "random-projection": {"codes": 32, "codebooks": 2, "dim": 4},
    "online-codes": {"codes": 8, "layers": 2},
    "residual-codes": {"codes": 8, "codebooks": 3},
}
CONTENT = {"type": "online-codes", "codes": 8, "layers": "content"}
ALL = [{"type": name, **fields} for name, fields in SMALL.items()] + [CONTENT]
RAGGED = {"resize": "native", "max_patches": 12, "enlarge": True}


def standardized(s):
    """Every figure of the patches of one batch, over all of them."""
    values = s.content("x").values[:, 1:].flatten(0, 1).double()
    return ((values - values.mean(0)) / values.var(0, unbiased=False).sqrt()).float()


def closest(x, codes):
    return torch.stack([((codes - row) ** 2).sum(1).argmin() for row in x])


def test_random_projection_equals_its_formula():
    built = root(target=ALL[0])
    s = step(built, batch(built))
    target = masked(built).target
    content = target(s, "x")
    assert content.vocabulary == 32
    assert content.values.shape == (4, 17, 2)
    assert target.width == 64
    x = standardized(s)
    for c in range(2):
        rows = x @ target.projection[c]
        rows = rows / rows.norm(dim=1, keepdim=True)
        twin = closest(rows, target.codebook[c])
        assert content.values[:, 1:, c].flatten().tolist() == twin.tolist()
    assert target.projection[0].abs().max() <= (6 / (3 * PATCH**2 + 4)) ** 0.5
    torch.testing.assert_close(target.codebook.norm(dim=-1), torch.ones(2, 32))
    assert not list(target.parameters())
    counts = [content.values[:, 1:, c].flatten().bincount(minlength=32).float() / 64 for c in range(2)]
    twin = sum(float((-(p[p > 0] * p[p > 0].log()).sum()).exp()) for p in counts) / 2
    assert float(target.parts()["perplexity"]) == pytest.approx(twin, rel=1e-5)
    assert 1 < twin <= 32


@pytest.mark.parametrize("target", ALL, ids=lambda t: str(t["type"]) + str(t.get("layers", "")))
def test_one_step_trains_and_the_state_comes_back(target):
    built = root(target=target)
    given = batch(built)
    loss = built(given)["loss"]
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None for p in masked(built).predictor.parameters())
    built.after_optimizer_step()
    other = root(seed=9, target=target)
    other.load_state_dict(built.state_dict())
    a, b = (masked(m.eval()).target(step(m, given), "x") for m in (built, other))
    assert torch.equal(a.values, b.values)


def test_statistics_are_gathered_then_rest_and_are_in_the_checkpoint():
    built = root(target={**ALL[0], "settle": 2})
    figures = masked(built).target.figures
    batches = [batch(built, seed=seed) for seed in range(3)]
    for given in batches:
        figures(step(built, given), "x")
    values = torch.cat([step(built, b).content("x").values[:, 1:].flatten(0, 1) for b in batches[:2]]).double()
    count, total, squares = figures.sums
    assert int(figures.batches) == 2
    torch.testing.assert_close(count, torch.full_like(count, 128.0))
    torch.testing.assert_close(total / count, values.mean(0))
    torch.testing.assert_close(squares / count - (total / count) ** 2, values.var(0, unbiased=False))
    assert {"target.figures.sums", "target.figures.batches"} <= {n for n in masked(built).state_dict()}
    figures.eval()
    before = figures.sums.clone()
    figures.batches.zero_()
    figures(step(built, batches[2]), "x")
    assert torch.equal(figures.sums, before)  # evaluation gathers nothing


def test_figures_that_are_constant_or_not_observed_stay_finite():
    built = root(target=ALL[0])
    s = step(built, batch(built))
    values = s.content("x").values.clone()
    values[..., 0] = 3.0
    observed = torch.ones_like(values, dtype=torch.bool)
    observed[0, 2], observed[1, 3, 4:] = False, False
    s._contents["x", 0] = Content(values.masked_fill(~observed, torch.nan), observed)
    target = masked(built).target
    figures, rows, _ = target.figures(s, "x")
    assert figures.isfinite().all()
    assert figures[:, 0].abs().max() == 0
    x, seen = values[rows].double()[:, 5], observed[rows][:, 5]
    mean, deviation = x[seen].mean(), x[seen].std(unbiased=False)
    torch.testing.assert_close(figures[seen, 5], ((x[seen] - mean) / deviation).float())
    content = target(s, "x")
    assert content.observed is not None
    assert not content.observed[0, 2].any()
    assert content.observed[1, 3].all()
    assert built.objectives["masked"](s)["loss"].isfinite()


def test_nearest_is_exact_in_blocks_and_under_autocast():
    generator = torch.Generator().manual_seed(0)
    values, codes = torch.randn(4100, 3, generator=generator), torch.randn(7, 3, generator=generator)
    twin = torch.cdist(values.double(), codes.double()).argmin(1)
    assert torch.equal(nearest(values, codes), twin)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest(values, codes), twin)
    assert nearest(values[:0], codes).shape == (0,)


def test_a_codebook_moves_as_a_loop_says():
    torch.manual_seed(0)
    book = Codebook(5, 2, 0.9)
    book.started.fill_(True)
    codes, weight = book.codes.double(), book.weight.double()
    for _ in range(3):
        parts = [torch.randn(6, 2), torch.randn(3, 2)]
        for part in parts:
            book(part, LocalWorld())  # micro-batches of one optimizer step
        x = torch.cat(parts).double()
        chosen = closest(x, codes)
        sums, counts = codes * weight[:, None], weight.clone()
        for k in range(5):
            mine = x[chosen == k]
            if len(mine):
                sums[k] = 0.9 * sums[k] + 0.1 * mine.sum(0)
                counts[k] = 0.9 * counts[k] + 0.1 * len(mine)
        codes, weight = sums / counts[:, None], counts
        book.update(LocalWorld())
        torch.testing.assert_close(book.codes, codes.float())
        torch.testing.assert_close(book.weight, weight.float())
    still = book.codes.clone()
    book.update(LocalWorld())
    book.eval()(torch.randn(9, 2), LocalWorld())
    book.update(LocalWorld())
    assert torch.equal(book.codes, still)


def test_a_codebook_starts_at_the_data():
    book = Codebook(3, 2, 0.9)
    book(torch.zeros(0, 2), LocalWorld())
    assert not book.started
    x = torch.arange(14.0).view(7, 2)
    book(x, LocalWorld())
    assert book.codes.tolist() == x[[0, 2, 4]].tolist()
    book(x + 100, LocalWorld())
    assert book.codes.tolist() == x[[0, 2, 4]].tolist()
    few = Codebook(3, 2, 0.9)
    few(x[:2], LocalWorld())
    assert few.codes[:2].tolist() == x[:2].tolist()
    assert few.codes.isfinite().all()


def test_online_codes_are_those_of_normed_layers_of_the_teacher():
    built = root(target=ALL[1])
    for p in built.teacher.parameters():
        p.data.mul_(1.3)
    s = step(built, batch(built))
    target = masked(built).target
    content = target(s, "x")
    assert content.values.shape == (4, 17, 2)
    for c, layer in enumerate(s.taught("x", 0, (DEPTH - 1, DEPTH)).layers):
        x = layer[:, 1:]
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        twin = closest(x.flatten(0, 1), target.codebooks[c].codes)
        assert content.values[:, 1:, c].flatten().tolist() == twin.tolist()
    old = [book.codes.clone() for book in target.codebooks]
    built.after_optimizer_step()
    assert all(not torch.equal(a, book.codes) for a, book in zip(old, target.codebooks, strict=True))


def test_codes_of_content_are_k_means_units():
    """Three kinds of patches end in three codes, whatever k-means starts at, and stay there."""
    built = root(target={**CONTENT, "codes": 3, "decay": 0.5})
    generator = torch.Generator().manual_seed(0)
    kinds = torch.tensor([0, 1, 2] * 5 + [0])
    levels = torch.tensor([20, 120, 240])[kinds].view(4, 4).repeat_interleave(4, 0).repeat_interleave(4, 1)
    for _ in range(8):
        given = batch(built)
        noise = torch.randint(-8, 8, (4, 3, 16, 16), generator=generator)
        given.inputs["x"][0]["pixels"] = (levels + noise).clamp(0, 255).to(torch.uint8)
        codes = masked(built).target(step(built, given), "x").values[:, 1:, 0]
        masked(built).target.after_optimizer_step()
    found = [set(codes[:, kinds == kind].flatten().tolist()) for kind in range(3)]
    assert all(len(codes) == 1 for codes in found)
    assert len(set.union(*found)) == 3
    assert built.teacher is None


def test_residual_codes_quantise_what_is_left():
    built = root(target=ALL[2])
    s = step(built, batch(built))
    target = masked(built).target
    content = target(s, "x")
    rest = x = standardized(s)
    for c in range(3):
        twin = closest(rest, target.codebooks[c].codes)
        assert content.values[:, 1:, c].flatten().tolist() == twin.tolist()
        rest = rest - target.codebooks[c].codes[twin]
    left = float(rest.square().sum() / x.square().sum())
    assert float(target.parts()["left"]) == pytest.approx(left, rel=1e-4)


def test_codes_depend_on_a_sample_alone_and_not_on_padding():
    for target in ALL:
        built = root(encoder=RAGGED, target=target)
        pictures = [
            torch.rand(3, h, w, generator=torch.Generator().manual_seed(h)) for h, w in ((8, 24), (16, 8), (12, 16))
        ]
        together = step(built, batch(built, pictures=pictures))
        masked(built).target(together, "x")
        masked(built).target.after_optimizer_step()
        built.eval()
        valid = together.tokens("x").grid.valid & ~together.tokens("x").grid.special
        assert not bool(together.tokens("x").grid.valid.all())
        codes = masked(built).target(together, "x").values
        for i, picture in enumerate(pictures):
            alone = masked(built).target(step(built, batch(built, pictures=[picture])), "x").values[0]
            assert codes[i][valid[i]].tolist() == alone[1:].tolist()
        counts = getattr(masked(built).target, "figures", None)
        if isinstance(counts, Figures):
            assert int(counts.sums[0, 0]) == int(valid.sum())


def test_perplexity_counts_codes_in_use():
    assert float(perplexity(torch.tensor([0.5, 0.5, 0.0]))) == pytest.approx(2)
    assert float(perplexity(torch.tensor([0.0, 1.0]))) == pytest.approx(1)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="layers: 4 of an encoder that has 3"):
        root(target={"type": "online-codes", "layers": DEPTH + 1})
    with pytest.raises(ValueError, match="does not fit this target"):
        root(target=ALL[0], loss="mse")
    assert component("targets", "online-codes", layers="content").config.layers == "content"
    with pytest.raises(ValueError, match="layers"):
        component("targets", "online-codes", layers="kontent")


def test_words_have_no_figures(monkeypatch):
    words = Content(torch.zeros(2, 3, dtype=torch.long), vocabulary=9)
    tower = SimpleNamespace(modality="text", encoder=SimpleNamespace(content=lambda _: words))
    monkeypatch.setattr("mmrep.targets._codebook.look", lambda _: SimpleNamespace(inputs={}))
    with pytest.raises(ValueError, match="text tokens are no list of measured values"):
        Figures(tower, 1)
