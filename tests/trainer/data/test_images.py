"""Image files: every mode and format that Pillow reads becomes 8-bit RGB, the same in all places that open images."""

import io
import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, TiffImagePlugin
from toy import listed, read_data
from vits import vit

from p3b.data.images import image_extensions, open_rgb, to_rgb
from p3b.data.sources import FolderReader, _DatasetReader
from p3b.report import token_maps

RAMP = np.arange(256).reshape(16, 16)
EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB")


def grey_levels(path):
    image = open_rgb(path)
    pixels = np.asarray(image)
    assert image.mode == "RGB" and pixels.dtype == np.uint8 and (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


@pytest.mark.parametrize("name", ["a.png", "little.tif", "big.tif", "a.pgm"])
def test_16_bit_greys_are_scaled(tmp_path, name):
    path = tmp_path / name
    if name == "a.pgm":
        path.write_bytes(b"P5 16 16 65535\n" + (RAMP * 257).astype(">u2").tobytes())
    elif name == "big.tif":
        Image.frombytes("I;16B", (16, 16), (RAMP * 257).astype(">u2").tobytes()).save(path)
    else:
        Image.fromarray((RAMP * 257).astype(np.uint16)).save(path)
    assert (grey_levels(path) == RAMP).all()


def test_16_bit_greys_are_rounded(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (16, 16), dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert (grey_levels(tmp_path / "a.png") == np.rint(values * (255 / 65535))).all()


def test_12_bit_greys_are_scaled_where_the_file_says_so(tmp_path):
    values = RAMP * 16 + RAMP // 16
    assert values.max() == 4095
    chunks = PngImagePlugin.PngInfo()
    chunks.add(b"sBIT", b"\x0c")
    twelve = Image.fromarray(values.astype(np.uint16))
    twelve.save(tmp_path / "says.png", pnginfo=chunks)
    twelve.save(tmp_path / "silent.png")
    assert (grey_levels(tmp_path / "says.png") == np.rint(values * (255 / 4095))).all()
    assert (grey_levels(tmp_path / "silent.png") == np.rint(values * (255 / 65535))).all()
    # the PNG standard: samples of 12 significant bits are scaled to all 16
    Image.fromarray((RAMP * 257).astype(np.uint16)).save(tmp_path / "full.png", pnginfo=chunks)
    assert (grey_levels(tmp_path / "full.png") == RAMP).all()
    twelve_bit_tiff(tmp_path / "a.tif", values)
    assert (grey_levels(tmp_path / "a.tif") == np.rint(values * (255 / 4095))).all()


def twelve_bit_tiff(path, values):
    pairs = values.reshape(-1, 2)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], -1)
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    height, width = values.shape
    pixels = packed.astype(np.uint8).tobytes()
    for tag, value in ((256, width), (257, height), (258, 12), (259, 1), (262, 1), (277, 1), (278, height)):
        tags[tag] = value
    tags[273], tags[279] = 0, len(pixels)  # Pillow adds the length of the directory to the offset
    path.write_bytes(b"II*\0\x08\0\0\0" + tags.tobytes(8) + pixels)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (RAMP.astype(np.int32) * 257, RAMP),
        (RAMP.astype(np.float32) / 255, RAMP),
        (RAMP.astype(np.float32), RAMP),
        (np.float32(RAMP / 2), np.rint(RAMP / 2)),
        (RAMP.astype(np.int32) - 1, None),
        (RAMP.astype(np.int32) * 258, None),
        (RAMP.astype(np.float32) - 1, None),
        (RAMP.astype(np.float32) * 2, None),
        (np.where(RAMP == 7, np.float32(np.nan), np.float32(RAMP)), None),
        (np.where(RAMP == 7, np.float32(np.inf), np.float32(RAMP)), None),
    ],
    ids=["I", "F 0..1", "F 0..255", "F halves", "I below 0", "I above", "F below 0", "F above", "NaN", "inf"],
)
def test_wide_greys_are_scaled_or_refused(tmp_path, values, expected):
    path = tmp_path / "a.tif"
    Image.fromarray(values).save(path)
    if expected is not None:
        assert (grey_levels(path) == expected).all()
        return
    reader = FolderReader([(str(path), 0)])
    with pytest.raises(ValueError, match=r"grey values .* outside .*; save it with 8 or 16 bits"):
        reader(0)
    with pytest.raises(ValueError, match=r"image: .*a\.tif cannot be read as an image .*8 or 16 bits") as error:
        token_maps.prepare(path, vit(), (0.5,) * 3, (0.2,) * 3)
    assert "\n" not in str(error.value)


def test_a_refused_image_of_a_data_set_is_named_in_one_line(folder):
    root = folder()
    Image.fromarray(np.full((8, 8), -1.0, np.float32)).save(root / "red" / "deep.tiff")
    data = read_data(root, img_size=8, batch_size=2)
    with pytest.raises(ValueError, match=r"data: .*red/deep\.tiff cannot be read as an image: .*8 or 16 bits") as error:
        listed(data.train), listed(data.val)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mode", [*EIGHT_BITS, "I", "I;16", "F"])
def test_every_mode_becomes_rgb_without_a_warning(mode):
    colours = np.stack([RAMP, RAMP.T, 255 - RAMP], -1).astype(np.uint8)
    image = Image.fromarray(colours)
    kinds = {"I": np.int32, "F": np.float32, "I;16": np.uint16}
    if mode in kinds:
        image = Image.fromarray(RAMP.astype(kinds[mode]))
    elif mode == "LAB":
        image = Image.frombytes("LAB", (16, 16), colours.tobytes())
    else:
        image = image.quantize(16).convert(mode) if mode == "PA" else image.convert(mode)
    if mode in ("LA", "PA", "RGBA"):
        image.putalpha(Image.fromarray(RAMP.astype(np.uint8)))
    assert image.mode == mode
    before = image.convert("RGB") if mode in EIGHT_BITS else None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after = to_rgb(image)
    assert after.mode == "RGB" and after.size == (16, 16)
    assert before is None or (np.asarray(after) == np.asarray(before)).all()


@pytest.mark.parametrize("name", ["grey.png", "palette.png", "rgb.png", "palette.gif"])
def test_transparency_is_left_out_as_before(tmp_path, name):
    path = tmp_path / name
    image = Image.fromarray(np.stack([RAMP, RAMP.T, 255 - RAMP], -1).astype(np.uint8))
    if name == "palette.png":
        image.quantize(16).save(path, transparency=bytes(range(0, 256, 16)))
    elif name == "palette.gif":
        image.quantize(16).save(path, transparency=3)
    elif name == "rgb.png":
        image.save(path, transparency=(0, 0, 255))
    else:
        image.convert("L").save(path, transparency=7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = np.asarray(Image.open(path).convert("RGB"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (np.asarray(open_rgb(path)) == before).all()


@pytest.mark.parametrize("suffix", ["png", "jpg", "JPEG", "jfif", "webp", "bmp", "gif", "tif", "tiff", "ppm", "jp2"])
def test_folders_with_any_format(folder, suffix):
    root = folder(count=1)
    for name in ("blue", "green", "red"):
        for i in (1, 2):
            Image.open(root / name / "0.png").save(root / name / f"{i}.{suffix}")
    data = read_data(root, img_size=8, batch_size=9, augment="none")
    assert (data.train.count, data.val.count) == (6, 3)
    for images, labels in (next(iter(data.train)), next(iter(data.val))):
        assert images[:, :, 4, 4].argmax(1).tolist() == [2 - int(y) for y in labels]


def test_extensions_are_those_that_pillow_decodes():
    extensions = image_extensions()
    assert extensions >= {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".mpo"}
    assert not extensions & {".pdf", ".eps", ".ps", ".mpg", ".mpeg", ".h5", ".hdf", ".grib", ".bufr", ".wmf", ".emf"}
    assert (".avif" in extensions) == (".avif" in Image.registered_extensions())


def test_other_files_are_named_and_those_of_systems_are_not(folder):
    root = folder("train", "val")
    for name in (".DS_Store", "._0.png", "Thumbs.db", "desktop.ini", ".hidden.png"):
        (root / "train" / "red" / name).write_bytes(b"\0")
    (root / "train" / "notes.txt").write_text("not in a class folder")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_data(root, img_size=8).train.count == 18
    for i, name in enumerate(("a.heic", "b.txt", "c.mp4", "d.csv")):
        (root / ("val", "train")[i % 2] / "red" / name).write_bytes(b"\0")
    with pytest.warns(UserWarning, match="4 files in the class folders of .* are no images .*") as caught:
        assert read_data(root, img_size=8).train.count == 18
    text = str(caught[0].message)
    assert (
        len(caught) == 1
        and "\n" not in text
        and text.endswith(": train/red/b.txt, train/red/d.csv, val/red/a.heic, ...")
    )
    (root / "train" / "white").mkdir()
    (root / "train" / "white" / "0.heic").write_bytes(b"\0")
    with pytest.raises(ValueError, match=r"class folder .*white has no images that Pillow reads \(it has 0\.heic\)"):
        read_data(root, img_size=8)


def test_torchvision_opens_files_in_the_same_way(tmp_path):
    datasets = pytest.importorskip("torchvision.datasets")
    (tmp_path / "a").mkdir()
    Image.fromarray((RAMP * 257).astype(np.uint16)).save(tmp_path / "a" / "0.png")
    image, _ = _DatasetReader(datasets.ImageFolder(tmp_path), "torch/folder")(0)
    assert (np.asarray(image) == RAMP[..., None]).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_streams_open_files_in_the_same_way(tmp_path, workers):
    wds = pytest.importorskip("webdataset")
    settings = dict(root=str(tmp_path), num_classes=2, img_size=16, batch_size=2, augment="none", workers=workers)
    settings |= dict(mean=(0,) * 3, std=(1,) * 3, crop_pct=1.0)

    def write(values, kind):
        file = io.BytesIO()
        Image.fromarray(values).save(file, kind)
        splits = {}
        for part in ("train", "validation"):
            with wds.TarWriter(str(tmp_path / f"{part}-0.tar")) as shard:
                for i in range(2):
                    shard.write({"__key__": f"{i:04}", "png": file.getvalue(), "cls": i})
            splits[part] = {"name": part, "num_samples": 2, "filenames": [f"{part}-0.tar"], "shard_lengths": [2]}
        (tmp_path / "info.json").write_text(json.dumps({"splits": splits}))
        return read_data("wds/grey", **settings)

    data = write((RAMP * 257).astype(np.uint16), "PNG")
    for loader in (data.train, data.val):
        images, _ = next(iter(loader))
        assert np.abs(images.numpy() - RAMP / 255).max() < 1e-6
    data = write(np.float32(RAMP - 1), "TIFF")
    with pytest.raises(
        ValueError, match=r"^data: an image of wds/grey cannot be read as an image: .* 8 or 16"
    ) as error:
        listed(data.val)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_the_same_in_all_places(tmp_path, orientation):
    model = vit()
    height, width = model.patch_embed.img_size
    halves = np.zeros((height, width, 3), np.uint8)
    halves[: height // 2, :, 0], halves[:, : width // 2, 1] = 255, 255
    upright = Image.fromarray(halves)
    turns = [None, 0, 3, 1, 5, 2, 6, 4]  # Image.Transpose: the inverse of what a viewer does
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(turns[orientation - 1]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    stored.save(file, "JPEG", quality=100, subsampling=0, exif=exif)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(2):
            (tmp_path / name / f"{i}.jpg").write_bytes(file.getvalue())
    path = tmp_path / "a" / "0.jpg"
    decoded = np.asarray(open_rgb(path))
    assert np.abs(decoded.astype(int) - halves).max() < 8
    assert (decoded == np.asarray(FolderReader([(str(path), 0)])(0)[0])).all()
    reader = [(io.BytesIO(file.getvalue()), 0)]
    assert (decoded == np.asarray(_DatasetReader(SimpleNamespace(reader=reader), "memory")(0)[0])).all()
    picture, shown = token_maps.prepare(path, model, (0,) * 3, (1,) * 3)
    assert (decoded == np.asarray(picture)).all()
    settings = dict(img_size=(height, width), batch_size=2, augment="none", mean=(0,) * 3, std=(1,) * 3, crop_pct=1.0)
    data = read_data(tmp_path, val_share=0.5, **settings)
    for loader in (data.train, data.val):
        images, _ = next(iter(loader))
        assert (images - shown).abs().max() < 1e-6


def test_a_damaged_exif_block_does_not_spoil_the_image(tmp_path):
    """Pillow warns of it; the image keeps the orientation that it is stored in."""
    exif = b"Exif\0\0II*\0\xff\xff\xff\xff"
    Image.new("RGB", (8, 8), (200, 0, 0)).save(tmp_path / "a.jpg", exif=exif)
    with pytest.warns(UserWarning, match="Corrupt EXIF data"):
        assert open_rgb(tmp_path / "a.jpg").size == (8, 8)
