"""The UNets and the classifier against the canonical implementations' golden outputs, and their loaders."""
import pytest
import torch
from conftest import relative

from model_unet import SIZES, Attention, Classifier, ResBlock, UNet, classifier_from_adm, from_adm
from sample import to_device

KINDS = {"unet_adm": dict(heads=2), "unet_plain": dict(head_channels=16), "unet_ldm": dict(heads=1, img_size=8)}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Layers this small are slower on two threads, much slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def public(golden, name):
    """Arrays, and the state dict as the public file has it: latent-diffusion's with prefixes and other parts beside."""
    values, weights = golden(name)
    if name == "unet_ldm":
        weights = {"model.diffusion_model." + key: value for key, value in weights.items()}
        weights |= {"cond_stage_model.embedding.weight": values["label_emb"].float(), "betas": torch.zeros(1000),
                    "first_stage_model.quantize.weight": torch.zeros(2), "model_ema.decay": torch.tensor(1.)}
        weights = {"state_dict": weights, "epoch": 3}
    return values, weights


def noisy(model, seed=0):
    """Zero-initialised layers would hide what comes before them."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def small(**more):
    return UNet(**{**dict(img_size=16, in_channels=3, channels=32, channel_mult=(1, 2), res_blocks=1,
                          attention_resolutions=(8,), num_classes=5, heads=2), **more})


def inputs(B=3, C=3, H=16, W=16, classes=5):
    torch.manual_seed(1)
    return torch.randn(B, C, H, W), torch.linspace(0, 999, B).long(), torch.arange(B) % (classes + 1)


VARIANTS = [dict(), dict(scale_shift=False, resblock_updown=False, head_channels=16), dict(num_classes=0),
            dict(context_dim=24, heads=1, scale_shift=False, resblock_updown=False)]


@pytest.mark.parametrize("name", KINDS)
def test_golden(golden, name):
    values, weights = public(golden, name)
    model = from_adm(weights, **KINDS[name])
    with torch.no_grad():
        assert relative(model(values["x"], values["t"], values["y"]), values["out"]) < 5e-5
    assert name != "unet_ldm" or model.middle_block[1].norm.eps == 1e-6
    assert model.img_size == values["x"].shape[-1] and model.in_channels == values["x"].shape[1]
    assert model.num_classes == (0 if name == "unet_plain" else 10)
    if model.num_classes:                                                    # no label is the null label
        assert torch.equal(model(values["x"], values["t"]), model(values["x"], values["t"], torch.full((2,), 10)))


def test_golden_classifier_and_its_gradient(golden):
    values, weights = golden("classifier")
    model, x = classifier_from_adm(weights, head_channels=16), values["x"].clone().requires_grad_()
    logits = model(x, values["t"])
    log_prob = logits.log_softmax(1)[torch.arange(3), values["y"]].sum()
    assert relative(logits.detach(), values["logits"]) < 5e-5
    assert relative(torch.autograd.grad(log_prob, x)[0], values["grad_log_prob"]) < 5e-5
    assert model.img_size == 16
    for wrong in (torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 8, 32)):      # its position table has one size
        with pytest.raises(ValueError, match="found"):
            model(wrong, torch.zeros(1, dtype=torch.long))


@pytest.mark.parametrize("name, img_size, C, classes, count", [
    ("unet-celeba", 64, 3, 0, 58_936_963), ("unet-adm", 64, 3, 1000, 295_900_035), ("unet-b", 32, 4, 1000, 129_146_692),
    ("unet-ldm", 32, 4, 0, 394_984_196), ("unet-cifar", 32, 3, 0, 52_542_979), ("unet-adm128", 128, 3, 1000, 421_523_715)])
def test_parameters_of_the_papers_sizes(name, img_size, C, classes, count):
    """The paper's 395.0M leaves the class table out: 1,001 rows of 512 more. 421.5M and 295.9M have it in."""
    with torch.device("meta"):
        model = UNet(img_size, C, num_classes=classes, **SIZES[name])
    assert sum(p.numel() for p in model.parameters()) == count


def test_adms_classifier_has_its_published_size():
    with torch.device("meta"):
        model = Classifier(64, 3, 128, (1, 2, 3, 4), 4, (32, 16, 8), 1000)
    assert sum(p.numel() for p in model.parameters()) == 65_438_568
    assert [type(layer) for layer in model.input_blocks[6]] == [ResBlock, Attention]


@pytest.mark.parametrize("options", VARIANTS)
def test_every_branch_starts_as_the_identity(options):
    """Without its last convolution's zeros a res-block, and an attention block, changes what passes."""
    torch.manual_seed(0)
    model, x = small(**options, channel_mult=(1, 1)), torch.randn(2, 32, 8, 8)
    block, attention, _ = model.middle_block
    assert torch.equal(block(x, torch.randn(2, 128)), x)
    assert torch.equal(attention(x, torch.randn(2, 1, 24)) if options.get("context_dim") else attention(x), x)


@pytest.mark.parametrize("options", VARIANTS)
def test_fresh_is_zero_and_every_parameter_learns(options):
    torch.manual_seed(0)
    model, (x, t, y) = small(**options), inputs()
    out = model(x, t, y)
    assert out.shape == x.shape and out.abs().max() == 0
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(3):                # first step: the last layer alone; second: the ends of the branches; then all
        optimizer.zero_grad()
        (model(x, t, y) - x).square().mean().backward()
        optimizer.step()
    silent = {name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0}
    assert all(p.grad is not None for p in model.parameters())
    # softmax over the one class token is 1 whatever query and key are
    assert all(".attn2.to_q." in name or ".attn2.to_k." in name or ".norm2." in name for name in silent), silent
    assert not silent or "context_dim" in options


def test_every_sample_has_its_own_time_and_class():
    for options in VARIANTS:
        model, (x, t, y) = noisy(small(**options)), inputs(5)
        with torch.no_grad():
            together = model(x, t, y)
            alone = torch.cat([model(x[i:i + 1], t[i:i + 1], y[i:i + 1]) for i in range(5)])
            assert relative(alone, together) < 1e-5
            assert (model(x, t.flip(0), y) - together).abs().amax((1, 2, 3))[[0, 1, 3, 4]].min() > 1e-4
            moved = (model(x, t, (y + 1) % 6) - together).abs().amax((1, 2, 3))
            assert moved.min() > 1e-4 if model.num_classes else moved.max() == 0


@pytest.mark.parametrize("options", VARIANTS)
def test_other_sizes(options):
    model = noisy(small(**options, channel_mult=(1, 1, 2), attention_resolutions=(4,)))
    x, t, y = inputs(1, H=20, W=12)
    with torch.no_grad():
        assert model(x, t, y).shape == x.shape == model.double()(x.double(), t, y).shape
        model.float()
        for wrong in (x[:, :, :18], x[..., :10], x[:, :2], x[0], torch.zeros(1, 3, 4, 4, 4)):
            with pytest.raises(ValueError, match="found .* multiples of 4") as error:
                model(wrong, t, y)
            assert len(str(error.value).splitlines()) == 1


def test_attention_is_where_it_was_asked_for():
    def sides(**more):
        model = small(img_size=32, channel_mult=(1, 1, 1), **more)
        found = set()
        for layer in model.modules():
            if isinstance(layer, Attention):
                layer.register_forward_hook(lambda layer, args, out: found.add((args[0].shape[-1], layer.heads)))
        model(*inputs(1, H=32, W=32))
        return found
    assert sides(attention_resolutions=(32,)) == {(32, 2), (8, 2)}           # 8: the middle always attends
    assert sides(attention_resolutions=(16, 8), head_channels=8) == {(16, 4), (8, 4)}


@pytest.mark.parametrize("wrong", [dict(img_size=15), dict(channels=48), dict(heads=3), dict(head_channels=24), dict(heads=0)])
def test_wrong_shapes_are_refused(wrong):
    with pytest.raises(ValueError, match="found"):
        small(**wrong)


def test_round_trip():
    for options in VARIANTS:
        model, (x, t, y) = noisy(small(**options)), inputs()
        if options.get("context_dim"):
            weights = {"model.diffusion_model." + key: value for key, value in model.state_dict().items()}
            weights["cond_stage_model.embedding.weight"] = weights.pop("model.diffusion_model.label_emb.weight")
        again = from_adm(weights if options.get("context_dim") else model.state_dict(), heads=model.heads,
                         head_channels=model.head_channels)
        with torch.no_grad():
            assert torch.equal(again(x, t, y), model(x, t, y))


@pytest.mark.parametrize("name", [name for name in SIZES if name != "unet-tiny"])
def test_architecture_is_read_off_the_shapes(name, monkeypatch):
    """A preset's depth at a twentieth of its width, and the heads that its own width would get."""
    import model_unet
    size = SIZES[name]
    side = 8 * 2 ** (len(size["channel_mult"]) - 1) if name not in ("unet-b", "unet-cifar") else 32
    with torch.device("meta"):
        model = UNet(side, 4 if "ldm" in name or name.endswith("-b") else 3, num_classes=1000, **{**size, "channels": 32,
                     "heads": 1, "head_channels": None, "context_dim": size.get("context_dim") and 8})
        found = model_unet.read(model.state_dict())
        again = from_adm(model.state_dict(), heads=1)
    assert found["channel_mult"] == list(size["channel_mult"]) and found["res_blocks"] == size["res_blocks"]
    assert again.attention_levels == model.attention_levels and again.resblock_updown == model.resblock_updown
    assert again.scale_shift == model.scale_shift and again.num_classes == 1000
    heads = model_unet.public_heads(**{**found, "channels": size["channels"]})
    widths = {round(size["channels"] * mult) for mult in size["channel_mult"][1:]}
    for width in widths if name != "unet-ldm" else ():                       # there the public file differs, as documented
        assert heads.get("heads", width // heads.get("head_channels", width)) == \
            size.get("heads", width // size.get("head_channels", width))
    if name == "unet-ldm":
        assert heads == dict(head_channels=32)


def test_classifier_is_read_off_the_shapes():
    with torch.device("meta"):
        model = Classifier(64, 3, 32, (1, 2, 3, 4), 4, (32, 16, 8), 7, head_channels=32)
        again = classifier_from_adm(model.state_dict(), head_channels=32)
    assert (again.img_size, again.attention_levels, again.num_classes) == (64, [1, 2, 3], 7)


def test_learned_sigma_is_cut(golden):
    values, weights = golden("unet_adm")
    for key in ("out.2.weight", "out.2.bias"):
        weights[key] = torch.cat([weights[key], torch.randn_like(weights[key])])
    with torch.no_grad():
        assert relative(from_adm(weights, heads=2)(values["x"], values["t"], values["y"]), values["out"]) < 5e-5


def test_a_class_table_without_null_label_gets_one(golden):
    values, weights = golden("unet_adm")
    model = from_adm(weights, heads=2, num_classes=11)
    assert model.num_classes == 11 and model.label_emb.weight.shape[0] == 12 and model.label_emb.weight[11].abs().max() == 0
    with torch.no_grad():
        assert relative(model(values["x"], values["t"], values["y"]), values["out"]) < 5e-5
    for rows, num_classes in ((1000, 1000), (1001, 1000), (999, 998)):
        assert from_adm({**weights, "label_emb.weight": torch.zeros(rows, 128)}, heads=2).num_classes == num_classes


def test_new_attention_order(golden):
    """The same network with rows of qkv stored q k v, then head."""
    values, weights = golden("unet_adm")
    for key in list(weights):
        if ".qkv." in key:
            weights[key] = weights[key].unflatten(0, (2, 3, 32)).transpose(0, 1).flatten(0, 2)
    with torch.no_grad():
        found = [from_adm(weights, heads=2, new_attention_order=new)(values["x"], values["t"], values["y"]) for new in (0, 1)]
    assert relative(found[1], values["out"]) < 5e-5 < 1e-3 < relative(found[0], values["out"])


def test_new_attention_order_is_the_default_for_adms_64_alone():
    """64x64_diffusion.pt: width 192, learned sigma, 1,000 classes; its head 1 of 3 starts at row 192 of the usual order."""
    def first_rows(rows, outputs, width=192):
        model = UNet(16, 3, width, (1, 1), 1, (), rows - 1, head_channels=64)
        weights = model.state_dict()
        weights["out.2.weight"], weights["out.2.bias"] = torch.zeros(outputs, width, 3, 3), torch.zeros(outputs)
        weights["middle_block.1.qkv.bias"] = torch.arange(3. * width)
        return from_adm(weights).middle_block[1].qkv.bias[[0, 64, 128, 192]].tolist()
    assert first_rows(1000, 6) == [0, 192, 384, 64]                          # q, k, v of head 0, q of head 1
    assert first_rows(1000, 6, 128) == first_rows(1001, 6) == first_rows(1000, 3) == [0, 64, 128, 192]


def refused(load, weights, **options):
    with pytest.raises(ValueError) as error:
        load(weights, **options)
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 500


@pytest.mark.parametrize("name", [*KINDS, "classifier"])
def test_strict(golden, name):
    _, weights = public(golden, name) if name in KINDS else golden(name)
    weights = weights.get("state_dict", weights)
    load, options = (from_adm, KINDS[name]) if name in KINDS else (classifier_from_adm, dict(head_channels=16))
    prefix = "model.diffusion_model." if name == "unet_ldm" else ""
    for key in ("time_embed.0.weight", "input_blocks.3.0.out_layers.3.weight", "middle_block.1.norm.bias", "out.2.weight",
                "out.0.bias", "input_blocks.0.0.weight", "input_blocks.1.0.in_layers.2.bias", "out.2.c_proj.weight"):
        if prefix + key in weights:
            refused(load, {k: v for k, v in weights.items() if k != prefix + key}, **options)
            refused(load, {**weights, prefix + key: torch.zeros(3, 5)}, **options)
            refused(load, {**weights, prefix + key: torch.zeros(())}, **options)
    refused(load, {**weights, prefix + "input_blocks.1.2.weight": torch.zeros(2)}, **options)
    refused(load, {**weights, prefix + "time_embed.0.weight": torch.zeros(128, 0)}, **options)
    refused(load, {**weights, "cond_stage_model.embedding.weight": torch.zeros(1000)}, **options)
    refused(load, {**weights, prefix + "extra": torch.zeros(2)}, **options)
    refused(load, {**weights, prefix + "input_blocks": 3}, **options)
    for wrong in ({}, None, 3, [weights], {"state_dict": {}}, {"state_dict": 3}, {"model.diffusion_model.x": torch.zeros(1)}):
        refused(load, wrong, **options)
    if name in KINDS:
        refused(load, weights)                                               # width 32 is in no public file
        refused(load, weights, heads=5)
    if name == "unet_ldm":
        refused(load, {k: v for k, v in weights.items() if not k.startswith("cond")}, **options)


@pytest.mark.parametrize("options", VARIANTS)
def test_same_result_another_way(options):
    """Gradient checkpointing and channels_last."""
    model, (x, t, y) = noisy(small(**options)), inputs()

    def run(network, x):
        model.zero_grad()
        out = network(x, t, y)
        out.square().mean().backward()
        return out.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])
    expected = run(model, x)
    model.grad_ckpt = True
    for found, value in zip(run(model, x), expected):
        assert relative(found, value) < 1e-5
    model.grad_ckpt = False
    model.to(memory_format=torch.channels_last)
    for found, value in zip(run(model, x.to(memory_format=torch.channels_last)), expected):
        assert relative(found, value) < 1e-5


@pytest.mark.parametrize("device, layout", [("cpu", torch.contiguous_format), ("meta", torch.channels_last)])
def test_layout_and_dtype_on_a_device(device, layout):
    model = small(**VARIANTS[0]).double()
    for dtype in (None, torch.float32):                                      # kept, set
        assert to_device(model, torch.device(device), dtype) is model
        assert {(p.device.type, p.dtype) for p in model.parameters()} == {(device, dtype or torch.float64)}
        assert all(p.is_contiguous(memory_format=layout) for p in model.parameters() if p.ndim == 4)


@pytest.mark.slow
@pytest.mark.parametrize("options", [VARIANTS[0], VARIANTS[3]])
def test_compiles_to_one_graph(options):
    model, (x, t, y) = noisy(small(**options)), inputs()
    with torch.no_grad():
        assert relative(torch.compile(model, backend="eager", fullgraph=True)(x, t, y), model(x, t, y)) < 1e-5


def test_gradient_checkpointing_keeps_less():
    """Without it the backward pass finds what it needs; with it the stages run again."""
    model, runs = noisy(small()), []
    model.input_blocks[1][0].register_forward_pre_hook(lambda *_: runs.append(1))
    for model.grad_ckpt, count in ((False, 1), (True, 2)):
        runs.clear()
        model(*inputs()).sum().backward()
        assert len(runs) == count
    with torch.no_grad():
        runs.clear()
        model(*inputs())
        assert len(runs) == 1


@pytest.mark.parametrize("options", VARIANTS)
def test_bfloat16_autocast(options):
    model, (x, t, y) = noisy(small(**options)), inputs()
    with torch.no_grad():
        expected = model(x, t, y)
        with torch.autocast("cpu", torch.bfloat16):
            assert relative(model(x, t, y), expected) < 0.05
