"""The UNets and the classifier against the canonical implementations' golden outputs, and their loaders."""
import re

import pytest
import torch
from conftest import relative

from model_unet import PUBLIC, SIZES, Attention, Classifier, SpatialTransformer, UNet
from model_unet import classifier_from_adm, from_adm

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


def whole_file(values, weights):
    """A file of latent-diffusion: prefixes, the class table by another name, other parts beside."""
    weights = {"model.diffusion_model." + key: value for key, value in weights.items()}
    weights["cond_stage_model.embedding.weight"] = values["label_emb"].float()
    weights["first_stage_model.quantize.weight"] = torch.zeros(2)
    weights["model_ema.decay"] = torch.tensor(1.)
    return {"state_dict": weights, "epoch": 3}


@pytest.mark.parametrize("name", ["unet_adm", "unet_plain", "unet_ldm"])
def test_golden(golden, name):
    values, weights = golden(name)
    if name == "unet_ldm":
        weights = whole_file(values, weights)
    model = from_adm(weights, **KINDS[name])
    assert close(model, values)
    expected = dict(dataset=None, target=None, schedule="cosine", guidable=name != "unet_plain")
    assert model.public == expected | dict(sample_steps=50, cfg=1.0)
    attention_norm = model.middle_block[1].norm                              # no golden value shows its eps
    assert attention_norm.eps == (1e-6 if name == "unet_ldm" else 1e-5)


def test_golden_classifier_and_its_gradient(golden):
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
    ("unet-ldm",    4, 0,    394_984_196, 16),
])
def test_sizes(name, channels, classes, parameters, attention):
    """The paper's 395.0M leaves the class table out, 1,001 rows of 512. 421.5M and 295.9M have it in."""
    row = SIZES[name]
    with torch.device("meta"):
        own, larger = (UNet(img_size=side, in_channels=channels, num_classes=classes, **row)
                       for side in (row["side"], 3 * row["side"]))
    assert sum(p.numel() for p in own.parameters()) == parameters
    assert attention_blocks(own) == attention_blocks(larger) == attention    # on the same levels


def published(name, row):
    """Names and shapes of a public file. ADM's UNets learn sigma and have no null label."""
    row = {key: value for key, value in row.items() if key != "new_attention_order"}
    if "classifier" in name:
        return Classifier(row["side"], 3, num_classes=1000, head_channels=64, **row).state_dict()
    in_channels = 4 if name in ("unet-b", "unet-ldm") else 3
    num_classes = 0 if name in ("unet-cifar", "256x256_diffusion_uncond.pt") else 1000
    weights = UNet(row["side"], in_channels, num_classes=num_classes, **row).state_dict()
    if ".pt" in name:
        weights["out.2.weight"] = weights["out.2.weight"].repeat(2, 1, 1, 1)
        weights["out.2.bias"] = weights["out.2.bias"].repeat(2)
    if num_classes and ".pt" in name:
        weights["label_emb.weight"] = weights["label_emb.weight"][:1000]
    return weights


@pytest.mark.parametrize("name, row", PUBLIC.values())
def test_public_files_are_known(name, row):
    with torch.device("meta"):
        weights = published(name, row)
        if "classifier" in name:
            assert classifier_from_adm(weights).img_size == row["side"]
            return
        model = from_adm(weights)
    assert model.public["dataset"] == name
    assert model.public["target"] == ("eps" if ".pt" in name else None)
    assert model.public["guidable"] == (name in ("unet-b", "unet-ldm"))
    schedules = {"64x64_diffusion.pt": "cosine"}
    assert model.public["schedule"] == schedules.get(name, "linear" if ".pt" in name else "cosine")
    assert model.num_classes == (0 if name in ("unet-cifar", "256x256_diffusion_uncond.pt") else 1000)


def test_a_known_file_at_another_side_and_with_other_heads():
    with torch.device("meta"):
        weights = UNet(32, 3, **SIZES["unet-cifar"]).state_dict()
        model = from_adm(weights, img_size=64, head_channels=32)
    assert model.img_size == 64 and attention_blocks(model) == 15
    assert model.middle_block[1].heads == 8


@pytest.mark.parametrize("given, named", [
    (dict(), "img_size, channel_mult, res_blocks, attention_resolutions, heads"),
    (dict(img_size=16, heads=2), "channel_mult, res_blocks, attention_resolutions"),
    (ADM, "heads"),
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
    assert len(str(error.value).splitlines()) == 1


def test_learned_sigma_is_cut(golden):
    values, weights = golden("unet_adm")
    for key in ("out.2.weight", "out.2.bias"):
        weights[key] = torch.cat([weights[key], torch.randn_like(weights[key])])
    model = from_adm(weights, **KINDS["unet_adm"])
    assert close(model, values)
    assert model.public["target"] == "eps"


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


def test_new_attention_order(golden):
    """The same network with rows of qkv stored q k v, then head."""
    values, weights = golden("unet_adm")
    for key in weights:
        if ".qkv." in key:
            by_head = weights[key].unflatten(0, (2, 3, 32))
            weights[key] = by_head.transpose(0, 1).flatten(0, 2)
    assert close(from_adm(weights, **KINDS["unet_adm"], new_attention_order=True), values)
    assert not close(from_adm(weights, **KINDS["unet_adm"]), values, 1e-3)


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


@pytest.mark.parametrize("how, expected", [
    (dict(attention_resolutions=(32,)), {(32, 2), (8, 2)}),                  # the middle always attends
    (dict(attention_resolutions=(16, 8), head_channels=8), {(16, 4), (8, 4)}),
    (dict(attention_resolutions=(8,), side=16), {(16, 2), (8, 2)}),
])
def test_attention_is_where_it_was_asked_for(how, expected):
    model, found = small(**dict(img_size=32, channel_mult=(1, 1, 1)) | how), set()

    def note(layer, inputs, out):
        found.add((out.shape[-1], layer.heads))
    for layer in model.modules():
        if isinstance(layer, Attention):
            layer.register_forward_hook(note)
    model(*inputs(1, H=32, W=32))
    assert found == expected


@pytest.mark.parametrize("wrong", [
    dict(img_size=15),
    dict(heads=3),
    dict(head_channels=24),
])
def test_sizes_that_do_not_divide_are_refused(wrong):
    with pytest.raises(ValueError, match="found"):
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
def test_bfloat16_autocast_and_channels_last(options):
    model = noisy(small(**options)).requires_grad_(False)
    x, t, y = inputs()
    expected = model(x, t, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(model(x, t, y), expected) < 0.05
    model.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    assert relative(model(x, t, y), expected) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("options", [VARIANTS[0], VARIANTS[3]])
def test_compiles_to_one_graph(options):
    model = noisy(small(**options)).requires_grad_(False)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert relative(compiled(*inputs()), model(*inputs())) < 1e-5
