"""The two networks of the pruning papers, small enough to read.

References:
    LeCun, Bottou, Bengio and Haffner, Gradient-based learning applied to document recognition, 1998.
    Han, Pool, Tran and Dally, Learning both weights and connections for efficient neural networks,
    2015 (arXiv:1506.02626): the forms below, which later pruning papers share.
"""

import difflib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LeNet300100(nn.Module):
    """Two hidden layers, 784-300-100-10: 266,200 kernel weights."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 300)
        self.fc2 = nn.Linear(300, 100)
        self.fc3 = nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:  # [n, 1, 28, 28] -> [n, 10], logits
        x = F.relu(self.fc1(x.flatten(1)))
        x = F.relu(self.fc2(x))
        return self.fc3(x)  # type: ignore[no-any-return]  # nn.Module calls are untyped


class LeNet5(nn.Module):
    """Two convolutions and two dense layers: 430,500 kernel weights.

    This is the 20-50-500-10 network which ships with Caffe and which pruning papers call LeNet-5, not
    the network of 1998. Caffe has no ReLU after its convolutions; here each has one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(50 * 4 * 4, 500)
        self.fc2 = nn.Linear(500, 10)

    def forward(self, x: Tensor) -> Tensor:  # [n, 1, 28, 28] -> [n, 10], logits
        # ReLU after pooling is the same function, on a quarter of the values.
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc2(x)  # type: ignore[no-any-return]  # nn.Module calls are untyped


MODELS: dict[str, Callable[[], nn.Module]] = {"lenet-300-100": LeNet300100, "lenet-5": LeNet5}


def build_model(name: str, *, seed: int) -> nn.Module:
    """Build a model of the zoo on the CPU, its weights a function of the seed alone.

    Kernels are Xavier-uniform, biases zero. The global random state is left as it was.

    Args:
        name: a key of `MODELS`.
        seed: the same seed gives the same weights, bit for bit.

    Example:
        >>> build_model("lenet-300-100", seed=0).fc3
        Linear(in_features=100, out_features=10, bias=True)
    """
    if name not in MODELS:
        closest = difflib.get_close_matches(name, MODELS, n=1)
        hint = f" (did you mean {closest[0]!r}?)" if closest else ""
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}{hint}")
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # constructors draw weights, here in vain
        model = MODELS[name]()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter, generator=generator)
        else:
            nn.init.zeros_(parameter)
    return model
