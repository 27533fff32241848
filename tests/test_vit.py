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
        out = model(values["x"], values["t"], values.get("y"))
    assert relative(out, values["out"]) < 1e-5


def test_of_the_official_4000_times_the_first_1000_are_used(golden):
    values, weights = golden("vit_cond")
    table = torch.cat([weights["time_embedding.weight"], torch.randn(3000, 48)])
    model = from_official({**weights, "time_embedding.weight": table}, heads=4)
    with torch.no_grad():
        out = model(values["x"], values["t"], values["y"])
    assert relative(out, values["out"]) < 1e-5
    assert model.time_embedding.weight.shape == (1000, 48)


@pytest.mark.parametrize("change, words", [
    ({"blocks.1.attn.q_bias": None}, "blocks.1.attn.q_bias"),
    ({"pos_embed": None}, "pos_embed"),
    ({"norm.weight": torch.ones(48)}, "norm.weight"),
    ({"pos_embed": torch.zeros(1, 17, 48)}, "pos_embed"),
])
def test_a_file_that_does_not_fit_is_one_line(golden, change, words):
    _, weights = golden("vit_cond")
    changed = weights | change
    changed = {name: value for name, value in changed.items() if value is not None}
    with pytest.raises(ValueError, match=words) as error:
        from_official(changed, heads=4)
    assert len(str(error.value).splitlines()) == 1


def test_heads_of_an_unknown_width_must_be_given(golden):
    _, weights = golden("vit_cond")
    with pytest.raises(ValueError, match="heads"):
        from_official(weights)


@pytest.mark.parametrize("name, img_size, patch, channels, classes, millions, target, steps, cfg", [
    ("vit-s",  64, 4, 3, 0,    41.6,  None,  50, 1.0),
    ("vit-b",  32, 2, 4, 1000, 86.8,  None,  50, 1.0),
    ("vit-l",  64, 4, 3, 1000, 266.9, "eps", 20, 1.5),
    ("vit-xl", 32, 2, 4, 1000, 448.9, "x0",  50, 1.5),
])
def test_the_papers_sizes_and_released_files(name, img_size, patch, channels, classes, millions, target, steps, cfg):
    with torch.device("meta"):
        model = ViT(img_size, patch, channels, classes, **SIZES[name])
        again = from_official(model.state_dict())
    assert sum(p.numel() for p in again.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    assert again.blocks[0].attn.heads == SIZES[name]["heads"]
    assert [again.public[key] for key in ("target", "sample_steps", "cfg")] == [target, steps, cfg]
    assert (again.public["name"] is None) == (target is None)


def test_initialisation():
    torch.manual_seed(0)
    model = ViT(16, 4, 3, 8, dim=96, depth=3, heads=3).requires_grad_(False)
    for layer, block in enumerate(model.blocks, 1):
        scaled = pytest.approx(0.02 / math.sqrt(2 * layer), rel=0.05)
        assert block.attn.qkv.weight.std() == pytest.approx(0.02, rel=0.05)
        assert block.attn.proj.weight.std() == scaled
        assert block.mlp.fc2.weight.std() == scaled
        assert block.mlp.fc1.bias.abs().max() == 0
    assert model.time_embedding.weight.std() == pytest.approx(1, rel=0.05)
    assert model.class_embedding.weight.std() == pytest.approx(1, rel=0.1)
    assert model.pos_embed.std() == pytest.approx(0.02, rel=0.1)
    assert model.linear_projection.weight.std() == pytest.approx(2e-5, rel=0.05)


def test_short_run_starts_from_sinusoids():
    model = ViT(12, 4, 3, 8, dim=64, depth=2, heads=2, T=500, short_run=True).requires_grad_(False)
    assert model.blocks[0].mlp.fc1.weight.std() == pytest.approx(1 / 8, rel=0.05)
    t, i = torch.meshgrid(torch.arange(500), torch.arange(32), indexing="ij")
    angle = 2 * t * 10_000 ** (-i / 32)                                      # 1000 t / T
    assert relative(model.time_embedding.weight, torch.cat([angle.cos(), angle.sin()], 1)) < 1e-3
    for row, column, i in ((0, 2, 1), (2, 1, 5)):        # first half of the width: row, second: column
        token = model.pos_embed[0, 2 + 3 * row + column]
        assert token[i] == pytest.approx(math.cos(row * 100 ** (-i / 16)), abs=1e-5)
        assert token[48 + i] == pytest.approx(math.sin(column * 100 ** (-i / 16)), abs=1e-5)


def test_every_sample_has_its_own_time_and_class():
    torch.manual_seed(0)
    model = ViT(8, 2, 4, 5, dim=48, depth=2, heads=4).double()
    torch.nn.init.normal_(model.linear_projection.weight)
    x = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    t, y = torch.tensor([0, 500, 999]), torch.tensor([4, 0, 5])
    together = model(x, t, y)
    alone = torch.cat([model(x[i:i + 1], t[i:i + 1], y[i:i + 1]) for i in range(3)])
    assert relative(together, alone) < 1e-12
    other_times = model(x, t.roll(1), y) - together
    other_classes = model(x, t, y.roll(1)) - together
    assert other_times.abs().amax((1, 2, 3)).min() > 1e-6
    assert other_classes.abs().amax((1, 2, 3)).min() > 1e-6
    assert torch.equal(model(x, t), model(x, t, torch.full_like(t, 5)))      # no label is the null label


def test_gradient_checkpointing_has_the_same_gradient():
    model = ViT(8, 2, 4, 5, dim=48, depth=2, heads=4)
    torch.nn.init.normal_(model.linear_projection.weight)
    runs, gradients = [], []
    model.blocks[0].register_forward_pre_hook(lambda *_: runs.append(1))
    for model.grad_ckpt in (False, True):
        loss = model(torch.ones(3, 4, 8, 8), torch.arange(3)).square().mean()
        gradients.append(torch.autograd.grad(loss, model.pos_embed)[0])
    assert relative(gradients[1], gradients[0]) < 1e-6
    assert len(runs) == 1 + 2


def test_patches_go_back_where_they_came_from():
    """With blocks and tables silenced and a head that inverts the patch embedding, it is the identity."""
    model = ViT(12, 3, 2, 0, dim=18, depth=1, heads=2).requires_grad_(False)
    for parameter in model.parameters():
        parameter.zero_()
    eye = torch.eye(18)
    model.patch_embed.proj.weight.copy_(eye.view(18, 2, 3, 3))               # channel, row, column
    eye = eye.view(2, 3, 3, 18).permute(1, 2, 0, 3)                          # row, column, channel
    model.linear_projection.weight.copy_(eye.reshape(18, 18))
    x = torch.randn(4, 2, 12, 12)
    assert torch.equal(model(x, torch.zeros(4, dtype=torch.long)), x)


def test_a_side_that_patches_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="15.*4"):
        ViT(15, 4, 3, 0, dim=32, depth=1, heads=2)
