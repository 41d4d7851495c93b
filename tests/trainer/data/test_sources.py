"""p3b.data: what the loaders give, that it is the same each time, and one line for what cannot be read."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from toy import listed, read_data, same_batches

from p3b.data import DataConfig, create_data


def test_digits_are_split_once_and_normalised():
    data = read_data("digits", img_size=16, batch_size=64, augment="none")
    assert (data.num_classes, data.in_chans, data.img_size) == (10, 1, (16, 16))
    assert len(data.train.labels) + len(data.val.labels) == 1797
    assert torch.bincount(data.val.labels).min() >= 34  # a fifth of every class
    other = read_data("digits", img_size=16, batch_size=64, augment="none", seed=1)
    assert torch.equal(data.val.images, other.val.images)
    raw = read_data("digits", img_size=8, batch_size=2000, augment="none")
    images, labels = next(iter(raw.train))
    assert images.shape == (len(raw.train.labels), 1, 8, 8) and images.dtype == torch.float32
    assert abs(float(images.mean())) < 1e-4 and abs(float(images.std()) - 1) < 1e-3
    assert labels.dtype == torch.int64 and len(raw.train) == 1


def test_digits_by_class_are_renumbered_in_the_order_given():
    whole = read_data("digits", img_size=8, batch_size=2000, augment="none")
    data = read_data("digits", img_size=8, batch_size=2000, augment="none", classes=[7, 3])
    assert data.num_classes == 2 and data.class_names == ("7", "3")
    for new, old in enumerate((7, 3)):
        assert torch.equal(data.val.images[data.val.labels == new], whole.val.images[whole.val.labels == old])


def test_npz(npz):
    data = read_data(npz(), img_size=(6, 5), batch_size=8)
    assert (data.num_classes, data.in_chans) == (3, 3) and data.train.flip
    images, labels = next(iter(data.val))
    assert data.train.shift == 2 and read_data(npz(), img_size=(84, 90)).train.shift == 6
    assert images.shape == (8, 3, 6, 5) and labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    pixel = torch.from_numpy(np.load(npz())["x_test"])[0, 2, 3].float() / 255
    assert torch.allclose(images[0, :, 2, 3], (pixel - torch.tensor(data.mean)) / torch.tensor(data.std), atol=1e-5)
    grey = read_data(npz(x_train=np.zeros((30, 6, 5), np.uint8), x_test=np.zeros((8, 6, 5), np.uint8)), img_size=6)
    assert grey.in_chans == 1 and not grey.train.flip
    assert all(torch.isfinite(x).all() for x, _ in grey.train)  # a constant image has no deviation to divide by


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [([0, 1] * 3, [0, 2] * 3, "but no training images, of labels .2."), ([0] * 6, [0] * 6, "one class only, '0'")],
)
def test_labels_that_nothing_can_be_learned_from(tmp_path, train, test, message):
    images = np.zeros((6, 8, 8), np.uint8)
    np.savez(tmp_path / "a.npz", x_train=images, y_train=train, x_test=images, y_test=test)
    with pytest.raises(ValueError, match=message):
        read_data(tmp_path / "a.npz", img_size=8, batch_size=2)


def test_labels_beyond_all_images_are_refused_before_they_cost_memory(tmp_path):
    images = np.zeros((6, 8, 8), np.uint8)
    for last in (12, 10**12):
        np.savez(tmp_path / "a.npz", x_train=images, y_train=[0, 1, 2, 0, 1, last], x_test=images, y_test=[0] * 6)
        with pytest.raises(ValueError, match=f"labels of .*a.npz must be 0, 1, .* number of images, 12, got {last}"):
            read_data(tmp_path / "a.npz", img_size=8, batch_size=2)


def test_the_first_training_images(npz, folder):
    whole, few = (read_data(npz(), img_size=6, augment="none", train_images=n) for n in (None, 4))
    assert torch.equal(few.train.images, whole.train.images[:4]) and len(few.train.labels) == 4
    assert few.num_classes == 3 and len(few.val.labels) == len(whole.val.labels)
    assert len(read_data(**few.config.recorded()).train.labels) == 4
    with pytest.raises(ValueError, match="train_images must be 1 to 30, the number of images, got 31"):
        read_data(npz(), train_images=31)
    with pytest.raises(ValueError, match="train_images must be left out"):
        read_data(folder(), train_images=3)


def test_settings_make_the_same_data_again(npz, folder):
    for source in (npz(), str(folder()), "digits"):
        data = read_data(source, img_size=8, batch_size=4, seed=3, augment="light", val_share=0.4)
        again = read_data(**data.config.recorded(), seed=3)
        assert same_batches(listed(data.val), listed(again.val)) and same_batches(
            listed(data.train), listed(again.train)
        )


def test_image_folder_with_parts(folder):
    root = folder("train", "val")
    data = read_data(root, img_size=16, batch_size=5, augment="none")
    assert data.class_names == ("blue", "green", "red") and len(data.train) == 3 and len(data.val) == 4
    images, labels = next(iter(data.val))
    assert images.shape == (5, 3, 16, 16)
    colors = images * torch.tensor(data.std).view(3, 1, 1) + torch.tensor(data.mean).view(3, 1, 1)
    assert labels.tolist() == [0] * 5
    assert torch.allclose(colors[0, :, 8, 8], torch.tensor([0.0, 0.0, 200 / 255]), atol=1e-2)


def test_image_folder_without_parts_is_split_by_class(folder):
    data = read_data(folder(), img_size=8, batch_size=18, val_share=1 / 3, augment="none")
    train, val = next(iter(data.train))[1], next(iter(data.val))[1]
    assert torch.bincount(train).tolist() == [4, 4, 4] and torch.bincount(val).tolist() == [2, 2, 2]


def test_nested_classes_keep_their_path(folder):
    root = folder("train/birds", "train/insects")
    assert read_data(root, img_size=8).class_names[:4] == (
        "birds/blue",
        "birds/green",
        "birds/red",
        "insects/blue",
    )


def test_labels_out_of_range(npz):
    data = read_data(npz(), img_size=8, batch_size=6, on_device=False)
    data.train.dataset.read.labels = np.full(30, 7)
    with pytest.raises(ValueError, match=r"data: the label of image \d+ of set.npz is 7, outside 0 to 2"):
        next(iter(data.train))
    with pytest.raises(ValueError, match=r"labels of set.npz must be below num_classes = 2, got 2"):
        read_data(npz(), num_classes=2)
    assert read_data(npz(), num_classes=5).class_names == ("0", "1", "2", "3", "4")


def test_empty_class_folder(folder):
    root = folder("train", "val")
    (root / "train" / "__MACOSX").mkdir()
    read_data(root)
    (root / "train" / "yellow").mkdir()
    with pytest.raises(ValueError, match=r"data: the class folder .*train/yellow has no images"):
        read_data(root)


@pytest.fixture
def lists(tmp_path):
    """Images of flat blue, green and red by turns, under any names."""

    def write(place, names):
        root = tmp_path / "listed"
        for i, name in enumerate(names):
            path = root / place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 20), [(0, 0, 200), (0, 200, 0), (200, 0, 0)][i % 3]).save(path)
        return root

    return write


def coco(names, labels, categories):
    return json.dumps({
        "images": [{"id": 10 + i, "file_name": name} for i, name in enumerate(names)],
        "annotations": [{"id": i, "image_id": 10 + i, "category_id": label} for i, label in enumerate(labels)],
        "categories": [{"id": number, "name": name} for number, name in categories],
    })  # fmt: skip


def test_inaturalist_as_it_unpacks(lists):
    names = [f"train_val2018/Plantae/{7000 + i % 3}/{i}.png" for i in range(9)]
    root = lists("", names)
    categories = [(5, "oak"), (2, "ash"), (9, "elm"), (11, "fir")]  # numbers with gaps, one class without images
    labels = [(2, 5, 9)[i % 3] for i in range(9)]
    (root / "train2018.json").write_text(coco(names[:6], labels[:6], categories))
    (root / "val2018.json").write_text(coco(names[6:], labels[6:], categories))
    data = read_data(root, img_size=8, batch_size=3, augment="none")
    assert data.class_names == ("ash", "oak", "elm", "fir") and (len(data.train), len(data.val)) == (2, 1)
    images, labels = next(iter(data.val))
    assert labels.tolist() == [0, 1, 2] and images.argmax(1)[:, 4, 4].tolist() == [2, 1, 0]
    (root / "train2019.json").write_text("{}")
    with pytest.raises(ValueError, match=r"several data sets \(train2018.json, train2019.json\)"):
        read_data(root)
    (root / "train2018.json").unlink()
    with pytest.raises(ValueError, match=r"train2019.json cannot be read as COCO .*: KeyError: 'images'"):
        read_data(root)
    (root / "train2019.json").write_text(coco(["nowhere.png"], [2], categories))
    with pytest.raises(ValueError, match=r"lists .*nowhere.png, which does not exist"):
        read_data(root)


def test_ifood_as_it_unpacks(lists):
    root = lists("train_set", [f"train_{i}.png" for i in range(6)])
    lists("val_set", [f"val_{i}.png" for i in range(3)])
    (root / "class_list.txt").write_text("0 apple pie\n1 baklava\n2 churro\n3 donut\n")
    (root / "train_labels.csv").write_text("img_name,label\n" + "".join(f"train_{i}.png,{i % 3}\n" for i in range(6)))
    (root / "val_labels.csv").write_text("img_name,label\n" + "".join(f"val_{i}.png,{i % 3}\n" for i in range(3)))
    data = read_data(root, img_size=8, batch_size=3, augment="none")
    assert data.class_names == ("apple pie", "baklava", "churro", "donut")
    assert (len(data.train), len(data.val)) == (2, 1)
    images, labels = next(iter(data.val))
    assert labels.tolist() == [0, 1, 2] and images.argmax(1)[:, 4, 4].tolist() == [2, 1, 0]
    (root / "val_labels.csv").unlink()  # one part: a share of each class is set aside
    assert len(read_data(root, img_size=8, batch_size=3, val_share=0.5).val.dataset) == 3
    (root / "train_labels.csv").write_text("train_0.png\n")
    with pytest.raises(ValueError, match=r"train_labels.csv (has no|cannot be read as) rows of image name and label"):
        read_data(root)


def test_hugging_face_set_on_disk(tmp_path, folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("datasets")
    root = folder("train", "test")
    data = read_data(f"hfds/{root}", root=str(tmp_path / "cache"), img_size=8, batch_size=6, augment="none")
    assert data.class_names == ("blue", "green", "red") and data.train.count == 18
    images, labels = next(iter(data.val))
    assert images[:, :, 4, 4].argmax(1).tolist() == [2 - int(y) for y in labels]
    broken = root / "test" / "blue" / "0.png"
    broken.write_bytes(broken.read_bytes()[:40])
    bad = read_data(f"hfds/{root}", root=str(tmp_path / "again"), img_size=8, batch_size=6)
    with pytest.raises(ValueError, match=r"image 0 of hfds/.* cannot be read as an image"):
        listed(bad.val)


def test_webdataset_shards(tmp_path):
    wds = pytest.importorskip("webdataset")
    counts = {"train": 12, "validation": 5}
    info = {"splits": {}}
    for part, count in counts.items():
        with wds.TarWriter(str(tmp_path / f"{part}-0.tar")) as shard:
            for i in range(count):
                colour = [0, 0, 0]
                colour[i % 3] = 200
                shard.write({"__key__": f"{i:04}", "png": Image.new("RGB", (20, 20), tuple(colour)), "cls": i % 3})
        files = {"filenames": [f"{part}-0.tar"], "shard_lengths": [count]}
        info["splits"][part] = {"name": part, "num_samples": count, **files}
    (tmp_path / "info.json").write_text(json.dumps(info))
    common = dict(root=str(tmp_path), img_size=8, batch_size=4, augment="none")
    data = read_data("wds/colours", num_classes=3, **common)
    assert len(listed(data.train)) == len(data.train) == 3
    assert [len(y) for _, y in data.val] == [4, 1] and len(data.val) == 2
    images, labels = next(iter(data.val))
    assert torch.equal(images[:, :, 4, 4].argmax(1), labels)
    shared = [listed(data.val.part(rank, 2)) for rank in range(2)]
    assert [[y.tolist() for _, y in part] for part in shared] == [[[0, 2], [1]], [[1, 0]]]
    with pytest.raises(ValueError, match=r"world must be torch.distributed's 1 for a stream, got 2"):
        read_data("wds/colours", num_classes=3, rank=0, world=2, **common)
    with pytest.raises(ValueError, match=r"labels of a batch are .*, for num_classes = 2"):
        listed(read_data("wds/colours", num_classes=2, **common).val)
    with pytest.raises(ValueError, match="'wds/colours' does not define its number of classes"):
        read_data("wds/colours", **common)


def test_folders_that_are_no_data_sets(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no images; it needs one folder per class"):
        read_data(tmp_path / "empty")
    Image.new("RGB", (4, 4)).save(tmp_path / "empty" / "a.png")
    with pytest.raises(ValueError, match="has 1 images outside class folders only"):
        read_data(tmp_path / "empty")
    root = folder("train", "val")
    (root / "val" / "red").rename(root / "val" / "rot")
    with pytest.raises(ValueError, match=r"has classes that .* does not have: rot"):
        read_data(root)


def test_one_class_is_no_data_set(folder):
    with pytest.raises(ValueError, match="images of one class only, 'blue'"):
        read_data(folder(classes=("blue",)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, "it has x_train, y_train, x_test, but no y_test"),
        ({"x_train": np.zeros((30, 6, 5, 3), np.float32)}, "x_train .* must be uint8 .* got float32"),
        ({"y_train": np.zeros(29, np.int64)}, r"y_train .* must be 30 integers, got int64 \[29\]"),
        ({"y_train": np.full(30, -1)}, "y_train .* must be labels 0, 1, ..., got -1"),
        ({"x_test": np.zeros((8, 6, 5), np.uint8)}, "must have the same channels"),
        ({"x_test": np.zeros((8, 0, 5, 3), np.uint8)}, r"x_test .* has no pixels: its shape is \[8, 0, 5, 3\]"),
    ],
)
def test_npz_that_does_not_fit(npz, changes, message):
    with pytest.raises(ValueError, match=message):
        read_data(npz(**changes))


def test_classes_without_validation_images(npz):
    with pytest.raises(ValueError, match=r"got \[0, 1\] with 20 training and 0 validation images"):
        read_data(npz(y_test=np.full(8, 2)), classes=[0, 1])


def test_npz_cut_short(npz):
    path = npz()
    whole = open(path, "rb").read()
    open(path, "wb").write(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cannot be read as a data set"):
        read_data(path)


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
        read_data(source)
    assert repr(source) in str(error.value) and (f"did you mean {hint}" in str(error.value)) == bool(hint)


def test_a_set_that_was_not_downloaded(tmp_path):
    with pytest.raises(ValueError, match=r"timm's create_dataset cannot read .* in .*: ") as error:
        read_data("torch/cifar10", root=str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"augment": "mild"}, "augment must be one of none, light, strong, got 'mild'"),
        ({"repeats": 0}, "repeats must be 1 or more, got 0"),
        ({"re_prob": 1.5}, r"re_prob must be in \[0, 1\], got 1.5"),
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
        read_data("digits", **setting)


def test_a_class_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    for name in ("heron", "owl", "rook"):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{i}.png")
    scandir = os.scandir

    def denied(path="."):  # permissions do not hold for root, who may run this
        if str(path).endswith("owl"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(ValueError, match=r"owl cannot be read: Permission denied"):
        read_data(tmp_path, img_size=8)


def test_a_source_and_its_settings_are_a_config(npz):
    path = npz()
    by_name, by_config = create_data(path, img_size=8, seed=3), create_data(DataConfig(str(path), img_size=8, seed=3))
    assert by_name.config == by_config.config and by_name.description == by_config.description
    with pytest.raises(TypeError, match="settings must be fields of the DataConfig, got also seed"):
        create_data(by_config.config, seed=4)
