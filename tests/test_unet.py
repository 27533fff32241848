"""The UNets and the classifier against the canonical implementations' golden outputs, and their loaders."""
import re
from functools import partial

import pytest
import torch
from conftest import relative

from model_unet import (PUBLIC, SIZES, Attention, Classifier, SpatialTransformer, UNet, classifier_from_adm,
                        from_adm)

ADM = dict(img_size=16, channel_mult=(1, 2), res_blocks=1, attention_resolutions=(8,))
PLAIN = dict(scale_shift=False, resblock_updown=False)
LDM = dict(heads=1, context_dim=24, **PLAIN)
KINDS = {
    "unet_adm": ADM | dict(heads=2),
    "unet_plain": ADM | PLAIN | dict(channel_mult=(1, 1), head_channels=16),
    "unet_ldm": LDM | dict(img_size=8, channel_mult=(1, 1), res_blocks=1, attention_resolutions=(8, 4)),
    "classifier": ADM | dict(head_channels=16),
}
VARIANTS = [dict(), dict(head_channels=16, **PLAIN), dict(num_classes=0), LDM]
variants = pytest.mark.parametrize("options", VARIANTS)


def small(**more):
    usual = ADM | dict(in_channels=3, channels=32, num_classes=5, heads=2)
    return UNet(**usual | more)


def close(model, values, tolerance=5e-5):
    with torch.no_grad():
        return relative(model(values["x"], values["t"], values["y"]), values["out"]) < tolerance


def noisy(model):
    """Zero-initialised layers would hide what comes before them."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def inputs(B=3, H=16, W=16):
    torch.manual_seed(1)
    t = torch.linspace(0, 999, B).long()
    return torch.randn(B, 3, H, W), t, torch.arange(B) % 6


@pytest.mark.parametrize("name", ["unet_adm", "unet_plain", "unet_ldm"])
def test_outputs_are_golden(golden, name):
    values, weights = golden(name)
    if name == "unet_ldm":
        weights["label_emb.weight"] = values["label_emb"].float()            # LDM keeps it elsewhere
    model = from_adm(weights, **KINDS[name])
    assert close(model, values)
    expected = dict(dataset=None, target=None, schedule="cosine", guidable=name != "unet_plain")
    assert model.public == expected | dict(sample_steps=50, cfg=1.0)
    attention_norm = model.middle_block[1].norm                              # no golden value shows its eps
    assert attention_norm.eps == (1e-6 if name == "unet_ldm" else 1e-5)


def test_the_classifier_and_its_gradient_are_golden(golden):
    values, weights = golden("classifier")
    model = classifier_from_adm(weights, **KINDS["classifier"])
    x = values["x"].clone().requires_grad_()
    logits = model(x, values["t"])
    log_prob = logits.log_softmax(1)[torch.arange(3), values["y"]].sum()
    assert relative(logits.detach(), values["logits"]) < 5e-5
    assert relative(torch.autograd.grad(log_prob, x)[0], values["grad_log_prob"]) < 5e-5


def attention_blocks(model):
    return sum(isinstance(layer, (Attention, SpatialTransformer)) for layer in model.modules())


@pytest.mark.parametrize("name, channels, classes, parameters, attention", [
    ("unet-tiny",   3, 8,    1_372_259,   4),
    ("unet-cifar",  3, 0,    52_542_979,  15),
    ("unet-celeba", 3, 0,    58_936_963,  22),
    ("unet-adm",    3, 1000, 295_900_035, 22),
    ("unet-adm128", 3, 1000, 421_523_715, 16),
    ("unet-b",      4, 1000, 129_146_692, 15),
    ("unet-ldm",    4, 1000, 395_496_708, 16),
])
def test_sizes_have_the_papers_parameters_and_attend_on_fixed_levels(name, channels, classes, parameters, attention):
    """The paper's 395.0M leaves out the class table, 1,001 rows of 512. 421.5M and 295.9M have it in."""
    row = SIZES[name]
    with torch.device("meta"):
        own, larger = (UNet(img_size=side, in_channels=channels, num_classes=classes, **row)
                       for side in (row["side"], 3 * row["side"]))
    assert sum(p.numel() for p in own.parameters()) == parameters
    assert attention_blocks(own) == attention_blocks(larger) == attention    # on the same levels


@pytest.mark.parametrize("name, row", PUBLIC.values())
def test_public_files_are_known(name, row):
    """By names and shapes alone. ADM's UNets learn sigma and have no null label."""
    network, load = UNet, from_adm
    if "classifier" in name:
        network, load = partial(Classifier, head_channels=64), classifier_from_adm
    with torch.device("meta"):
        weights = network(row["side"], 3, num_classes=1000, **row).state_dict()
        if network is UNet:
            weights["label_emb.weight"] = weights["label_emb.weight"][:1000]
            for key in ("out.2.weight", "out.2.bias"):
                weights[key] = torch.cat([weights[key], weights[key]])
        model = load(weights)
    assert model.img_size == row["side"] and model.num_classes == 1000
    if network is UNet:
        schedule = "cosine" if name == "64x64_diffusion.pt" else "linear"
        assert model.public == dict(dataset=name, target="eps", schedule=schedule, sample_steps=50, cfg=1.0,
                                    guidable=False)


def test_a_known_file_at_another_side_and_with_other_heads(golden, monkeypatch):
    _, weights = golden("unet_adm")
    parameters = sum(x.numel() for x in weights.values())
    monkeypatch.setitem(PUBLIC, parameters, ("ours.pt", ADM | dict(side=16, heads=2)))
    model = from_adm(weights, img_size=32, head_channels=8)
    assert model.img_size == 32 and model.middle_block[1].head_channels == 8


@pytest.mark.parametrize("given, named", [
    (dict(), "heads"),
    (ADM, "heads"),
    (dict(heads=2), "img_size.*channel_mult.*res_blocks.*attention_resolutions"),
])
def test_what_shapes_do_not_show_must_be_given(golden, given, named):
    _, weights = golden("unet_adm")
    with pytest.raises(ValueError, match=named):
        from_adm(weights, **given)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("key, value", [
    ("time_embed.0.weight", None),
    ("input_blocks.1.0.in_layers.2.bias", None),
    ("middle_block.1.norm.bias", torch.zeros(5)),
    ("input_blocks.1.2.weight", torch.zeros(5)),
])
def test_a_file_that_does_not_fit_is_one_line(golden, name, key, value):
    _, weights = golden(name)
    weights.pop(key, None)
    if value is not None:
        weights[key] = value
    load = classifier_from_adm if name == "classifier" else from_adm
    with pytest.raises(ValueError, match=key) as error:
        load(weights, **KINDS[name])
    assert len(str(error.value)) < 350


def test_a_class_table_without_null_label_gets_one(golden):
    values, weights = golden("unet_adm")
    model = from_adm(weights, num_classes=11, **KINDS["unet_adm"])
    assert close(model, values)
    assert model.label_emb.weight[11].abs().max() == 0
    assert not model.public["guidable"]


@pytest.mark.parametrize("rows, classes", [(1000, 1000), (1001, 1000), (999, 998)])
def test_1000_rows_have_no_null_label(golden, rows, classes):
    _, weights = golden("unet_adm")
    weights["label_emb.weight"] = torch.zeros(rows, 128)
    assert from_adm(weights, **KINDS["unet_adm"]).num_classes == classes


def test_a_whole_file_of_latent_diffusion_gives_its_unet(golden):
    values, weights = golden("unet_ldm")
    whole = {"model.diffusion_model." + name: x for name, x in weights.items()}
    whole.update({"cond_stage_model.embedding.weight": values["label_emb"].float(), "betas": torch.zeros(3)})
    assert close(from_adm(dict(state_dict=whole, epoch=1), **KINDS["unet_ldm"]), values)


def test_the_64x64_file_orders_its_rows_of_qkv_differently(golden, monkeypatch):
    """Rows of qkv are stored q k v, then head, not head, then q k v; its heads are 64 wide."""
    values, weights = golden("unet_adm")
    arguments = dict(ADM, head_channels=32, heads=None, side=16)
    parameters = sum(x.numel() for x in weights.values())
    monkeypatch.setitem(PUBLIC, parameters, ("64x64_diffusion.pt", arguments))
    for key in weights:
        if ".qkv." in key:
            by_head = weights[key].unflatten(0, (2, 3, 32))
            weights[key] = by_head.transpose(0, 1).flatten(0, 2)
    assert close(from_adm(weights), values)


@variants
def test_every_branch_starts_as_the_identity(options):
    model = small(**options | dict(channel_mult=(1, 1)))
    block, attention, _ = model.middle_block
    x = torch.randn(2, 32, 8, 8)
    context = [torch.randn(2, 1, 24)] if options is LDM else []
    assert torch.equal(block(x, torch.randn(2, 128)), x)
    assert torch.equal(attention(x, *context), x)


@variants
def test_fresh_is_zero_and_every_parameter_learns(options):
    torch.manual_seed(0)
    model, (x, t, y) = small(**options), inputs()
    assert model(x, t, y).abs().max() == 0
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(3):                       # first the last layer, then the ends of the branches, then all
        optimizer.zero_grad()
        (model(x, t, y) - x).square().mean().backward()
        optimizer.step()
    silent = {name for name, p in model.named_parameters() if p.grad.abs().max() == 0}
    if options is LDM:       # softmax over the one class token is 1 whatever query and key are
        silent = {name for name in silent if not re.search("attn2.to_[qk]|norm2", name)}
    assert not silent


@variants
def test_no_label_is_the_null_label(options):
    model = noisy(small(**options))
    x, t, y = inputs()
    null = torch.full_like(y, 5)
    assert torch.equal(model(x, t), model(x, t, null))
    assert torch.equal(model(x, t), model(x, t, y)) == (model.num_classes == 0)


@variants
def test_other_sides_and_float64(options):
    model = noisy(small(**options | dict(channel_mult=(1, 1, 2))))
    x, t, y = inputs(1, H=20, W=12)
    out = model(x, t, y).detach()
    exact = model.double()(x.double(), t, y).detach()
    assert out.shape == x.shape
    assert relative(out, exact) < 1e-4


def test_a_side_that_the_levels_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="15.*2"):
        small(img_size=15)


@pytest.mark.parametrize("wrong", [dict(heads=3), dict(heads=48), dict(head_channels=24)])
def test_heads_that_do_not_divide_the_width_are_refused(wrong):
    with pytest.raises(ValueError, match="no divisor"):
        small(**wrong)


@variants
def test_gradient_checkpointing_runs_the_blocks_again(options):
    model = noisy(small(**options))
    gradients, runs = [], []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: runs.append(1))
    for model.grad_ckpt in (False, True):
        model.zero_grad()
        model(*inputs()).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert relative(gradients[1], gradients[0]) < 1e-5
    assert len(runs) == 3 * len(model.blocks) == 3 * 9


@variants
def test_it_runs_in_bfloat16(options):
    model = noisy(small(**options)).requires_grad_(False)
    expected = model(*inputs())
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(model(*inputs()), expected) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("options", [VARIANTS[0], VARIANTS[3]])
def test_compiles_to_one_graph(options):
    model = noisy(small(**options)).requires_grad_(False)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert relative(compiled(*inputs()), model(*inputs())) < 1e-5
