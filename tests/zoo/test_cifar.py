"""CIFAR-10: every form it comes in, what is wrong with a file, augmentation, and runs that are stopped on the way."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pomona.train.recipe import load_recipe
from pomona.train.run import num_steps_per_epoch
from pomona.train.stages import read_base
from pomona.zoo.data import DATA
from pomona.zoo.data.cifar import CLASSES, load_cifar10
from pomona.zoo.models import MODELS, ResNet, build_model
from tests.runs import LEFT, Done, Stopping, assert_same_end, command_line, result_of, rows_of

BATCHES = [f"data_batch_{number}" for number in range(1, 6)]
MEAN, STD = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))
SHARED = Path(__file__).parents[3] / "shared" / "data"

Split = tuple[np.ndarray, np.ndarray]  # uint8 [n, 32, 32, 3] and labels


def made(count: int, seed: int) -> Split:
    """Pictures of one colour a class under noise; the labels in ascending order, as a folder of images has them."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) * 10 // count
    colours = np.random.default_rng(0).integers(30, 200, (10, 1, 1, 3))
    return (colours[labels] + random.integers(-30, 50, (count, 32, 32, 3))).astype(np.uint8), labels


TRAIN, TEST = made(50, 1), made(20, 2)


def parts(split: Split, names: list[str]) -> list[tuple[str, np.ndarray, np.ndarray]]:
    images, labels = split
    size = len(labels) // len(names)
    return [(name, images[i * size :][:size], labels[i * size :][:size]) for i, name in enumerate(names)]


def flat(images: np.ndarray) -> np.ndarray:
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def write_binary(folder: Path) -> None:
    for name, images, labels in (*parts(TRAIN, BATCHES), *parts(TEST, ["test_batch"])):
        content = np.concatenate([labels[:, None].astype(np.uint8), flat(images)], axis=1)
        (folder / f"{name}.bin").write_bytes(content.tobytes())


def write_python(folder: Path) -> None:
    for name, images, labels in (*parts(TRAIN, BATCHES), *parts(TEST, ["test_batch"])):
        batch = {b"data": flat(images), b"labels": labels.tolist(), b"batch_label": name.encode()}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))


def write_images(folder: Path) -> None:
    for part, (images, labels) in (("train", TRAIN), ("test", TEST)):
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            place = folder / part / (CLASSES[label] if part == "train" else str(label))
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{number:04d}.png")


def write_strips(folder: Path) -> None:
    for part, (images, labels) in (("train", TRAIN), ("test", TEST)):
        np.save(folder / f"{part}_labels.npy", labels.astype(np.uint8))
        for number in range(2):
            half = images[number * len(images) // 2 :][: len(images) // 2]
            Image.fromarray(half.reshape(-1, 32, 3)).save(folder / f"{part}_{number:03d}.webp", lossless=True)


FORMS: dict[str, tuple[Callable[[Path], None], str]] = {
    "binary": (write_binary, "cifar-10-batches-bin"),
    "python": (write_python, "cifar-10-batches-py"),
    "images": (write_images, ""),
    "strips": (write_strips, "cifar10"),
}


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POMONA_DATA", raising=False)


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cifar")
    write_binary(folder)
    return folder


# Files


@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_the_same_images_and_labels(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write, place = FORMS[form]
    (tmp_path / place).mkdir(exist_ok=True)
    write(tmp_path / place)
    data = load_cifar10(tmp_path)
    for inputs, labels, (images, numbers) in (
        (data.train_inputs, data.train_labels, TRAIN),
        (data.test_inputs, data.test_labels, TEST),
    ):
        expected = torch.from_numpy(((images / 255 - MEAN) / STD).transpose(0, 3, 1, 2)).float()
        torch.testing.assert_close(inputs, expected, rtol=0, atol=1e-6)  # three roundings of values below 3
        assert labels.tolist() == numbers.tolist()
        assert (inputs.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert data.name == "cifar10"
    assert data.description.startswith("CIFAR-10 files with 50 training and 20 test images (")
    monkeypatch.setenv("POMONA_DATA", str(tmp_path))
    assert load_cifar10().checksum == data.checksum


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("made-by-a-pickle",)


def test_nothing_that_a_pickle_asks_for_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_python(tmp_path)
    (tmp_path / "data_batch_3").write_bytes(pickle.dumps({b"data": Evil()}))
    with pytest.raises(ValueError, match=r"data_batch_3: expected a batch .* it asks for \w+\.mkdir"):
        load_cifar10(tmp_path)
    assert not (tmp_path / "made-by-a-pickle").exists()


def damage_binary(folder: Path) -> None:
    path = folder / "data_batch_2.bin"
    path.write_bytes(path.read_bytes()[:-1])


def damage_labels(folder: Path) -> None:
    path = folder / "test_batch.bin"
    path.write_bytes(b"\x0a" + path.read_bytes()[1:])


def shorten_strip(folder: Path) -> None:
    Image.new("RGB", (32, 31)).save(folder / "test_001.webp", lossless=True)


def lose_strip(folder: Path) -> None:
    (folder / "train_001.webp").unlink()


def lose_batch(folder: Path) -> None:
    (folder / "data_batch_4").unlink()


def rename_class(folder: Path) -> None:
    (folder / "train" / "cat").rename(folder / "train" / "lynx")


def replace_image(folder: Path) -> None:
    (folder / "train" / "cat" / "0015.png").write_text("<html>")


def other_batch(folder: Path) -> None:
    (folder / "data_batch_1").write_bytes(pickle.dumps({b"data": [1], b"fine_labels": [2]}))


@pytest.mark.parametrize(
    ("form", "damage", "message"),
    [
        ("binary", damage_binary, r"data_batch_2\.bin: expected a multiple of 3,073 bytes.*found 30,729"),
        ("binary", damage_labels, r"test_batch\.bin: expected labels in 0\.\.9, found 0\.\.10"),
        ("python", lose_batch, r"is not whole: missing data_batch_4; download it again"),
        ("python", other_batch, r"data_batch_1: expected a batch of CIFAR-10's python version, data of uint8"),
        ("strips", shorten_strip, r"test_001\.webp: expected an image of 32 x 32 pixels, or some.*found 31 x 32"),
        ("strips", lose_strip, r"expected 50 images, one for each label in train_labels\.npy, found 25 in 1 strips"),
        ("images", rename_class, r"lynx: expected a class, one of airplane, .*found lynx; rename the folder"),
        ("images", replace_image, r"0015\.png: expected an image, found something else"),
    ],
)
def test_what_is_wrong_is_told(tmp_path: Path, form: str, damage: Callable[[Path], None], message: str) -> None:
    FORMS[form][0](tmp_path)
    damage(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_cifar10(tmp_path)


def test_no_data_no_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no CIFAR-10: name the folder .*--data-dir.*POMONA_DATA"):
        load_cifar10()
    with pytest.raises(FileNotFoundError, match=r"no CIFAR-10 in data_dir=.*it must hold data_batch_1\.bin to"):
        load_cifar10(tmp_path)
    with pytest.raises(FileNotFoundError, match="which is not a folder"):
        load_cifar10(tmp_path / "nowhere")


# Augmentation


def test_an_augmented_image_is_shifted_with_black_at_the_border_and_mirrored(cifar: Path) -> None:
    data = load_cifar10(cifar)
    order = torch.tensor([[7, 4, 4, 0], [7, 4, 4, 1], [7, 8, 1, 0], [7, 0, 5, 1]])
    plain, mirrored, moved, both = data.batch(order)[0]
    image = data.train_inputs[7]
    assert torch.equal(plain, image)
    assert torch.equal(mirrored, image.flip(2))
    black = torch.from_numpy((0 - MEAN) / STD).float().view(3, 1, 1)
    canvas = black.repeat(1, 32, 32)
    canvas[:, 4:, :29] = image[:, :28, 3:]  # down by four, to the left by three
    torch.testing.assert_close(moved, canvas, rtol=0, atol=1e-6)
    canvas = black.repeat(1, 32, 32)
    canvas[:, :28, 1:] = image[:, 4:, :31]  # up by four, to the right by one
    torch.testing.assert_close(both, canvas.flip(2), rtol=0, atol=1e-6)
    assert data.batch(order)[1].tolist() == [int(data.train_labels[7])] * 4


def test_an_epoch_visits_each_image_once_and_its_order_follows_from_the_seed(cifar: Path) -> None:
    data = load_cifar10(cifar)
    first, again, other = (data.order(torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert sorted(first[:, 0].tolist()) == list(range(50))
    assert set(first[:, 1:3].flatten().tolist()) == set(range(9))
    assert set(first[:, 3].tolist()) == {0, 1}


def test_batches_lie_as_convolutions_want_them(cifar: Path) -> None:
    data = load_cifar10(cifar)
    inputs, _ = data.batch(data.order(torch.Generator().manual_seed(0))[:8])
    assert inputs.is_contiguous(memory_format=torch.channels_last)


def test_held_out_images_are_the_last_and_are_not_augmented(cifar: Path) -> None:
    data = load_cifar10(cifar)
    held = data.hold_out(10)
    assert torch.equal(held.test_inputs, data.train_inputs[40:])
    assert len(held.order(torch.Generator().manual_seed(0))) == 40


# Runs

TINY = "batch_size=5 eval_every=1 prune.epochs=2 prune.lr_drops=[1] prune.lr=0.01".split()


def train(cifar: Path, out: Path, recipe: str, *overrides: str, more: tuple[str, ...] = ()) -> Done:
    words = [word for override in (*TINY, *overrides) for word in ("--set", override)]
    paths = ["--data-dir", str(cifar), "--out", str(out), "--threads", "1", "--no-pictures"]
    return command_line(["train", recipe, *paths, *words, *more])


class Dropping(ResNet):
    """With dropout, as vgg16-cifar has it, and small."""

    def __init__(self) -> None:
        super().__init__(8, width=2)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), training=self.training)


@pytest.fixture
def dropping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "dropping", Dropping)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropping: None, precision: str
) -> None:
    def go(name: str) -> int:
        return train(
            cifar, tmp_path / name, "stage-magnitude-global", "model=dropping", f"precision={precision}"
        ).status

    assert go("whole") == 0
    LEFT[0] = 14  # in the middle of the second epoch
    with monkeypatch.context() as patch:
        patch.setitem(DATA, "cifar10", lambda data_dir: Stopping(**vars(load_cifar10(data_dir))))
        assert go("run") == 130
    torch.rand(3)  # the global state of another process
    assert go("run") == 0
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def saved(model: str, path: Path, **more: Any) -> Path:
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in build_model(model, seed=9).state_dict().items()}, **more}, path
    )
    return path


def test_a_run_starts_from_the_weights_of_a_file(cifar: Path, tmp_path: Path) -> None:
    start = saved("resnet-20-w3", tmp_path / "pretrained.th", best_prec1=91.0)
    small = "model=resnet-20-w3", "prune.lr=1e-30", "method.compression=1"
    done = train(cifar, tmp_path / "run", "stage-dense", *small, more=("--start", str(start)))
    assert done.status == 0, done.err
    ended, began = torch.load(tmp_path / "run" / "model.pt"), build_model("resnet-20-w3", seed=9).state_dict()
    assert all(torch.equal(ended[name], began[name]) for name in ended if name.endswith("weight"))
    result = result_of(tmp_path / "run")
    assert result["base"]["name"] == "pretrained.th"
    recipe = load_recipe("stage-dense", ["model=resnet-20-w3"])
    assert result["accuracy"]["base"] == read_base(start, recipe, load_cifar10(cifar)).accuracy
    other = train(cifar, tmp_path / "run", "stage-dense", *small)
    assert other.status == 2 and "belongs to another run: base.name is 'pretrained.th' there" in other.err


def test_weights_that_do_not_fit_are_refused(cifar: Path, tmp_path: Path) -> None:
    (tmp_path / "page.th").write_text("<html>")
    torch.save([1, 2], tmp_path / "list.th")
    saved("resnet-20-w2", tmp_path / "narrow.th")
    for name, message in (
        ("page.th", "holds no weights that can be read safely"),
        ("list.th", "must hold a state dict (names and tensors), by itself or under 'state_dict'"),
        ("narrow.th", "does not fit the model resnet-20: "),
        ("none.th", "holds no weights that can be read safely: FileNotFoundError"),
    ):
        done = train(cifar, tmp_path / "run", "stage-dense", more=("--start", str(tmp_path / name)))
        assert done.status == 2 and message in done.err, done
    done = train(cifar, tmp_path / "run", "stage-dense", more=("--start", "a", "--base", "b"))
    assert "give one of them" in done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_refused(cifar: Path, tmp_path: Path) -> None:
    done = train(cifar, tmp_path / "run", "stage-dense", more=("--device", "cuda"))
    assert done.status == 2
    assert "device must be cpu, or another that torch can use here, got 'cuda': " in done.err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_run_on_a_gpu_goes_on_bit_for_bit(cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how = {"more": ("--device", "cuda")}
    assert train(cifar, tmp_path / "whole", "stage-gsm", **how).status == 0
    LEFT[0] = 14
    with monkeypatch.context() as patch:
        patch.setitem(DATA, "cifar10", lambda data_dir: Stopping(**vars(load_cifar10(data_dir))))
        assert train(cifar, tmp_path / "run", "stage-gsm", **how).status == 130
    assert train(cifar, tmp_path / "run", "stage-gsm", **how).status == 0
    assert_same_end(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_training_passes_may_be_compiled(cifar: Path, tmp_path: Path) -> None:
    small = ("model=resnet-20-w2", "precision=float32")
    assert train(cifar, tmp_path / "eager", "stage-gsm", *small).status == 0
    assert train(cifar, tmp_path / "compiled", "stage-gsm", *small, more=("--compile",)).status == 0
    eager, compiled = (rows_of(tmp_path / name)[0]["loss"] for name in ("eager", "compiled"))
    assert compiled == pytest.approx(eager, rel=1e-3)  # sums are in another order, over ten steps


# The published numbers


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "accuracy"), [(20, 91.73), (32, 92.63), (44, 93.10), (56, 93.39)])
def test_pretrained_networks_have_the_accuracy_that_their_authors_publish(depth: int, accuracy: float) -> None:
    files = sorted((SHARED / "models_cifar10").glob(f"resnet{depth}-*.th"))
    if not files:
        pytest.skip("needs ../shared/data/models_cifar10 and ../shared/data/cifar10")
    recipe = load_recipe("stage-dense", [f"model=resnet-{depth}"])
    assert read_base(files[0], recipe, load_cifar10(SHARED)).accuracy == pytest.approx(accuracy, abs=1e-9)


def test_published_recipes_of_gsm_are_as_long_as_in_the_authors_code() -> None:
    recipe = load_recipe("resnet56-gsm-10x")
    assert recipe.epochs == 1100 and 50_000 // recipe.batch_size == 781
    rates = recipe.prune.learning_rates(781)
    exponent = sum(rates) * recipe.prune.weight_decay / (1 - recipe.prune.momentum)
    assert exponent == pytest.approx(7.98, abs=0.005)


def test_the_rate_of_grdas_recipes_falls_as_in_the_authors_code() -> None:
    stage = load_recipe("wrn28-grda-mu065").prune

    def theirs(epoch: int) -> float:
        t = epoch / 200
        return 0.1 * (1.0 if t <= 0.5 else 1.0 - 0.99 * (t - 0.5) / 0.4 if t <= 0.9 else 0.01)

    assert [stage.learning_rate(3 * epoch, 3) for epoch in range(200)] == pytest.approx(list(map(theirs, range(200))))
    assert stage.learning_rate(3 * 150 + 2, 3) == stage.learning_rate(3 * 150, 3)


def test_full_batches_only(cifar: Path) -> None:
    assert num_steps_per_epoch(load_recipe("stage-dense", ["batch_size=15"]), load_cifar10(cifar)) == 3
