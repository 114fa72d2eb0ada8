"""mmrep.blocks against torch's own pre-norm encoder layer, and its promises about padding, order and depth."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmrep.blocks import Block, DropPath, Transformer


def theirs(block: Block, width: int, heads: int) -> nn.TransformerEncoderLayer:
    """torch's pre-norm layer with the weights of ``block``."""
    layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True).double()
    layer.load_state_dict({
        "self_attn.in_proj_weight": block.attention.qkv.weight, "self_attn.in_proj_bias": block.attention.qkv.bias,
        "self_attn.out_proj.weight": block.attention.out.weight, "self_attn.out_proj.bias": block.attention.out.bias,
        "linear1.weight": block.mlp[0].weight, "linear1.bias": block.mlp[0].bias,
        "linear2.weight": block.mlp[3].weight, "linear2.bias": block.mlp[3].bias,
        "norm1.weight": block.norm1.weight, "norm1.bias": block.norm1.bias,
        "norm2.weight": block.norm2.weight, "norm2.bias": block.norm2.bias,
    })  # fmt: skip
    return layer.train()  # eval would take a fused path


def randomised(model: nn.Module) -> nn.Module:
    """Every parameter random, so that a forgotten bias or norm shows."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("causal", [False, True])
def test_equals_torch_encoder_layers_in_value_and_gradient(causal: bool) -> None:
    model = randomised(Transformer(12, 3, 3, causal=causal).double())
    values = torch.randn(2, 5, 12, dtype=torch.float64)
    valid = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    ours_in, theirs_in = values.clone().requires_grad_(), values.clone().requires_grad_()
    out, layers = model(ours_in, valid, layers=(3, 1))
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64) if causal else None
    padding = torch.zeros(2, 5, dtype=torch.float64).masked_fill(~valid, -torch.inf)
    expected, each = theirs_in, []
    for block in model.blocks:
        expected = theirs(block, 12, 3)(expected, src_mask=mask, src_key_padding_mask=padding)
        each.append(expected)
    torch.testing.assert_close(out[valid], expected[valid], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layers[0], out)
    torch.testing.assert_close(layers[1][valid], each[0][valid], rtol=1e-10, atol=1e-10)
    out[valid].square().sum().backward()
    expected[valid].square().sum().backward()
    torch.testing.assert_close(ours_in.grad, theirs_in.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("causal", [False, True])
def test_no_mask_equals_an_all_true_mask(causal: bool) -> None:
    model = randomised(Transformer(8, 2, 2, causal=causal))
    values = torch.randn(2, 6, 8)
    torch.testing.assert_close(model(values)[0], model(values, torch.ones(2, 6, dtype=torch.bool))[0])


@pytest.mark.parametrize("causal", [False, True])
def test_padding_changes_nothing_and_stays_finite(causal: bool) -> None:
    model = randomised(Transformer(8, 2, 2, causal=causal))
    values, valid = torch.randn(3, 6, 8), torch.ones(3, 6, dtype=torch.bool)
    valid[1, 4:] = False
    valid[2] = False
    out = model(values, valid)[0]
    torch.testing.assert_close(out[1, :4], model(values[1:2, :4])[0][0])
    assert out.isfinite().all()
    out.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("causal", [False, True])
def test_no_row_of_a_mask_is_empty(causal: bool) -> None:
    """Attention over nothing is zero on some backends and NaN on others, so no query may see no key."""
    valid = torch.tensor([[False, False, False], [True, True, False], [False, True, False]])
    mask = Transformer(8, 1, 2, causal=causal)._mask(3, valid, None)
    assert mask is not None
    assert mask.expand(3, 1, 3, 3).any(-1).all()
    assert not mask.expand(3, 1, 3, 3)[1, 0, 1, 2]


def test_causal_attention_goes_by_order_not_by_storage() -> None:
    model = randomised(Transformer(8, 2, 2, causal=True))
    values, shuffle = torch.randn(1, 6, 8), torch.tensor([4, 0, 5, 2, 1, 3])
    straight = model(values)[0]
    stored = model(values[:, shuffle], order=shuffle[None].float())[0]
    torch.testing.assert_close(stored, straight[:, shuffle])


def test_drop_path_keeps_the_expectation_drops_whole_samples_and_rests_in_eval() -> None:
    torch.manual_seed(0)
    drop = DropPath(0.25)
    out = drop(torch.ones(20000, 2, 3))
    assert out.mean().item() == pytest.approx(1.0, abs=0.02)
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert (out.amax((1, 2)) == out.amin((1, 2))).all()
    assert torch.equal(drop.eval()(torch.ones(4, 2, 3)), torch.ones(4, 2, 3))


def test_drop_path_rises_to_the_last_block_and_layer_scale_starts_small() -> None:
    model = Transformer(8, 3, 2, drop_path=0.2, layer_scale=1e-4)
    assert [block.drop_path.p for block in model.blocks] == pytest.approx([0.0, 0.1, 0.2])
    values = torch.randn(2, 4, 8)
    assert 0 < (model.eval()(values)[0] - values).abs().max() < 1e-2


def test_dropout_acts_in_training_only() -> None:
    model = randomised(Transformer(8, 1, 2, dropout=0.5))
    values = torch.randn(2, 4, 8)
    assert not torch.equal(model.train()(values)[0], model(values)[0])
    assert torch.equal(model.eval()(values)[0], model(values)[0])


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="heads=3 does not divide width=8"):
        Transformer(8, 1, 3)
