"""The networks of the pruning papers, small enough to read.

References:
    LeCun, Bottou, Bengio and Haffner, Gradient-based learning applied to document recognition, 1998.
    Han, Pool, Tran and Dally, Learning both weights and connections for efficient neural networks,
    2015 (arXiv:1506.02626): the forms below, which later pruning papers share.
    Simonyan and Zisserman, Very deep convolutional networks for large-scale image recognition, 2014 (arXiv:1409.1556).
    He, Zhang, Ren and Sun, Deep residual learning for image recognition, 2015 (arXiv:1512.03385), section 4.2.
    Huang, Liu, van der Maaten and Weinberger, Densely connected convolutional networks, 2016 (arXiv:1608.06993).
    Ding, Ding, Zhou, Guo, Han and Liu, Global sparse momentum SGD for pruning very deep neural networks, 2019
    (arXiv:1909.12778): the form of the residual network with convolutions as shortcuts, and of the dense one.
    Zagoruyko and Komodakis, Wide residual networks, 2016 (arXiv:1605.07146).
    Chao, Wang, Xing and Cheng, Directional pruning of deep neural networks, 2020 (arXiv:2006.09358), and its code:
    the forms of VGG16 and of the wide network below.
"""

import difflib
import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Model(nn.Module):
    """A model that can draw its own initial weights."""

    def reset(self, generator: torch.Generator) -> None:
        """Xavier-uniform kernels, zero biases."""
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter, generator=generator)
            else:
                nn.init.zeros_(parameter)


def _layers(model: nn.Module) -> Iterator[nn.Conv2d | nn.Linear]:
    """The convolutions and dense layers of a model."""
    return (module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear)))


def _normal(layer: nn.Conv2d | nn.Linear, fan: int, generator: torch.Generator) -> None:
    """Normal kernels of variance ``2 / fan``, zero biases (arXiv:1502.01852)."""
    nn.init.normal_(layer.weight, std=math.sqrt(2 / fan), generator=generator)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _uniform(layer: nn.Conv2d | nn.Linear, generator: torch.Generator) -> None:
    """Kernels and biases uniform within ``fan_in^-1/2``: torch's default."""
    bound = layer.weight[0].numel() ** -0.5
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -bound, bound, generator=generator)


def _stage(
    block: Callable[[int, int, int], nn.Module], width: int, planes: int, num_blocks: int, *, stride: int
) -> nn.Sequential:
    """Blocks in a row; the first takes ``width`` channels and strides."""
    first = block(width, planes, stride)
    return nn.Sequential(first, *(block(planes, planes, 1) for _ in range(num_blocks - 1)))


class LeNet300100(Model):
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


class LeNet5(Model):
    """Two convolutions and two dense layers: 430,500 kernel weights.

    This is the 20-50-500-10 network which ships with Caffe and which pruning papers call LeNet-5, not
    the network of 1998.

    Args:
        relu: put a ReLU after each convolution. Caffe has none (``lenet-5-caffe``), and neither has the first
            public commit of GSM's authors; their code of today has it.
    """

    def __init__(self, *, relu: bool = True) -> None:
        super().__init__()
        self.relu = relu
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(50 * 4 * 4, 500)
        self.fc2 = nn.Linear(500, 10)

    def forward(self, x: Tensor) -> Tensor:  # [n, 1, 28, 28] -> [n, 10], logits
        for conv in (self.conv1, self.conv2):
            x = F.max_pool2d(conv(x), 2)
            x = F.relu(x) if self.relu else x  # after pooling: the same function, on a quarter of the values
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc2(x)  # type: ignore[no-any-return]  # nn.Module calls are untyped


class VGG16(Model):
    """Thirteen convolutions, a 512-512-10 head with dropout, no batch norm: 15,245,130 parameters.

    The form of gRDA's experiments on CIFAR-10.
    """

    def __init__(self) -> None:
        super().__init__()
        features: list[nn.Module] = []
        width = 3
        for planes, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _ in range(depth):
                features += [nn.Conv2d(width, planes, 3, padding=1), nn.ReLU(inplace=True)]
                width = planes
            features += [nn.MaxPool2d(2)]
        self.features = nn.Sequential(*features)
        self.fc1 = nn.Linear(512, 512)
        self.fc2 = nn.Linear(512, 512)
        self.fc3 = nn.Linear(512, 10)

    def reset(self, generator: torch.Generator) -> None:
        """Convolutions normal with variance ``2 / (9 out_channels)``, biases zero; the head by torch's default."""
        for layer in _layers(self):
            if isinstance(layer, nn.Conv2d):
                _normal(layer, 9 * layer.out_channels, generator)
            else:
                _uniform(layer, generator)

    def forward(self, x: Tensor) -> Tensor:  # [n, 3, 32, 32] -> [n, 10], logits
        x = self.features(x).flatten(1)
        x = F.relu(self.fc1(F.dropout(x, training=self.training)))
        x = F.relu(self.fc2(F.dropout(x, training=self.training)))
        return self.fc3(x)  # type: ignore[no-any-return]  # nn.Module calls are untyped


class VGG16BN(Model):
    """Thirteen convolutions with batch norms and without biases, one dense layer: 14,715,584 kernel weights.

    Args:
        width: channels of the first convolutions; the others have up to eight times as many.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        features: list[nn.Module] = []
        channels = 3
        for planes, depth in ((width, 2), (2 * width, 2), (4 * width, 3), (8 * width, 3), (8 * width, 3)):
            for _ in range(depth):
                conv = nn.Conv2d(channels, planes, 3, padding=1, bias=False)
                features += [conv, nn.BatchNorm2d(planes), nn.ReLU(inplace=True)]
                channels = planes
            features += [nn.MaxPool2d(2)]
        self.features = nn.Sequential(*features)
        self.linear = nn.Linear(channels, 10)

    def reset(self, generator: torch.Generator) -> None:
        """Normal kernels of variance ``2 / fan_in``, zero bias."""
        for layer in _layers(self):
            _normal(layer, layer.weight[0].numel(), generator)

    def forward(self, x: Tensor) -> Tensor:  # [n, 3, 32, 32] -> [n, 10], logits
        return self.linear(self.features(x).flatten(1))  # type: ignore[no-any-return]  # nn.Module calls are untyped


class AlexNet(Model):
    """Five convolutions, a large one first, and one dense layer: 2,471,104 kernel weights.

    The form for CIFAR that is common with PyTorch (github.com/bearpaw/pytorch-classification). Papers rarely say which
    variant they mean by the name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 11, stride=4, padding=5)
        self.conv2 = nn.Conv2d(64, 192, 5, padding=2)
        self.conv3 = nn.Conv2d(192, 384, 3, padding=1)
        self.conv4 = nn.Conv2d(384, 256, 3, padding=1)
        self.conv5 = nn.Conv2d(256, 256, 3, padding=1)
        self.linear = nn.Linear(256, 10)

    def reset(self, generator: torch.Generator) -> None:
        """Torch's default."""
        for layer in _layers(self):
            _uniform(layer, generator)

    def forward(self, x: Tensor) -> Tensor:  # [n, 3, 32, 32] -> [n, 10], logits
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.conv4(F.relu(self.conv3(x))))
        x = F.max_pool2d(F.relu(self.conv5(x)), 2)
        return self.linear(x.flatten(1))  # type: ignore[no-any-return]  # nn.Module calls are untyped


class _DenseLayer(nn.Module):
    """Norm, ReLU and a convolution; returns its input with the new channels appended."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.bn(x)))], dim=1)


class _Transition(nn.Module):
    """Norm, ReLU and a 1x1 convolution that keeps the width; then the size is halved."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class DenseNet40(Model):
    """Three blocks of twelve layers that add 12 channels each, no bottlenecks: 1,001,616 kernel weights."""

    def __init__(self) -> None:
        super().__init__()
        growth, num_layers, width = 12, 12, 16
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        for block in range(3):
            blocks += [_DenseLayer(width + growth * i, growth) for i in range(num_layers)]
            width += growth * num_layers
            blocks += [_Transition(width)] if block < 2 else []
        self.blocks = nn.Sequential(*blocks)
        self.bn1 = nn.BatchNorm2d(width)
        self.linear = nn.Linear(width, 10)

    def reset(self, generator: torch.Generator) -> None:
        """Xavier-uniform kernels, zero bias, as in GSM's experiments."""
        for layer in _layers(self):
            nn.init.xavier_uniform_(layer.weight, generator=generator)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:  # [n, 3, 32, 32] -> [n, 10], logits
        x = F.relu(self.bn1(self.blocks(self.conv1(x)))).mean(dim=(2, 3))
        return self.linear(x)  # type: ignore[no-any-return]  # nn.Module calls are untyped


class _WideBlock(nn.Module):
    """Norm and ReLU come first; the shortcut takes the unchanged input."""

    def __init__(self, width: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, planes, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1)
        is_same = stride == 1 and width == planes
        self.shortcut = nn.Identity() if is_same else nn.Conv2d(width, planes, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        return out + self.shortcut(x)  # type: ignore[no-any-return]  # nn.Module calls are untyped


class WideResNet(Model):
    """WRN-28-10, three stages of four wide blocks: 36,489,290 parameters.

    The form of gRDA's experiments on CIFAR-10: convolutions have biases, there is no dropout, a block strides in its
    second convolution (the paper's do in the first), and the last norm has a momentum of 0.9.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.layer1 = _stage(_WideBlock, 16, 160, 4, stride=1)
        self.layer2 = _stage(_WideBlock, 160, 320, 4, stride=2)
        self.layer3 = _stage(_WideBlock, 320, 640, 4, stride=2)
        self.bn1 = nn.BatchNorm2d(640, momentum=0.9)
        self.linear = nn.Linear(640, 10)

    def reset(self, generator: torch.Generator) -> None:
        """Torch's default."""
        for layer in _layers(self):
            _uniform(layer, generator)

    def forward(self, x: Tensor) -> Tensor:  # [n, 3, 32, 32] -> [n, 10], logits
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        x = F.relu(self.bn1(x)).mean(dim=(2, 3))
        return self.linear(x)  # type: ignore[no-any-return]  # nn.Module calls are untyped


class _Block(nn.Module):
    """Norm and ReLU come last.

    Where the shape changes, the shortcut drops pixels and adds channels of zeros (option A of the paper), or it is a
    1x1 convolution with a norm (``projects``, option B).
    """

    def __init__(self, width: int, planes: int, stride: int, *, projects: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut: nn.Sequential | None = None
        if projects and (stride, width) != (1, planes):
            conv = nn.Conv2d(width, planes, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.shortcut is not None:
            x = self.shortcut(x)
        elif out.shape != x.shape:
            more = out.shape[1] - x.shape[1]
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, more // 2, more - more // 2))
        return F.relu(out + x)


class ResNet(Model):
    """The CIFAR form of He et al. with shortcuts of option A, which have no parameters, or of option B.

    Its parameters have the names of pretrained models that are often used
    (github.com/akamaster/pytorch_resnet_cifar10), so that their state dicts load.

    Args:
        depth: number of layers with kernels, 6 n + 2, shortcuts not counted; the paper has 20, 32, 44, 56.
        width: channels of the first of three stages; each other has twice as many as the one before.
        projects: whether the shortcuts are of option B.
    """

    def __init__(self, depth: int, *, width: int = 16, projects: bool = False) -> None:
        super().__init__()
        num_blocks = (depth - 2) // 6
        block = partial(_Block, projects=projects)
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(block, width, width, num_blocks, stride=1)
        self.layer2 = _stage(block, width, 2 * width, num_blocks, stride=2)
        self.layer3 = _stage(block, 2 * width, 4 * width, num_blocks, stride=2)
        self.linear = nn.Linear(4 * width, 10)

    def reset(self, generator: torch.Generator) -> None:
        """Normal kernels of variance ``2 / fan_in``, zero bias."""
        for layer in _layers(self):
            _normal(layer, layer.weight[0].numel(), generator)

    def forward(self, x: Tensor) -> Tensor:  # [n, 3, 32, 32] -> [n, 10], logits
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x))).mean(dim=(2, 3))
        return self.linear(x)  # type: ignore[no-any-return]  # nn.Module calls are untyped


class _TransformerBlock(nn.Module):
    """Causal attention, then two dense layers with a GELU; each normalises its input and adds its output to it."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # [n, t, width] -> the same
        x = x + F.dropout(self.out(self._attend(self.norm1(x))), self.dropout, self.training)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm2(x)))), self.dropout, self.training)

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [n, heads, t, -1] each
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return heads.transpose(1, 2).flatten(2)


class Transformer(Model):
    """A decoder-only transformer: norms first, learned positions, the head tied to the embedding of characters.

    As ``gpt-tiny`` it has 442,368 kernel weights in its blocks, 6,240 in the embedding and 12,288 in the positions.
    ``blocks`` is a list, so that each block can be sharded by itself; everything else belongs to the root.

    Args:
        vocabulary: number of different characters.
        context: the maximum number of characters at once.
        dropout: share of each branch's output that is dropped in training.
    """

    def __init__(
        self,
        *,
        vocabulary: int = 65,
        context: int = 128,
        num_blocks: int = 4,
        width: int = 96,
        num_heads: int = 3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(_TransformerBlock(width, num_heads, dropout) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.token.weight

    def reset(self, generator: torch.Generator) -> None:
        """Dense layers normal with variance ``1 / fan_in``, less at the end of a branch, so that the variance does not
        grow with depth; embeddings with deviation 0.05; zero biases, norms of scale one.
        """
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=0.05, generator=generator)
        for module in self.modules():
            if isinstance(module, _TransformerBlock):
                for layer in _layers(module):
                    num_branches = 2 * len(self.blocks) if layer in (module.out, module.down) else 1
                    _normal(layer, 2 * layer.weight.shape[1] * num_branches, generator)

    def forward(self, x: Tensor) -> Tensor:  # int64 [n, t] -> [n, t, vocabulary], logits of each next character
        x = self.token(x) + self.position(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]  # nn.Module calls are untyped


MODELS: dict[str, Callable[[], Model]] = {
    "lenet-300-100": LeNet300100,
    "lenet-5": LeNet5,
    "lenet-5-caffe": partial(LeNet5, relu=False),
    "vgg16-cifar": VGG16,
    "wrn-28-10": WideResNet,
    "gpt-tiny": Transformer,
    **{f"resnet-{depth}": partial(ResNet, depth) for depth in (20, 32, 44, 56)},
    "resnet-56b": partial(ResNet, 56, projects=True),
    "densenet-40": DenseNet40,
    "vgg16-bn": VGG16BN,
    "alexnet-cifar": AlexNet,
    # "-w5" has a width of 5: dense networks with about as many weights as a pruned one.
    **{f"resnet-{depth}-w{width}": partial(ResNet, depth, width=width) for depth in (20, 56) for width in (5, 4, 3, 2)},
    **{f"vgg16-bn-w{width}": partial(VGG16BN, width) for width in (20, 14, 9, 6)},
}


def build_model(name: str, *, seed: int) -> Model:
    """Build a model of the zoo on the CPU, its weights a function of the seed alone.

    The initialisation is the model's own, see its `reset`. The global random state does not change.

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
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # constructors draw weights too, which are not used
        model = MODELS[name]()
    model.reset(torch.Generator().manual_seed(seed))
    return model
