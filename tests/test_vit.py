"""The ViT against the official one's golden outputs, its initialisation and its sizes."""
import math

import pytest
import torch
from conftest import relative

from model_vit import SIZES, ViT, from_official


@pytest.mark.parametrize("name, heads", [("vit_cond", 4), ("vit_uncond", 6)])
def test_outputs_are_golden(golden, name, heads):
    values, weights = golden(name)
    model = from_official(weights, heads)
    with torch.no_grad():
        out = model(values["x"], values["t"], values.get("y"))
    assert relative(out, values["out"]) < 1e-5
    assert model.public["guidable"] == ("y" in values)
    assert model.blocks[0].norm1.eps == model.blocks[0].norm2.eps == 1e-6


def test_of_the_official_4000_times_the_first_1000_are_used(golden):
    values, weights = golden("vit_cond")
    table = weights["time_embedding.weight"]
    longer = torch.cat([table, torch.randn(3000, 48)])
    model = from_official({**weights, "time_embedding.weight": longer}, heads=4)
    with torch.no_grad():
        assert relative(model(values["x"], values["t"], values["y"]), values["out"]) < 1e-5


@pytest.mark.parametrize("key, value", [
    ("pos_embed", None),
    ("blocks.1.attn.q_bias", None),
    ("norm.weight", torch.ones(48)),
    ("pos_embed", torch.zeros(1, 17, 48)),
])
def test_a_file_that_does_not_fit_is_one_line(golden, key, value):
    _, weights = golden("vit_cond")
    weights.pop(key, None)
    if value is not None:
        weights[key] = value
    with pytest.raises(ValueError, match=key) as error:
        from_official(weights, heads=4)
    assert len(str(error.value)) < 350


def test_heads_of_an_unknown_width_must_be_given(golden):
    _, weights = golden("vit_cond")
    with pytest.raises(ValueError, match="heads"):
        from_official(weights)


@pytest.mark.parametrize("name, shape, millions, released", [
    ("vit-s",  (64, 4, 3, 0),    41.6,  (None, 50, 1.0)),
    ("vit-b",  (32, 2, 4, 1000), 86.8,  (None, 50, 1.0)),
    ("vit-l",  (64, 4, 3, 1000), 266.9, ("eps", 20, 1.5)),
    ("vit-xl", (32, 2, 4, 1000), 448.9, ("x0", 50, 1.5)),
])
def test_the_papers_sizes_and_released_files(name, shape, millions, released):
    with torch.device("meta"):
        weights = ViT(*shape, **SIZES[name]).state_dict()
        model = from_official(weights)
    parameters = sum(x.numel() for x in weights.values())
    assert parameters / 1e6 == pytest.approx(millions, abs=0.1)
    assert model.blocks[0].attn.heads == SIZES[name]["heads"]
    public = model.public
    assert (public["target"], public["sample_steps"], public["cfg"]) == released


def test_it_starts_as_the_official_code_does():
    torch.manual_seed(0)
    model = ViT(16, 4, 3, 8, dim=96, depth=3, heads=3).requires_grad_(False)
    stds = {
        model.time_embedding.weight: 1,
        model.class_embedding.weight: 1,
        model.pos_embed: 0.02,
        model.linear_projection.weight: 2e-5,
    }
    for layer, block in enumerate(model.blocks, 1):
        stds[block.attn.qkv.weight] = 0.02
        stds[block.attn.proj.weight] = 0.02 / math.sqrt(2 * layer)
        stds[block.mlp.fc2.weight] = 0.02 / math.sqrt(2 * layer)
        assert block.mlp.fc1.bias.abs().max() == 0
    for weight, std in stds.items():
        assert weight.std() == pytest.approx(std, rel=0.1)


def test_short_run_starts_from_sinusoids():
    how = dict(dim=64, depth=2, heads=2, T=500, short_run=True)
    model = ViT(12, 4, 3, 8, **how).requires_grad_(False)
    t = torch.arange(500)[:, None]
    angle = 2 * t * 10_000 ** (-torch.arange(32) / 32)                       # 1000 t / T
    times = torch.cat([angle.cos(), angle.sin()], dim=1)
    assert relative(model.time_embedding.weight, times) < 1e-3
    row = 100 ** (-torch.arange(16) / 16)                                    # of a patch in row 1, column 2
    column = 2 * row
    waves = [row.cos(), row.sin(), column.cos(), column.sin()]
    assert relative(model.pos_embed[0, 2 + 3 + 2], torch.cat(waves)) < 1e-5
    assert model.blocks[0].mlp.fc1.weight.std() == pytest.approx(1 / 8, rel=0.05)


def small():
    model = ViT(8, 2, 4, 5, dim=48, depth=2, heads=4)
    torch.nn.init.normal_(model.linear_projection.weight)
    return model, torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999])


def test_no_label_is_the_null_label():
    model, x, t = small()
    null = torch.full_like(t, 5)
    assert torch.equal(model(x, t), model(x, t, null))


def test_gradient_checkpointing_runs_the_blocks_again():
    model, x, t = small()
    runs, gradients = [], []
    model.blocks[0].register_forward_pre_hook(lambda *_: runs.append(1))
    for model.grad_ckpt in (False, True):
        loss = model(x, t).square().mean()
        gradients += torch.autograd.grad(loss, model.pos_embed)
    assert relative(gradients[1], gradients[0]) < 1e-6
    assert len(runs) == 1 + 2


def test_a_side_that_patches_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="15.*4"):
        ViT(15, 4, 3, 0, dim=32, depth=1, heads=2)
