"""The zoo's networks: their sizes, their layers, and where their weights come from."""

import math

import pytest
import torch
from torch.nn import functional as F

from pomona.zoo.models import MODELS, LeNet5, LeNet300100, build_model

KERNELS = {
    "lenet-300-100": {"fc1.weight": (300, 784), "fc2.weight": (100, 300), "fc3.weight": (10, 100)},
    "lenet-5": {
        "conv1.weight": (20, 1, 5, 5),
        "conv2.weight": (50, 20, 5, 5),
        "fc1.weight": (500, 800),
        "fc2.weight": (10, 500),
    },
}


@pytest.fixture
def digits():
    return torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
def test_kernels_have_the_names_and_shapes_of_the_papers(name):
    parameters = build_model(name, seed=0).named_parameters()
    assert {key: tuple(value.shape) for key, value in parameters if value.ndim > 1} == KERNELS[name]


@pytest.mark.parametrize(("name", "count"), [("lenet-300-100", 266_200), ("lenet-5", 430_500)])
def test_kernel_weights_count(name, count):
    assert sum(p.numel() for p in build_model(name, seed=0).parameters() if p.ndim > 1) == count


def test_lenet_300_100_is_its_formula(digits):
    model = LeNet300100()
    w1, b1, w2, b2, w3, b3 = model.parameters()
    hidden = torch.relu(torch.relu(digits.view(3, 784) @ w1.T + b1) @ w2.T + b2)
    torch.testing.assert_close(model(digits), hidden @ w3.T + b3)  # default tolerance: a fused product


def test_lenet_5_is_its_formula(digits):
    model = LeNet5()
    k1, c1, k2, c2, w1, b1, w2, b2 = model.parameters()
    x = F.conv2d(digits, k1, c1).clamp(min=0)
    x = x.view(3, 20, 12, 2, 12, 2).amax(dim=(3, 5))
    x = F.conv2d(x, k2, c2).clamp(min=0)
    x = x.view(3, 50, 4, 2, 4, 2).amax(dim=(3, 5))
    x = (x.view(3, 800) @ w1.T + b1).clamp(min=0)
    torch.testing.assert_close(model(digits), x @ w2.T + b2)  # default tolerance: a fused product


@pytest.mark.parametrize("name", MODELS)
def test_the_seed_decides_every_bit(name):
    first = build_model(name, seed=7).state_dict()
    torch.rand(3)  # the global state has moved on
    again, other = build_model(name, seed=7).state_dict(), build_model(name, seed=8).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in KERNELS[name])


@pytest.mark.parametrize("name", MODELS)
def test_the_global_random_state_is_untouched(name):
    before = torch.get_rng_state()
    build_model(name, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", MODELS)
def test_kernels_are_xavier_uniform_and_biases_zero(name):
    for parameter in build_model(name, seed=0).parameters():
        if parameter.ndim == 1:
            assert not parameter.any()
            continue
        receptive = parameter[0, 0].numel()
        bound = math.sqrt(6 / (receptive * (parameter.shape[0] + parameter.shape[1])))
        # Of 500 or more uniform draws the largest misses the last tenth with probability below 1e-22.
        assert 0.9 * bound < parameter.abs().max() <= bound


def test_an_unknown_model_names_the_known_and_the_closest():
    with pytest.raises(ValueError, match=r"lenet-300-100, lenet-5, got 'lenet5' \(did you mean 'lenet-5'\?\)"):
        build_model("lenet5", seed=0)
    with pytest.raises(ValueError, match=r"one of lenet-300-100, lenet-5, got 'transformer'$"):
        build_model("transformer", seed=0)
