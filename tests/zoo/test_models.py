"""The zoo's networks: their sizes, their layers, and where their weights come from."""

import math
import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pomona
from pomona.zoo.models import MODELS, LeNet300100, Transformer, build_model

KERNELS = {
    "lenet-300-100": {"fc1.weight": (300, 784), "fc2.weight": (100, 300), "fc3.weight": (10, 100)},
    "lenet-5": {
        "conv1.weight": (20, 1, 5, 5),
        "conv2.weight": (50, 20, 5, 5),
        "fc1.weight": (500, 800),
        "fc2.weight": (10, 500),
    },
}
KERNELS["lenet-5-caffe"] = KERNELS["lenet-5"]
CIFAR = [name for name in MODELS if name not in (*KERNELS, "gpt-tiny")]


def kernels(model):
    return {key: value for key, value in model.named_parameters() if value.ndim > 1}


@pytest.fixture
def digits():
    return torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def photos():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_have_the_names_and_shapes_of_the_papers(name):
    assert {key: tuple(value.shape) for key, value in kernels(build_model(name, seed=0)).items()} == KERNELS[name]


@pytest.mark.parametrize(
    ("name", "count"), [("lenet-300-100", 266_200), ("lenet-5", 430_500), ("lenet-5-caffe", 430_500)]
)
def test_kernel_weights_count(name, count):
    assert sum(p.numel() for p in kernels(build_model(name, seed=0)).values()) == count


@pytest.mark.parametrize(
    ("name", "count", "num_kernels"),
    [
        ("vgg16-cifar", 15_245_130, 16),  # gRDA's logs
        ("wrn-28-10", 36_489_290, 28 + 1),  # the same; 28 convolutions, three of them shortcuts, and the dense layer
        ("resnet-20", 269_722, 20),  # the pretrained models
        ("resnet-32", 464_154, 32),
        ("resnet-44", 658_586, 44),
        ("resnet-56", 853_018, 56),
        ("resnet-56b", 853_018 + 16 * 32 + 32 * 64 + 2 * (32 + 64), 58),  # two convolutions with norms more
    ],
)
def test_parameters_of_the_cifar_networks_count_as_published(name, count, num_kernels):
    model = build_model(name, seed=0)
    assert sum(p.numel() for p in model.parameters()) == count
    assert len(kernels(model)) == num_kernels


@pytest.mark.parametrize(
    ("name", "count", "num_kernels"),
    [
        ("resnet-56b", 851_504, 58),  # GSM's tables: 852K
        ("densenet-40", 1_001_616, 1 + 3 * 12 + 2 + 1),  # 1002K
        ("vgg16-bn", 15_239_872 - 2 * 512**2, 14),  # vgg16-cifar without two dense layers
        ("alexnet-cifar", 23_232 + 307_200 + 663_552 + 884_736 + 589_824 + 2_560, 6),
    ],
)
def test_kernels_of_the_cifar_networks_count_as_published(name, count, num_kernels):
    found = kernels(build_model(name, seed=0))
    assert sum(p.numel() for p in found.values()) == count
    assert len(found) == num_kernels


def test_narrow_networks_have_the_depth_of_the_wide_one_and_a_share_of_its_weights():
    for name in [name for name in MODELS if "-w" in name]:
        family, _, width = name.rpartition("-w")
        wide, narrow = (kernels(build_model(one, seed=0)) for one in (family, name))
        assert list(narrow) == list(wide)
        first = next(iter(narrow.values()))
        assert first.shape[0] == int(width)
        share = int(width) / next(iter(wide.values())).shape[0]
        sizes = [sum(p.numel() for p in some.values()) for some in (narrow, wide)]
        assert share**2 <= sizes[0] / sizes[1] < 1.2 * share**2  # more only in the first layer and the last


def test_lenet_300_100_is_its_formula(digits):
    model = LeNet300100()
    w1, b1, w2, b2, w3, b3 = model.parameters()
    hidden = torch.relu(torch.relu(digits.view(3, 784) @ w1.T + b1) @ w2.T + b2)
    torch.testing.assert_close(model(digits), hidden @ w3.T + b3)  # default tolerance: a fused product


@pytest.mark.parametrize(("name", "low"), [("lenet-5", 0.0), ("lenet-5-caffe", None)])
def test_lenet_5_is_its_formula(name, low, digits):
    model = build_model(name, seed=0)
    k1, c1, k2, c2, w1, b1, w2, b2 = model.parameters()
    x = F.conv2d(digits, k1, c1).clamp(min=low, max=math.inf)
    x = x.view(3, 20, 12, 2, 12, 2).amax(dim=(3, 5))
    x = F.conv2d(x, k2, c2).clamp(min=low, max=math.inf)
    x = x.view(3, 50, 4, 2, 4, 2).amax(dim=(3, 5))
    x = (x.view(3, 800) @ w1.T + b1).clamp(min=0)
    torch.testing.assert_close(model(digits), x @ w2.T + b2)  # default tolerance: a fused product


def test_vgg16_is_its_formula(photos):
    model = build_model("vgg16-cifar", seed=0).eval()
    parameters = iter(model.parameters())
    x = photos
    for depth in (2, 2, 3, 3, 3):
        for _ in range(depth):
            x = F.conv2d(x, next(parameters), next(parameters), padding=1).clamp(min=0)
        n, c, h, w = x.shape
        x = x.view(n, c, h // 2, 2, w // 2, 2).amax(dim=(3, 5))
    w1, b1, w2, b2, w3, b3 = parameters
    hidden = torch.relu(torch.relu(x.view(2, 512) @ w1.T + b1) @ w2.T + b2)
    torch.testing.assert_close(model(photos), hidden @ w3.T + b3)  # default tolerance: a fused product


def test_vgg16_drops_half_of_the_inputs_of_two_dense_layers_in_training(photos):
    model = build_model("vgg16-cifar", seed=0)
    seen = {}
    for name in ("fc1", "fc2", "fc3"):
        getattr(model, name).register_forward_pre_hook(lambda _, x, name=name: seen.update({name: x[0]}))
    for layer in (model.features[-3], model.fc1, model.fc2):
        nn.init.zeros_(layer.weight)
        nn.init.ones_(layer.bias)  # so that ReLU makes no zeros
    model(photos)
    shares = {name: float((x == 0).float().mean()) for name, x in seen.items()}
    # 1,024 draws: five standard errors
    assert shares == {"fc1": pytest.approx(0.5, abs=0.08), "fc2": pytest.approx(0.5, abs=0.08), "fc3": 0.0}


@torch.no_grad()
def test_resnet_shortcuts_carry_every_second_pixel_to_the_middle_channels(photos):
    model = build_model("resnet-20", seed=0).eval()
    for stage in (model.layer1, model.layer2, model.layer3):
        for block in stage:
            nn.init.zeros_(block.bn2.weight)  # shuts the branch, so that the shortcuts are all there is
    x = F.conv2d(photos, model.conv1.weight, padding=1).clamp(min=0) / math.sqrt(1 + model.bn1.eps)
    features = torch.zeros(2, 64)
    features[:, 24:40] = x[:, :, ::4, ::4].mean(dim=(2, 3))  # 16 channels, with 8 and then 16 of zeros on each side
    torch.testing.assert_close(model(photos), features @ model.linear.weight.T + model.linear.bias)


@torch.no_grad()
def test_resnet_shortcuts_of_option_b_are_convolutions_with_norms(photos):
    model = build_model("resnet-56b", seed=0).eval()
    scale = 1 / math.sqrt(1 + model.bn1.eps)
    x = F.conv2d(photos, model.conv1.weight, padding=1).clamp(min=0) * scale
    for stage in (model.layer1, model.layer2, model.layer3):
        for block in stage:
            nn.init.zeros_(block.bn2.weight)  # shuts the branch, so that the shortcuts are all there is
        if stage is not model.layer1:
            x = F.conv2d(x, stage[0].shortcut[0].weight, stride=2).clamp(min=0) * scale
    torch.testing.assert_close(model(photos), x.mean(dim=(2, 3)) @ model.linear.weight.T + model.linear.bias)


@torch.no_grad()
def test_an_odd_number_of_new_channels_is_put_around_the_old_ones():
    block = build_model("resnet-20-w5", seed=0).layer2[0].eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(2, 10, 2, 2)
    expected[:, 2:7] = x[:, :, ::2, ::2]
    assert torch.equal(block(x), expected)


@torch.no_grad()
def test_dense_layers_add_channels_and_transitions_keep_their_number():
    model = build_model("densenet-40", seed=0)
    sizes, x = [], torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    for block in model.blocks:
        before, x = x, block(x)
        sizes.append((x.shape[1], x.shape[2]))
        if x.shape[2] == before.shape[2]:
            inner = F.batch_norm(before, None, None, training=True).relu()
            torch.testing.assert_close(x, torch.cat([before, F.conv2d(inner, block.conv.weight, padding=1)], dim=1))
        else:
            inner = F.conv2d(F.batch_norm(before, None, None, training=True).relu(), block.conv.weight)
            torch.testing.assert_close(x, inner.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).mean(dim=(3, 5)))
    ends = [(160, 8), (160, 4), (304, 4), (304, 2), (448, 2)]
    assert [sizes[i] for i in (11, 12, 24, 25, 37)] == ends and len(sizes) == 38


@torch.no_grad()
def test_a_resnet_branch_is_two_convolutions_with_norms():
    block = build_model("resnet-20", seed=0).layer2[0]
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    inner = F.conv2d(x, block.conv1.weight, stride=2, padding=1)
    inner = F.conv2d(F.batch_norm(inner, None, None, training=True).relu(), block.conv2.weight, padding=1)
    shortcut = torch.zeros(2, 32, 4, 4)
    shortcut[:, 8:24] = x[:, :, ::2, ::2]
    expected = (F.batch_norm(inner, None, None, training=True) + shortcut).relu()
    torch.testing.assert_close(block(x), expected)


@torch.no_grad()
def test_wide_resnet_shortcuts_are_convolutions_of_the_raw_input(photos):
    model = build_model("wrn-28-10", seed=0).eval()
    x = F.conv2d(photos, model.conv1.weight, model.conv1.bias, padding=1)
    for stage, stride in ((model.layer1, 1), (model.layer2, 2), (model.layer3, 2)):
        for block in stage:
            nn.init.zeros_(block.conv2.weight)  # shuts the branch but for its bias
            if block is stage[0]:
                x = F.conv2d(x, block.shortcut.weight, block.shortcut.bias, stride=stride)
            x = x + block.conv2.bias.view(1, -1, 1, 1)
    features = (x.clamp(min=0) / math.sqrt(1 + 1e-5)).mean(dim=(2, 3))
    torch.testing.assert_close(model(photos), features @ model.linear.weight.T + model.linear.bias)


@torch.no_grad()
def test_a_wide_branch_begins_with_its_norm_and_strides_in_its_second_convolution():
    block = build_model("wrn-28-10", seed=0).layer2[0]
    x = torch.randn(2, 160, 4, 4, generator=torch.Generator().manual_seed(0))
    inner = F.batch_norm(x, None, None, training=True).relu()
    inner = F.conv2d(inner, block.conv1.weight, block.conv1.bias, padding=1)
    inner = F.batch_norm(inner, None, None, training=True).relu()
    inner = F.conv2d(inner, block.conv2.weight, block.conv2.bias, padding=1, stride=2)
    expected = inner + F.conv2d(x, block.shortcut.weight, block.shortcut.bias, stride=2)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("name", CIFAR)
def test_every_parameter_of_the_cifar_networks_gets_a_gradient(name, photos):
    model = build_model(name, seed=0)
    logits = model(photos)
    assert logits.shape == (2, 10)
    F.cross_entropy(logits, torch.tensor([3, 5])).backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("depth", [20, 32, 44, 56])
def test_pretrained_resnets_load_by_name(depth):
    """The folder of the .th files of github.com/akamaster/pytorch_resnet_cifar10 is given by POMONA_CIFAR_MODELS."""
    folder = os.environ.get("POMONA_CIFAR_MODELS")
    files = sorted(Path(folder).glob(f"resnet{depth}-*.th")) if folder else []
    if not files:
        pytest.skip("no pretrained models: POMONA_CIFAR_MODELS is not set, or has none of this depth")
    saved = torch.load(files[0], map_location="cpu", weights_only=True)["state_dict"]
    model = build_model(f"resnet-{depth}", seed=0)
    model.load_state_dict({key.removeprefix("module."): value for key, value in saved.items()})
    assert torch.equal(model.linear.weight, saved["module.linear.weight"])


@pytest.mark.parametrize("name", MODELS)
def test_the_seed_decides_every_bit(name):
    first = build_model(name, seed=7).state_dict()
    torch.rand(3)  # the global state has moved on
    again, other = build_model(name, seed=7).state_dict(), build_model(name, seed=8).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    drawn = [key for key, value in first.items() if value.ndim > 1]
    assert not any(torch.equal(first[key], other[key]) for key in drawn)


@pytest.mark.parametrize("name", MODELS)
def test_the_global_random_state_is_untouched(name):
    before = torch.get_rng_state()
    build_model(name, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_xavier_uniform_and_biases_zero(name):
    for parameter in build_model(name, seed=0).parameters():
        if parameter.ndim == 1:
            assert not parameter.any()
            continue
        receptive = parameter[0, 0].numel()
        bound = math.sqrt(6 / (receptive * (parameter.shape[0] + parameter.shape[1])))
        # Of 500 or more uniform draws the largest misses the last tenth with probability below 1e-22.
        assert 0.9 * bound < parameter.abs().max() <= bound


def assert_normal(kernel, fan):
    std = math.sqrt(2 / fan)
    # Standard errors of the estimates, five of them.
    assert float(kernel.mean()) == pytest.approx(0.0, abs=5 * std / math.sqrt(kernel.numel()))
    assert float(kernel.std()) == pytest.approx(std, rel=5 / math.sqrt(2 * kernel.numel()))
    assert kernel.abs().max() > math.sqrt(3) * std  # which a uniform one of this spread cannot reach


def assert_uniform(layer):
    bound = layer.weight[0].numel() ** -0.5
    for parameter in (layer.weight, layer.bias):
        # Of ten or more uniform draws all miss the last half of the range with probability below 1e-3.
        assert 0.5 * bound < parameter.abs().max() <= bound
    assert float(layer.weight.std()) == pytest.approx(bound / math.sqrt(3), rel=5 / math.sqrt(2 * layer.weight.numel()))


def layers(model, *kinds):
    return [module for module in model.modules() if isinstance(module, kinds)]


@torch.no_grad()
def test_vgg16_is_initialised_as_in_grdas_experiments():
    model = build_model("vgg16-cifar", seed=0)
    for layer in layers(model, nn.Conv2d):
        assert_normal(layer.weight, 9 * layer.out_channels)
        assert not layer.bias.any()
    for layer in layers(model, nn.Linear):
        assert_uniform(layer)


@torch.no_grad()
def test_wide_resnet_is_initialised_as_torch_does_it():
    model = build_model("wrn-28-10", seed=0)
    for layer in layers(model, nn.Conv2d, nn.Linear):
        assert_uniform(layer)
    for layer in layers(model, nn.BatchNorm2d):
        assert bool((layer.weight == 1).all()) and not layer.bias.any()


@torch.no_grad()
def test_resnets_are_initialised_by_the_fan_in():
    model = build_model("resnet-56", seed=0)
    for layer in layers(model, nn.Conv2d, nn.Linear):
        assert_normal(layer.weight, layer.weight[0].numel())
    assert not model.linear.bias.any()


def test_an_unknown_model_names_the_known_and_the_closest():
    with pytest.raises(ValueError, match=r"resnet-44, resnet-56, .*, got 'lenet5' \(did you mean 'lenet-5'\?\)"):
        build_model("lenet5", seed=0)
    with pytest.raises(
        ValueError, match=r"one of lenet-300-100, lenet-5, lenet-5-caffe, vgg16-cifar, .*, got 'transformer'$"
    ):
        build_model("transformer", seed=0)


# The language model


@pytest.fixture(scope="module")
def gpt():
    return build_model("gpt-tiny", seed=0)


@pytest.fixture
def text():
    return torch.randint(65, (2, 20), generator=torch.Generator().manual_seed(0))


def test_kernel_weights_of_the_language_model_count(gpt):
    sizes = {key: value.numel() for key, value in kernels(gpt).items()}
    blocks = sum(size for key, size in sizes.items() if key.startswith("blocks."))
    assert blocks == 4 * (96 * 288 + 96 * 96 + 2 * 96 * 384) == 442_368
    assert sizes["token.weight"] == 65 * 96 == 6_240 and sizes["position.weight"] == 128 * 96 == 12_288
    assert sum(sizes.values()) == 460_896


def test_the_head_is_the_embedding_and_counts_once(gpt):
    assert gpt.head.weight is gpt.token.weight
    assert {"head.weight", "token.weight"} <= set(gpt.state_dict())
    report = pomona.report(gpt, pomona.Scope(also=["*token", "*position"]))
    assert report.total == 460_896
    assert pomona.report(gpt).total == 442_368  # without the embeddings
    assert report.outside["head.weight"] == "tied to token.weight"


def test_the_head_stays_tied_when_weights_are_drawn_loaded_and_moved(gpt):
    other = build_model("gpt-tiny", seed=1)
    other.load_state_dict(gpt.state_dict())
    other = other.to(memory_format=torch.channels_last).double()
    assert other.head.weight is other.token.weight
    assert torch.equal(other.head.weight, gpt.token.weight.double())


@torch.no_grad()
def test_the_language_model_is_its_formula(text):
    gpt = build_model("gpt-tiny", seed=0).double()
    for p in gpt.parameters():
        p.add_(torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(p.numel())), alpha=0.1)

    def normed(x, norm):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias

    x = gpt.token.weight[text] + gpt.position.weight[:20]
    later = torch.ones(20, 20, dtype=torch.bool).triu(1)
    for block in gpt.blocks:
        q, k, v = (normed(x, block.norm1) @ block.qkv.weight.T + block.qkv.bias).split(96, dim=-1)
        heads = []
        for i in range(3):
            mine = slice(32 * i, 32 * i + 32)
            scores = q[..., mine] @ k[..., mine].transpose(1, 2) / math.sqrt(32)
            heads.append(scores.masked_fill(later, -math.inf).softmax(-1) @ v[..., mine])
        x = x + torch.cat(heads, -1) @ block.out.weight.T + block.out.bias
        up = normed(x, block.norm2) @ block.up.weight.T + block.up.bias
        x = x + (up * (1 + torch.erf(up / math.sqrt(2))) / 2) @ block.down.weight.T + block.down.bias
    torch.testing.assert_close(gpt(text), normed(x, gpt.norm) @ gpt.token.weight.T)  # default tolerance of float64


@torch.no_grad()
def test_no_logit_depends_on_a_later_character(gpt, text):
    changed = text.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 65
    before, after = gpt(text), gpt(changed)
    assert before.shape == (2, 20, 65)
    torch.testing.assert_close(before[:, :12], after[:, :12], rtol=0, atol=1e-6)  # kernels may sum in another order
    assert bool((before[:, 12:] != after[:, 12:]).any(-1).all())


@torch.no_grad()
def test_the_language_model_takes_at_most_its_context(gpt):
    assert gpt(torch.zeros(1, 128, dtype=torch.int64)).shape == (1, 128, 65)
    with pytest.raises(IndexError):
        gpt(torch.zeros(1, 129, dtype=torch.int64))


def test_every_parameter_of_the_language_model_gets_a_gradient(text):
    gpt = build_model("gpt-tiny", seed=0)
    F.cross_entropy(gpt(text).flatten(0, 1), text.flatten()).backward()
    assert [key for key, p in gpt.named_parameters() if p.grad is None or not p.grad.any()] == []


@torch.no_grad()
def test_dropout_of_the_language_model_is_of_training_alone(text):
    model = Transformer(dropout=0.5)
    model.reset(torch.Generator().manual_seed(0))
    assert not torch.equal(model(text), model(text))
    model.eval()
    assert torch.equal(model(text), model(text))


@torch.no_grad()
def test_the_language_model_is_initialised_by_the_fan_in(gpt):
    for block in gpt.blocks:
        for layer, fan in ((block.qkv, 96), (block.up, 96), (block.out, 8 * 96), (block.down, 8 * 384)):
            assert_normal(layer.weight, 2 * fan)
            assert not layer.bias.any()
    for embedding in (gpt.token, gpt.position):
        assert_normal(embedding.weight, 2 / 0.05**2)
    for norm in layers(gpt, nn.LayerNorm):
        assert bool((norm.weight == 1).all()) and not norm.bias.any()
