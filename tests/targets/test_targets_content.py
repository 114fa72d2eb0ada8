"""What is predicted of the input itself, against the formulas of MAE and SimMIM in transformers."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from mmrep.targets.content import ContentTarget, ContentTargetConfig, standardize
from mmrep.tokens import Content
from tests.targets.targets_steps import PATCH, SIZE, batch, drawn, masked, root, step

CHANNELS_LAST = torch.arange(3 * PATCH * PATCH).view(3, PATCH, PATCH).permute(1, 2, 0).flatten()


class Fixed(nn.Module):
    """In the place of a part of another library's model: returns what it was given."""

    def __init__(self, value=None, **named):
        super().__init__()
        self.value = SimpleNamespace(**named) if value is None else value

    def forward(self, *_, **__):
        return self.value


def predictions(built, s):
    """What the objective predicts at each of all tokens, zeros at visible ones: [B, patches, P]."""
    found = []
    objective = masked(built)
    handle = objective.predictor.register_forward_hook(lambda _, inputs, out: found.append((inputs[3], out)))
    loss = objective(s)["loss"]
    handle.remove()
    target, out = found[0]
    everywhere = out.new_zeros(len(out), s.tokens("x").values.shape[1], out.shape[-1])
    everywhere = everywhere.scatter(1, target[..., None].expand_as(out), out)
    return loss, everywhere[:, 1:]  # behind the class token


def test_the_loss_is_that_of_mae_in_transformers():
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    built = root(target={"type": "content", "normalize": True})
    s = step(built, batch(built))
    hidden = drawn(built, s)[:, 1:]
    loss, predicted = predictions(built, s)
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = ViTMAEConfig(image_size=SIZE, patch_size=PATCH, norm_pix_loss=True, **small)
    theirs = ViTMAEForPreTraining(config)
    outputs = {"last_hidden_state": None, "ids_restore": None, "hidden_states": None, "attentions": None}
    theirs.vit = Fixed(mask=hidden.float(), **outputs)
    theirs.decoder = Fixed(logits=predicted[..., CHANNELS_LAST])
    twin = theirs(s.tower("x").encoder.normalize(s.inputs("x")["pixels"])).loss
    assert 0 < hidden.float().mean() < 1
    torch.testing.assert_close(loss, twin)
    parameters = [p for p in built.parameters() if p.requires_grad]
    mine = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    for a, b in zip(mine, torch.autograd.grad(twin, parameters, allow_unused=True), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_the_loss_is_that_of_simmim_in_transformers():
    from transformers import ViTConfig, ViTForMaskedImageModeling

    built = root(input="mask-token", predictor={"type": "tokenwise"}, loss="l1", mask={"type": "random", "ratio": 0.6})
    s = step(built, batch(built))
    hidden = drawn(built, s)[:, 1:]
    loss, predicted = predictions(built, s)
    theirs = ViTForMaskedImageModeling(
        ViTConfig(image_size=SIZE, patch_size=PATCH, encoder_stride=PATCH, hidden_size=8, num_hidden_layers=1,
                  num_attention_heads=1, intermediate_size=8)
    )  # fmt: skip

    pictures = nn.functional.fold(predicted.transpose(1, 2), (SIZE, SIZE), PATCH, stride=PATCH)
    theirs.decoder = Fixed(pictures)
    pixels = s.tower("x").encoder.normalize(s.inputs("x")["pixels"])
    out = theirs(pixels, bool_masked_pos=hidden)
    count = int(hidden.sum()) * PATCH * PATCH
    # Both are mean absolute differences, but for the 1e-5 that they add to the number of hidden pixels.
    torch.testing.assert_close(loss, out.loss * (count + 1e-5) / count)
    assert float(loss.detach()) > 0.1


def test_normalising_leaves_out_what_was_not_observed():
    values = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 7
    observed = torch.ones(2, 3, 5, dtype=torch.bool)
    observed[0, 1, 2:], observed[1, 0, :2], observed[1, 2] = False, False, False
    out = standardize(values.masked_fill(~observed, torch.nan), observed)
    for b, n in [(0, 1), (1, 0), (0, 0)]:
        x = values[b, n][observed[b, n]]
        twin = (x - sum(x) / len(x)) / (((x - sum(x) / len(x)) ** 2).sum() / (len(x) - 1) + 1e-6) ** 0.5
        torch.testing.assert_close(out[b, n][observed[b, n]], twin)
    assert (out[~observed] == 0).all()
    torch.testing.assert_close(standardize(values), standardize(values, torch.ones_like(observed)))
    assert standardize(torch.full((1, 4), 3.0)).abs().max() == 0


def test_the_target_has_no_gradient_and_says_what_fits():
    built = root()
    s = step(built, batch(built))
    content = masked(built).target(s, "x")
    assert not content.values.requires_grad
    assert isinstance(content, Content)
    torch.testing.assert_close(content.values, s.content("x").values)
    tower = built.model.tower("image")
    assert ContentTarget(ContentTargetConfig(), tower).width == 3 * PATCH * PATCH
