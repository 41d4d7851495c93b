"""p3b.data: what the loaders give, that it is the same each time, and one line for what cannot be read."""

import numpy as np
import pytest
import torch
from PIL import Image

from p3b.data import ArrayLoader, create_data, shift_and_flip


def batches(loader):
    return [(x.clone(), y.clone()) for x, y in loader]


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(p, q) and torch.equal(y, z) for (p, y), (q, z) in zip(a, b, strict=True)
    )


@pytest.fixture
def npz(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(0, 256, (30, 6, 5, 3), dtype=np.uint8),
        "y_train": np.arange(30) % 3,
        "x_test": rng.integers(0, 256, (8, 6, 5, 3), dtype=np.uint8),
        "y_test": np.arange(8) % 3,
    }

    def write(**changes):
        path = tmp_path / "set.npz"
        np.savez(path, **{k: v for k, v in (arrays | changes).items() if v is not None})
        return str(path)

    return write


@pytest.fixture
def folder(tmp_path):
    """Three classes of flat colours: red, green and blue, six images of each."""

    def write(*parts, count=6, classes=("blue", "green", "red")):
        root = tmp_path / "images"
        for part in parts or ("",):
            for i, name in enumerate(classes):
                (root / part / name).mkdir(parents=True)
                for j in range(count):
                    color = [0, 0, 0]
                    color[2 - i] = 200
                    Image.new("RGB", (40 + j, 30), tuple(color)).save(root / part / name / f"{j}.png")
        return root

    return write


def test_digits_are_split_once_and_normalised():
    data = create_data("digits", img_size=16, batch_size=64, augment="none")
    assert (data.num_classes, data.in_chans, data.img_size) == (10, 1, (16, 16))
    assert len(data.train.labels) + len(data.val.labels) == 1797
    assert torch.bincount(data.val.labels).min() >= 34  # a fifth of every class
    other = create_data("digits", img_size=16, batch_size=64, augment="none", seed=1)
    assert torch.equal(data.val.images, other.val.images)
    raw = create_data("digits", img_size=8, batch_size=2000, augment="none")
    images, labels = next(iter(raw.train))
    assert images.shape == (len(raw.train.labels), 1, 8, 8) and images.dtype == torch.float32
    assert abs(float(images.mean())) < 1e-4 and abs(float(images.std()) - 1) < 1e-3
    assert labels.dtype == torch.int64 and len(raw.train) == 1


def test_digits_by_class_are_renumbered_in_the_order_given():
    whole = create_data("digits", img_size=8, batch_size=2000, augment="none")
    data = create_data("digits", img_size=8, batch_size=2000, augment="none", classes=[7, 3])
    assert data.num_classes == 2 and data.class_names == ("7", "3")
    for new, old in enumerate((7, 3)):
        assert torch.equal(data.val.images[data.val.labels == new], whole.val.images[whole.val.labels == old])


def test_batches_depend_on_seed_and_epoch_only():
    def make(seed=0):
        return create_data("digits", img_size=12, batch_size=200, seed=seed).train

    loader, again = make(), make()
    first, second = batches(loader), batches(loader)
    torch.manual_seed(99)
    assert same(first, batches(again)) and not same(first, second)
    again.set_epoch(1)
    assert same(second, batches(again))
    assert not same(first, batches(make(seed=1)))


def test_training_batches_have_one_shape_and_validation_sees_every_image():
    images, labels = torch.zeros(10, 1, 4, 4, dtype=torch.uint8), torch.arange(10)
    common = dict(img_size=(4, 4), batch_size=4, mean=[0.5], std=[0.5])
    train = ArrayLoader(images, labels, train=True, **common)
    assert [len(y) for _, y in train] == [4, 4] and len(train) == 2
    val = ArrayLoader(images, labels, train=False, **common)
    assert torch.equal(torch.cat([y for _, y in val]), labels) and len(val) == 3
    few = ArrayLoader(images[:3], labels[:3], train=True, **common)
    assert [len(y) for _, y in few] == [3] and len(few) == 1


def test_shift_and_flip_by_hand():
    x = torch.arange(12.0).view(1, 1, 3, 4).repeat(9, 1, 1, 1)
    still, mirrored = torch.zeros(9, 2, dtype=torch.int64), torch.arange(9) % 2 == 1
    flipped = shift_and_flip(x, still, mirrored)
    assert torch.equal(flipped[::2], x[::2]) and torch.equal(flipped[1::2], x[1::2].flip(3))
    moves = torch.cartesian_prod(torch.arange(-1, 2), torch.arange(-1, 2))
    padded = torch.nn.functional.pad(x[:1], (1, 1, 1, 1), mode="replicate")
    wanted = torch.stack([padded[0, :, 1 + r : 4 + r, 1 + c : 5 + c] for r, c in moves.tolist()])
    assert torch.equal(shift_and_flip(x, moves, still[:, 0] == 1), wanted)


def test_every_move_is_drawn():
    loader = create_data("digits", img_size=8, batch_size=400, shift=1, flip=True).train
    offset, mirrored = loader._draw_moves(1000, torch.Generator().manual_seed(0))
    counts = torch.unique(offset, dim=0, return_counts=True)[1]
    assert len(counts) == 9 and counts.min() > 70 and 450 < int(mirrored.sum()) < 550


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("kind", ["arrays", "files"])
def test_processes_share_the_batches_of_one(npz, folder, kind, world):
    source = npz() if kind == "arrays" else folder(count=7)
    common = dict(img_size=8, batch_size=6, seed=3)
    whole = create_data(source, **common)
    parts = [create_data(source, rank=rank, world=world, workers=rank % 2, **common) for rank in range(world)]
    for epoch in range(2):
        assert len({len(part.train) for part in parts}) == 1
        for batch, *mine in zip(whole.train, *(part.train for part in parts), strict=True):
            for rank, part in enumerate(mine):
                assert all(torch.equal(a, b[rank::world]) for a, b in zip(part, batch, strict=True)), (epoch, rank)
    one = batches(whole.val)
    for rank, part in enumerate(parts):
        mine = batches(part.val)
        assert len(mine) == len(part.val)
        wanted = [(x[rank::world], y[rank::world]) for x, y in one if len(y) > rank]
        assert same(mine, wanted)  # uneven, nothing padded
    assert sum(len(y) for part in parts for _, y in part.val) == sum(len(y) for _, y in one)
    assert same(batches(parts[-1].part(0, 1).val), one)


def test_batches_that_processes_cannot_share(npz):
    with pytest.raises(ValueError, match=r"batch_size must be a multiple of 3, .* \(as 63 or 66\), got 64"):
        create_data("digits", batch_size=64, rank=0, world=3)
    with pytest.raises(ValueError, match="rank must be 0 to 1"):
        create_data("digits", rank=2, world=2)
    with pytest.raises(ValueError, match="at most the 30 training images where 4 processes share a batch, got 40"):
        create_data(npz(), batch_size=40, rank=0, world=4)
    assert [len(y) for _, y in create_data(npz(), batch_size=40, rank=1, world=2, img_size=4).train] == [15]


def test_npz(npz):
    data = create_data(npz(), img_size=(6, 5), batch_size=8)
    assert (data.num_classes, data.in_chans) == (3, 3) and data.train.flip
    images, labels = next(iter(data.val))
    assert images.shape == (8, 3, 6, 5) and labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    pixel = torch.from_numpy(np.load(npz())["x_test"])[0, 2, 3].float() / 255
    assert torch.allclose(images[0, :, 2, 3], (pixel - torch.tensor(data.mean)) / torch.tensor(data.std), atol=1e-5)
    grey = create_data(npz(x_train=np.zeros((30, 6, 5), np.uint8), x_test=np.zeros((8, 6, 5), np.uint8)), img_size=6)
    assert grey.in_chans == 1 and not grey.train.flip
    assert all(torch.isfinite(x).all() for x, _ in grey.train)  # a constant image has no deviation to divide by


def test_the_first_training_images(npz, folder):
    whole, few = (create_data(npz(), img_size=6, augment="none", train_images=n) for n in (None, 4))
    assert torch.equal(few.train.images, whole.train.images[:4]) and len(few.train.labels) == 4
    assert few.num_classes == 3 and len(few.val.labels) == len(whole.val.labels)
    assert len(create_data(**few.settings).train.labels) == 4
    with pytest.raises(ValueError, match="train_images must be 1 to 30, the images there are, got 31"):
        create_data(npz(), train_images=31)
    with pytest.raises(ValueError, match="train_images must be left out"):
        create_data(folder(), train_images=3)


def test_settings_make_the_same_data_again(npz, folder):
    for source in (npz(), str(folder()), "digits"):
        data = create_data(source, img_size=8, batch_size=4, seed=3, augment="light", val_share=0.4)
        again = create_data(**data.settings, seed=3)
        assert same(batches(data.val), batches(again.val)) and same(batches(data.train), batches(again.train))


def test_image_folder_with_parts(folder):
    root = folder("train", "val")
    data = create_data(root, img_size=16, batch_size=5, augment="none")
    assert data.class_names == ("blue", "green", "red") and len(data.train) == 3 and len(data.val) == 4
    images, labels = next(iter(data.val))
    assert images.shape == (5, 3, 16, 16)
    colors = images * torch.tensor(data.std).view(3, 1, 1) + torch.tensor(data.mean).view(3, 1, 1)
    assert labels.tolist() == [0] * 5
    assert torch.allclose(colors[0, :, 8, 8], torch.tensor([0.0, 0.0, 200 / 255]), atol=1e-2)


def test_image_folder_without_parts_is_split_by_class(folder):
    data = create_data(folder(), img_size=8, batch_size=18, val_share=1 / 3, augment="none")
    train, val = next(iter(data.train))[1], next(iter(data.val))[1]
    assert torch.bincount(train).tolist() == [4, 4, 4] and torch.bincount(val).tolist() == [2, 2, 2]


@pytest.mark.parametrize("augment", ["light", "strong"])
def test_augmented_files_do_not_depend_on_workers(folder, augment):
    root = folder(count=4)
    loaders = [create_data(root, img_size=8, batch_size=3, workers=w, augment=augment).train for w in (0, 2)]
    assert same(batches(loaders[0]), batches(loaders[1]))
    assert not same(batches(loaders[0]), batches(create_data(root, img_size=8, batch_size=3, augment=augment).train))


def test_nested_classes_keep_their_path(folder):
    root = folder("train/birds", "train/insects")
    assert create_data(root, img_size=8).class_names[:4] == ("birds/blue", "birds/green", "birds/red", "insects/blue")


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_is_one_line(folder, workers):
    root = folder()
    broken = root / "red" / "3.png"
    broken.write_bytes(broken.read_bytes()[:40])
    data = create_data(root, img_size=8, batch_size=2, workers=workers)
    with pytest.raises(ValueError, match=r"data: .*3\.png must be a readable image") as error:
        batches(data.train), batches(data.val)
    assert "\n" not in str(error.value)


def test_folders_that_are_no_data_sets(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"one folder per class .* got no images"):
        create_data(tmp_path / "empty")
    Image.new("RGB", (4, 4)).save(tmp_path / "empty" / "a.png")
    with pytest.raises(ValueError, match="got 1 images outside any class folder"):
        create_data(tmp_path / "empty")
    root = folder("train", "val")
    (root / "val" / "red").rename(root / "val" / "rot")
    with pytest.raises(ValueError, match=r"must have the classes of .* got also rot"):
        create_data(root)


def test_one_class_is_no_data_set(folder):
    with pytest.raises(ValueError, match="two or more classes, got only 'blue'"):
        create_data(folder(classes=("blue",)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, "got arrays x_train, y_train, x_test, not y_test"),
        ({"x_train": np.zeros((30, 6, 5, 3), np.float32)}, "x_train .* must be uint8 .* got float32"),
        ({"y_train": np.zeros(29, np.int64)}, r"y_train .* must be 30 integers, got int64 \[29\]"),
        ({"y_train": np.full(30, -1)}, "y_train .* must be labels 0, 1, ..., got -1"),
        ({"x_test": np.zeros((8, 6, 5), np.uint8)}, "must have the same channels"),
        ({"x_test": np.zeros((8, 0, 5, 3), np.uint8)}, r"x_test .* must hold pixels, got \[8, 0, 5, 3\]"),
    ],
)
def test_npz_that_does_not_fit(npz, changes, message):
    with pytest.raises(ValueError, match=message):
        create_data(npz(**changes))


def test_classes_without_validation_images(npz):
    with pytest.raises(ValueError, match=r"got \[0, 1\] with 20 training and 0 validation images"):
        create_data(npz(y_test=np.full(8, 2)), classes=[0, 1])


def test_npz_cut_short(npz):
    path = npz()
    whole = open(path, "rb").read()
    open(path, "wb").write(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"must be a readable .npz file"):
        create_data(path)


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("digitz", "digits"),
        ("cifar100", "torch/cifar100"),
        ("torch/cifar1000", "torch/cifar100"),
        ("no/such/place", ""),
    ],
)
def test_unknown_names_come_with_near_ones(source, hint):
    with pytest.raises(ValueError, match="data: source must be an existing folder") as error:
        create_data(source)
    assert repr(source) in str(error.value) and (f"did you mean {hint}" in str(error.value)) == bool(hint)


def test_a_set_that_was_not_downloaded(tmp_path):
    with pytest.raises(ValueError, match=r"readable by timm's create_dataset in .* got: ") as error:
        create_data("torch/cifar10", root=str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"augment": "mild"}, "augment must be one of none, light, strong, got 'mild'"),
        ({"augment": "strong"}, "augment must be 'none' or 'light'"),
        ({"val_share": 1.0}, "val_share must be between 0 and 1"),
        ({"img_size": (3, 4, 5)}, "img_size must be one or two edges"),
        ({"classes": [1, 1]}, "classes must be two or more different labels below 10"),
        ({"classes": [1, 10]}, "classes must be two or more different labels below 10"),
        ({"mean": [0.1, 0.2, 0.3]}, "mean must be 1 numbers, one per channel"),
        ({"std": [0.0]}, "std must be 1 positive numbers"),
    ],
)
def test_settings_are_checked(setting, message):
    with pytest.raises(ValueError, match=message):
        create_data("digits", **setting)
