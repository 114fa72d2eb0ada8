"""The teacher's tokens as targets, against slow twins."""

from __future__ import annotations

import pytest
import torch

from mmrep.targets.teacher import normalized
from mmrep.tokens import Grid
from tests.targets.targets_steps import DEPTH, batch, masked, root, step

RAGGED = {"resize": "native", "max_patches": 12, "enlarge": True}


def far(built):
    """Move the teacher away from the student."""
    for parameter in built.teacher.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))


def blocks(built, s):
    """Every block's output and the final one, of the teacher, by its parts."""
    encoder = built.teacher.of(built.model.tower("image").encoder)
    x = encoder.tokenize(s.inputs("x")).values
    found = []
    for block in encoder.transformer.blocks:
        x = block(x)
        found.append(x)
    return found, encoder.norm(x)


def plain(x, over, eps=1e-5):
    return (x - x.mean(over, keepdim=True)) / (x.var(over, unbiased=False, keepdim=True) + eps) ** 0.5


def test_i_jepa_predicts_the_normed_output_of_the_teacher():
    built = root(target={"type": "teacher"})
    far(built)
    s = step(built, batch(built))
    content = masked(built).target(s, "x")
    torch.testing.assert_close(content.values, plain(blocks(built, s)[1], -1))
    assert not content.values.requires_grad
    assert masked(built).target.losses[0] == "smooth-l1"


@pytest.mark.parametrize("norm", ["layer", "instance", "none"])
def test_data2vec_predicts_the_mean_of_normed_top_layers(norm):
    built = root(target={"type": "teacher", "layers": 2, "norm": norm, "final": "layer"})
    far(built)
    s = step(built, batch(built))
    twin = torch.zeros(())
    for values in blocks(built, s)[0][DEPTH - 2 :]:
        if norm == "layer":
            values = plain(values, -1)
        elif norm == "instance":  # over the tokens of a sample, without the class token
            patches = values[:, 1:]
            mean, var = patches.mean(1, keepdim=True), patches.var(1, unbiased=False, keepdim=True)
            values = (values - mean) / (var + 1e-5) ** 0.5
        twin = twin + values / 2
    torch.testing.assert_close(masked(built).target(s, "x").values, plain(twin, -1))


def test_padding_never_enters_instance_statistics():
    values = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))
    counted = torch.tensor([[False, True, True, True, True, True], [False, True, True, True, False, False]])
    out = normalized(values, counted, "instance")
    torch.testing.assert_close(out[1, 1:4], plain(values[1, 1:4], 0))
    other = values.clone()
    other[~counted] = 1e4
    torch.testing.assert_close(normalized(other, counted, "instance")[counted], out[counted])


def test_targets_of_a_sample_alone_are_those_in_a_padded_batch():
    built = root(encoder=RAGGED, target={"type": "teacher", "layers": 2, "norm": "instance"})
    pictures = [
        torch.rand(3, h, w, generator=torch.Generator().manual_seed(h)) for h, w in ((8, 24), (16, 8), (12, 16))
    ]
    together = step(built, batch(built, pictures=pictures))
    grid: Grid = together.tokens("x").grid
    assert not bool(grid.valid.all())
    found = masked(built).target(together, "x").values
    for i, picture in enumerate(pictures):
        alone = masked(built).target(step(built, batch(built, pictures=[picture])), "x").values[0]
        torch.testing.assert_close(found[i][grid.valid[i]], alone, atol=1e-5, rtol=1e-4)


def test_more_layers_than_there_are_is_refused():
    with pytest.raises(ValueError, match="layers: 4 of an encoder that has 3"):
        root(target={"type": "teacher", "layers": DEPTH + 1})
