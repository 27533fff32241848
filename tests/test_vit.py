"""The ViT against the official one's golden outputs, its initialisation and its sizes."""
import math

import pytest
import torch
from conftest import relative

from model_vit import SIZES, ViT, from_official


@pytest.mark.parametrize("name, heads", [("vit_cond", 4), ("vit_uncond", 6)])
def test_golden(golden, name, heads):
    values, weights = golden(name)
    model = from_official(weights, heads)
    with torch.no_grad():
        assert relative(model(values["x"], values["t"], values.get("y")), values["out"]) < 1e-5


def test_official_time_table_is_cut_and_the_rest_is_strict(golden):
    values, weights = golden("vit_cond")
    table = torch.cat([weights["time_embedding.weight"], torch.randn(3000, 48)])
    model = from_official({**weights, "time_embedding.weight": table}, heads=4)
    with torch.no_grad():
        assert relative(model(values["x"], values["t"], values["y"]), values["out"]) < 1e-5
    assert model.time_embedding.weight.shape == (1000, 48) and model.blocks[0].norm1.eps == model.blocks[0].norm2.eps == 1e-6
    missing = {key: value for key, value in weights.items() if key != "blocks.1.attn.q_bias"}
    for wrong in (missing, {**weights, "norm.weight": torch.ones(48)}, {**weights, "pos_embed": torch.zeros(1, 17, 48)}, {},
                  {"pos_embed": 3}):
        with pytest.raises(ValueError):
            from_official(wrong, heads=4)
    with pytest.raises(ValueError, match="heads"):
        from_official(weights)


@pytest.mark.parametrize("name, img_size, patch, channels, classes, millions", [
    ("vit-s", 64, 4, 3, 0, 41.6), ("vit-b", 32, 2, 4, 1000, 86.8), ("vit-l", 64, 4, 3, 1000, 266.9), ("vit-xl", 32, 2, 4, 1000, 448.9)])
def test_parameters_of_the_papers_sizes(name, img_size, patch, channels, classes, millions):
    with torch.device("meta"):
        model = ViT(img_size, patch, channels, classes, **SIZES[name])
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


def test_heads_of_released_files_come_from_the_width():
    with torch.device("meta"):
        weights = {name: ViT(8, 4, 3, 2, **{**SIZES[name], "depth": 1}).state_dict() for name in SIZES if name != "vit-tiny"}
    for name, state in weights.items():
        state = {key: torch.zeros(value.shape) for key, value in state.items()}
        assert from_official(state).blocks[0].attn.heads == SIZES[name]["heads"]


def test_initialisation():
    torch.manual_seed(0)
    model = ViT(16, 4, 3, 8, dim=96, depth=3, heads=3).requires_grad_(False)
    for layer, block in enumerate(model.blocks, 1):
        assert block.attn.qkv.weight.std() == pytest.approx(0.02, rel=0.05)
        assert block.attn.proj.weight.std() == pytest.approx(0.02 / math.sqrt(2 * layer), rel=0.05)
        assert block.mlp.fc2.weight.std() == pytest.approx(0.02 / math.sqrt(2 * layer), rel=0.05)
        assert block.mlp.fc1.bias.abs().max() == 0
    assert model.time_embedding.weight.std() == pytest.approx(1, rel=0.05)
    assert model.class_embedding.weight.shape == (9, 96) and model.class_embedding.weight.std() == pytest.approx(1, rel=0.1)
    assert model.pos_embed.std() == pytest.approx(0.02, rel=0.1) and model.pos_embed.shape == (1, 18, 96)
    assert model.linear_projection.weight.std() == pytest.approx(2e-5, rel=0.05)


def test_short_run_initialisation():
    model = ViT(12, 4, 3, 8, dim=64, depth=2, heads=2, T=500, short_run=True).requires_grad_(False)
    assert model.blocks[0].mlp.fc1.weight.std() == pytest.approx(1 / 8, rel=0.05)
    for t, i in ((0, 0), (7, 3), (499, 31)):                                 # cos and sin of 1000 t / T over wavelength i
        angle = 2 * t * 10_000 ** (-i / 32)
        assert model.time_embedding.weight[t, i] == pytest.approx(math.cos(angle), abs=1e-3)
        assert model.time_embedding.weight[t, 32 + i] == pytest.approx(math.sin(angle), abs=1e-3)
    for row, col, i in ((0, 2, 1), (2, 1, 5)):                               # first half of the width: row, second: column
        token = model.pos_embed[0, 2 + 3 * row + col]
        assert token[i] == pytest.approx(math.cos(row * 100 ** (-i / 16)), abs=1e-5)
        assert token[32 + 16 + i] == pytest.approx(math.sin(col * 100 ** (-i / 16)), abs=1e-5)


def test_every_sample_has_its_own_time_and_class():
    torch.manual_seed(0)
    model = ViT(8, 2, 4, 5, dim=48, depth=2, heads=4).double()
    torch.nn.init.normal_(model.linear_projection.weight)
    x, t, y = torch.randn(3, 4, 8, 8, dtype=torch.float64), torch.tensor([0, 500, 999]), torch.tensor([4, 0, 5])
    together = model(x, t, y)
    alone = torch.cat([model(x[i:i + 1], t[i:i + 1], y[i:i + 1]) for i in range(3)])
    assert relative(together, alone) < 1e-12
    assert (model(x, t.flip(0), y) - together).abs()[[0, 2]].amin((1, 2, 3)).min() > 0
    assert (model(x, t, (y + 1) % 6) - together).abs().amax((1, 2, 3)).min() > 1e-6
    assert torch.equal(model(x, t), model(x, t, torch.full_like(t, 5)))      # no label is the null label


def test_patches_go_back_where_they_came_from():
    """With blocks and tables silenced and a head that inverts the patch embedding, the network is the identity."""
    model = ViT(12, 3, 2, 0, dim=18, depth=1, heads=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        eye = torch.eye(18)
        model.patch_embed.proj.weight.copy_(eye.view(18, 2, 3, 3))           # channel, row, column
        model.linear_projection.weight.copy_(eye.view(2, 3, 3, 18).permute(1, 2, 0, 3).reshape(18, 18))   # row, column, channel
        x = torch.randn(4, 2, 12, 12)
        assert torch.equal(model(x, torch.zeros(4, dtype=torch.long)), x)


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError):
        ViT(15, 4, 3, 0, dim=32, depth=1, heads=2)
    model = ViT(16, 4, 3, 0, dim=32, depth=1, heads=2)
    with pytest.raises(ValueError, match="found"):
        model(torch.zeros(2, 3, 16, 12), torch.zeros(2, dtype=torch.long))
