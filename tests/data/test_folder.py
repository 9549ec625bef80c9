from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from passdeploy import data as datasets
from passdeploy.data import folder
from passdeploy.data.base import IMAGENET_MEAN, Preprocess, SubSplit
from passdeploy.data.folder import load_folder
from passdeploy.data.images import decode, fit, to_rgb, upright_size
from passdeploy.errors import BadInput
from passdeploy.feeding import training_batches

COLOURS = {"red": (200, 10, 20), "green": (30, 180, 40), "blue": (10, 60, 220)}


def picture(colour: tuple[int, int, int] = (1, 2, 3), size: tuple[int, int] = (12, 10), seed: int = 0) -> Image.Image:
    """An RGB image of (H, W) = `size` in one colour with some noise."""
    noise = np.random.default_rng(seed).integers(0, 30, (*size, 3))
    return Image.fromarray(np.clip(np.asarray(colour) + noise, 0, 255).astype(np.uint8))


def fill(root: Path, counts: Mapping[str, int], size: tuple[int, int] = (12, 10), suffix: str = ".png") -> Path:
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture(COLOURS.get(name, (90, 90, 90)), size, i).save(root / name / f"{i:03}{suffix}")
    return root


def refused(path: Path, **options: object) -> str:
    with pytest.raises(BadInput) as caught:
        load_folder(path, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message


def test_one_tree_is_split(tmp_path: Path) -> None:
    data = load_folder(fill(tmp_path / "shapes", {"red": 20, "green": 20, "blue": 20}))
    assert data.name == "shapes"
    assert data.classes == ("blue", "green", "red")
    assert data.input_shape == (3, 12, 10)
    assert data.preprocess.resize is None
    assert (len(data.train), len(data.val), len(data.test)) == (42, 6, 12)
    for split in (data.train, data.val, data.test):
        assert split.labels.dtype == torch.int64
        assert split.labels.bincount().tolist() == [len(split) // 3] * 3
        images = split.images(torch.arange(len(split)))
        assert images.dtype == torch.float32
        assert images.shape == (len(split), 3, 12, 10)
        assert torch.equal(images.mean((2, 3)).argmax(1), torch.tensor([2, 1, 0])[split.labels])  # blue, green, red


def test_no_image_is_in_two_splits(tmp_path: Path) -> None:
    data = load_folder(fill(tmp_path, {"red": 13, "green": 9, "blue": 30}))
    seen = []
    for split in (data.train, data.val, data.test):
        assert isinstance(split, SubSplit)
        chain, indices = split, split.indices
        while isinstance(chain.parent, SubSplit):
            chain, indices = chain.parent, chain.parent.indices[indices]
        seen += indices.tolist()
    assert sorted(seen) == list(range(52))


def test_same_folder_same_splits(tmp_path: Path) -> None:
    root = fill(tmp_path, {"red": 15, "green": 15})
    first, again, other = load_folder(root), load_folder(root), load_folder(root, seed=1)
    assert first.digest() == again.digest()
    assert first.digest() != other.digest()
    picture((0, 0, 0)).save(root / "red" / "more.png")
    assert load_folder(root).digest() != first.digest()


def test_a_file_that_was_replaced_makes_other_data(tmp_path: Path) -> None:
    """Whichever it is: the pixels of a few are looked at only."""
    root = tmp_path / "photos"
    fill(root / "train", {"red": 5, "green": 5})
    fill(root / "test", {"red": 40, "green": 40})
    before = load_folder(root).digest()
    assert load_folder(Path(shutil.copytree(root, tmp_path / "elsewhere" / "photos"))).digest() == before
    found = {before}
    for file in sorted((root / "test").rglob("*.png"))[:6]:
        content = file.read_bytes()
        picture((1, 2, 3)).save(file, compress_level=0)
        assert file.stat().st_size != len(content)
        found.add(load_folder(root).digest())
        file.write_bytes(content)
    assert len(found) == 7
    assert load_folder(root).digest() == before


@pytest.mark.parametrize("name", ["val", "test", "valid", "validation", "Test"])
def test_train_beside_a_test_set(tmp_path: Path, name: str) -> None:
    fill(tmp_path / "train", {"red": 20, "green": 20})
    fill(tmp_path / name, {"red": 3, "green": 4})
    data = load_folder(tmp_path)
    assert (len(data.train), len(data.val), len(data.test)) == (34, 6, 7)
    assert data.test.labels.bincount().tolist() == [4, 3]
    assert data.classes == ("green", "red")


def test_with_val_and_test_the_test_set_is_test(tmp_path: Path) -> None:
    fill(tmp_path / "train", {"red": 20, "green": 20})
    fill(tmp_path / "val", {"red": 5, "green": 5})
    fill(tmp_path / "test", {"red": 2, "green": 2})
    data = load_folder(tmp_path)
    assert (len(data.train), len(data.val), len(data.test)) == (34, 6, 4)


def test_train_alone_is_split(tmp_path: Path) -> None:
    fill(tmp_path / "train", {"red": 20, "green": 20})
    data = load_folder(tmp_path)
    assert len(data.train) + len(data.val) + len(data.test) == 40
    assert len(data.test) == 8


def test_found_through_the_registry(tmp_path: Path) -> None:
    root = fill(tmp_path, {"red": 6, "green": 6})
    assert datasets.load(str(root), size=(16, 16)).input_shape == (3, 16, 16)


def test_what_is_no_image_is_ignored(tmp_path: Path) -> None:
    root = fill(tmp_path, {"red": 6, "__green__": 6})
    (root / "red" / "notes.txt").write_text("x")
    (root / "red" / "._000.png").write_bytes(b"x")
    for hidden in (".ipynb_checkpoints", "@eaDir"):
        (root / "red" / hidden).mkdir()
        (root / "red" / hidden / "copy.png").write_bytes((root / "red" / "000.png").read_bytes())
    (root / ".cache").mkdir()
    (root / "__MACOSX").mkdir()
    (root / "overview.png").write_bytes(b"x")
    data = load_folder(root)
    assert (data.classes, len(data.test.labels)) == (("__green__", "red"), 2)
    assert len(data.train) + len(data.val) + len(data.test) == 12


def test_a_class_whose_name_is_no_utf8_is_refused_first(tmp_path: Path) -> None:
    root = fill(tmp_path, {"red": 6, "green": 6})
    try:
        os.rename(os.fsencode(root / "green"), os.fsencode(root) + b"/gr\x84n")  # noqa: PTH104 - bytes
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    with pytest.raises(BadInput, match=r"'gr\\udc84n' is no UTF-8; rename it"):
        load_folder(root)


def test_32_bit_images_of_8_bits_are_not_black() -> None:
    wide = Image.fromarray(np.array([[0, 200]], np.int32))
    assert np.asarray(to_rgb(wide))[..., 0].tolist() == [[0, 200]]
    assert np.asarray(to_rgb(Image.fromarray(np.array([[0, 51200]], np.int32))))[..., 0].tolist() == [[0, 200]]


def test_tiffs_are_as_large_as_they_are_seen(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    path = tmp_path / "turned.tif"
    picture((1, 2, 3), (8, 20)).save(path, exif=exif)
    found = upright_size(path)
    assert found == (20, 8)
    assert decode(path, Preprocess(size=(20, 8))).shape == (3, 20, 8)


def test_images_in_deeper_folders_and_links(tmp_path: Path) -> None:
    root = fill(tmp_path / "data", {"red": 6, "green/a": 3, "green/b": 3})
    (root / "green" / "a" / "loop").symlink_to(root / "green", target_is_directory=True)
    data = load_folder(root)
    assert len(data.train) + len(data.val) + len(data.test) == 12


@pytest.mark.parametrize("mode", ["L", "1", "LA", "RGBA", "P", "CMYK", "I;16", "I", "F", "YCbCr", "PA"])
def test_modes_become_rgb(mode: str) -> None:
    grey = np.full((4, 4), 128, np.uint8)
    grey[0] = 255
    if mode == "1":
        image, expected = Image.fromarray(grey).point(lambda v: 255 * (v > 200)).convert("1"), [0, 255]
    elif mode in ("I;16", "I"):
        image = Image.fromarray((grey.astype(np.uint16) << 8) + 7) if mode == "I;16" else None
        image = image or Image.fromarray(grey.astype(np.int32) * 256)
        expected = [128, 255]
    elif mode == "F":
        image, expected = Image.fromarray((grey / 255).astype(np.float32)), [128, 255]
    elif mode in ("P", "PA"):
        image, expected = Image.fromarray(grey).quantize().convert(mode), [128, 255]
    else:
        image, expected = Image.fromarray(grey).convert("RGB").convert(mode), [128, 255]
    assert image.mode == mode
    rgb = np.asarray(to_rgb(image))
    assert rgb.shape == (4, 4, 3)
    assert np.abs(rgb[3, 3].astype(int) - expected[0]).max() <= 1
    assert np.abs(rgb[0, 0].astype(int) - expected[1]).max() <= 1


@pytest.mark.parametrize("top", [1.0, 255.0, 65535.0])
def test_float_images_of_any_range(top: float) -> None:
    values = np.linspace(0, top, 16, dtype=np.float32).reshape(4, 4)
    values[0, 1] = np.nan
    rgb = np.asarray(to_rgb(Image.fromarray(values)))
    assert rgb[3, 3].tolist() == [255] * 3
    assert rgb[0, 1].tolist() == [0] * 3


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".webp", ".tif", ".gif", ".ppm"])
def test_file_formats(tmp_path: Path, suffix: str) -> None:
    data = load_folder(fill(tmp_path, {"red": 6, "blue": 6}, suffix=suffix))
    assert data.classes == ("blue", "red")
    images = data.test.images(torch.arange(2))
    assert images[1, 0].mean() > 0.7 > 0.4 > images[0, 0].mean()


def test_grey_and_sixteen_bit_files(tmp_path: Path) -> None:
    root = fill(tmp_path, {"red": 6, "green": 6})
    for i, file in enumerate(sorted((root / "green").iterdir())):
        grey = np.full((12, 10), 100, np.uint8)
        Image.fromarray(grey if i % 2 else grey.astype(np.uint16) * 257).save(file)
    images = load_folder(root).train.images(torch.arange(3))
    assert torch.allclose(images, torch.full_like(images, 100 / 255))


def test_exif_orientation_is_honoured(tmp_path: Path) -> None:
    upright = picture((0, 0, 0), (12, 10))
    upright.paste((255, 255, 255), (0, 0, 10, 3))  # white at the top
    flips = Image.Transpose
    stored_as = {  # how the camera holds it, by the EXIF code that tells how to turn it back
        1: upright,
        2: upright.transpose(flips.FLIP_LEFT_RIGHT),
        3: upright.transpose(flips.ROTATE_180),
        6: upright.transpose(flips.ROTATE_90),
        8: upright.transpose(flips.ROTATE_270),
    }
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(2):
            for code, stored in stored_as.items():
                exif = Image.Exif()
                exif[274] = code
                stored.save(tmp_path / name / f"{i}{code}.jpg", exif=exif, quality=95)
    data = load_folder(tmp_path)
    assert data.input_shape == (3, 12, 10)
    images = data.train.images(torch.arange(len(data.train)))
    assert images[:, :, :2].mean((1, 2, 3)).min() > 0.9
    assert images[:, :, 5:].mean((1, 2, 3)).max() < 0.2


def test_broken_exif_is_no_reason_to_refuse(tmp_path: Path) -> None:
    root = fill(tmp_path, {"red": 6, "green": 6}, suffix=".jpg")
    picture().save(root / "red" / "000.jpg", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    assert load_folder(root).num_classes == 2


def test_mixed_sizes_are_resized_and_cropped(tmp_path: Path) -> None:
    root = fill(tmp_path, {"red": 6, "green": 6})
    picture(COLOURS["red"], (30, 50)).save(root / "red" / "000.png")
    data = load_folder(root)
    assert data.preprocess.size == (224, 224)
    assert data.preprocess.resize == 256
    assert data.preprocess.mean == IMAGENET_MEAN
    assert data.test.images(torch.arange(2)).shape == (2, 3, 224, 224)


def test_images_too_large_for_an_input(tmp_path: Path) -> None:
    data = load_folder(fill(tmp_path, {"red": 5, "green": 5}, size=(20, 1100)))
    assert (data.preprocess.size, data.preprocess.resize) == ((224, 224), 256)


@pytest.mark.parametrize(
    ("size", "resize"), [((24, 20), None), ((48, 40), None), ((32, 32), 37), ((16, 32), None), ((12, 10), None)]
)
def test_a_given_size(tmp_path: Path, size: tuple[int, int], resize: int | None) -> None:
    data = load_folder(fill(tmp_path, {"red": 6, "green": 6}), size=size)
    assert (data.preprocess.size, data.preprocess.resize) == (size, resize)
    assert data.val.images(torch.arange(2)).shape[2:] == size


def test_centre_crop() -> None:
    pixels = np.zeros((100, 300, 3), np.uint8)
    pixels[:, 100:200] = 255
    out = np.asarray(fit(Image.fromarray(pixels), (80, 80), 100))
    assert out.shape == (80, 80, 3)
    assert out.min() == 255
    assert np.asarray(fit(Image.fromarray(pixels), (90, 200), 50)).shape == (90, 200, 3)  # never short of the crop


def test_the_shorter_side_becomes_what_was_asked_for() -> None:
    """214 * (256 / 214) is a little less than 256 in floating point."""
    pixels = np.random.default_rng(0).integers(0, 256, (214, 214, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    expected = image.resize((256, 256), Image.Resampling.BILINEAR).crop((16, 16, 240, 240))
    assert np.array_equal(np.asarray(fit(image, (224, 224), 256)), np.asarray(expected))


@settings(deadline=None)
@given(
    source=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    resize=st.none() | st.integers(1, 60),
)
def test_whatever_its_size_an_image_fits(source: tuple[int, int], size: tuple[int, int], resize: int | None) -> None:
    pixels = np.asarray(fit(picture((50, 60, 70), source), size, resize))
    assert pixels.shape == (*size, 3)
    assert pixels[..., 0].min() >= 50  # nothing from outside the picture
    assert pixels[..., 0].max() <= 80


@pytest.mark.parametrize("size", [(0, 5), (-3, 3), (5000, 5000)])
def test_a_size_that_makes_no_sense(tmp_path: Path, size: tuple[int, int]) -> None:
    assert "8 to 4096" in refused(fill(tmp_path, {"red": 6, "green": 6}), size=size)


def test_normalisation_of_small_images_is_theirs(tmp_path: Path) -> None:
    data = load_folder(fill(tmp_path, {"red": 20, "green": 20}))
    pixels = data.train.images(torch.arange(len(data.train)))
    assert data.preprocess.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-3)
    assert data.preprocess.std == pytest.approx(pixels.std((0, 2, 3)).tolist(), abs=1e-3)


def test_normalisation_as_given(tmp_path: Path) -> None:
    root = fill(tmp_path, {"red": 6, "green": 6})
    data = load_folder(root, mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5))
    assert data.preprocess.mean == (0.1, 0.2, 0.3)
    assert data.preprocess.std == (0.5, 0.5, 0.5)
    for options, said in (({"std": (0.5, 0.0, 0.5)}, "greater than zero"), ({"mean": (0.5, float("nan"), 1)}, "three")):
        with pytest.raises(BadInput, match=said):
            load_folder(root, **options)  # type: ignore[arg-type]


def test_one_colour_does_not_divide_by_zero(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(6):
            Image.new("RGB", (10, 10), (9, 9, 9)).save(tmp_path / name / f"{i}.png")
    assert min(load_folder(tmp_path).preprocess.std) >= 0.01


@pytest.mark.parametrize(
    ("classes", "flip"),
    [
        (("cat", "dog"), True),
        (("turn_left", "turn_right"), False),
        (("0", "1", "7"), False),
        (("1", "2", "10"), False),
        (("00000", "00001"), False),
        (("cat1", "2"), True),
    ],
)
def test_mirroring_must_not_change_the_class(tmp_path: Path, classes: tuple[str, ...], flip: bool) -> None:
    assert load_folder(fill(tmp_path, dict.fromkeys(classes, 5))).augmentation.flip is flip


def test_pixels_are_kept_when_they_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = fill(tmp_path, {"red": 6, "green": 6})
    data = load_folder(root)
    before = data.train.images(torch.arange(4))
    for file in root.rglob("*.png"):
        file.unlink()
    assert torch.equal(data.train.images(torch.arange(4)), before)


def test_pixels_that_do_not_fit_are_read_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = fill(tmp_path, {"red": 6, "green": 6})
    kept = load_folder(root)
    monkeypatch.setattr(folder, "CACHE_BYTES", 100)
    monkeypatch.setattr(folder, "CHECK_PIXELS", 0)
    data = load_folder(root)
    order = torch.tensor([3, 0, 3, 2])
    assert torch.equal(data.train.images(order), kept.train.images(order))
    for file in root.rglob("*.png"):
        file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(BadInput, match="can't be read"):
        data.train.images(order)


def test_large_folders_are_decoded_as_they_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = fill(tmp_path, {"red": 8, "green": 8})
    kept = load_folder(root)
    monkeypatch.setattr(folder, "CHECK_PIXELS", 0)
    monkeypatch.setattr(folder, "CHECK_FILES", 3)
    data = load_folder(root)
    for indices in ([5, 1, 5], [1, 0], [0, 1, 2, 3, 4, 5]):
        order = torch.tensor(indices)
        assert torch.equal(data.train.images(order), kept.train.images(order))


def test_trains(tmp_path: Path) -> None:
    data = load_folder(fill(tmp_path, {"red": 12, "green": 12}))
    steps = list(training_batches(data, batch=8, seed=0, total=4))
    assert [images.shape for _, images, _ in steps] == [(8, 3, 12, 10)] * 4


# --- what can't be used --------------------------------------------------------------------------------------------


def test_no_such_folder_and_a_file(tmp_path: Path) -> None:
    assert "no such folder" in refused(tmp_path / "gone")
    (tmp_path / "file").touch()
    assert "a file, not a folder" in refused(tmp_path / "file")


def test_empty_folder(tmp_path: Path) -> None:
    assert ": empty; expected a subfolder of images per class" in refused(tmp_path)


def test_no_class_folders(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    assert "1 images and no class folders" in refused(tmp_path)
    (tmp_path / "a.png").unlink()
    (tmp_path / "a.txt").touch()
    assert "no class folders" in refused(tmp_path)


def test_no_images_at_all(tmp_path: Path) -> None:
    (tmp_path / "red").mkdir()
    (tmp_path / "green").mkdir()
    assert "no images in its subfolders" in refused(tmp_path)


def test_one_class(tmp_path: Path) -> None:
    assert "one class only (red); two classes or more" in refused(fill(tmp_path, {"red": 6}))


def test_one_folder_too_high(tmp_path: Path) -> None:
    fill(tmp_path / "shapes", {"red": 6, "green": 6})
    assert f"did you mean {tmp_path / 'shapes'}?" in refused(tmp_path)


def test_class_without_images(tmp_path: Path) -> None:
    root = fill(tmp_path, {"red": 6, "green": 6})
    (root / "blue").mkdir()
    assert "no images in blue" in refused(root)


def test_too_few_images(tmp_path: Path) -> None:
    assert "fewer than 5 images in green (4)" in refused(fill(tmp_path, {"red": 6, "green": 4}))


def test_val_without_train(tmp_path: Path) -> None:
    fill(tmp_path / "val", {"red": 6, "green": 6})
    assert "has val/ but no train/" in refused(tmp_path)


def test_classes_differ(tmp_path: Path) -> None:
    fill(tmp_path / "train", {"red": 6, "green": 6, "blue": 6})
    fill(tmp_path / "val", {"red": 2, "green": 2})
    assert "train/ has blue, which val/ lacks" in refused(tmp_path)
    fill(tmp_path / "val", {"blue": 2, "pink": 2})
    assert "val/ has pink, which train/ lacks" in refused(tmp_path)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif", ".bmp"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_truncated_images_are_named_and_counted(tmp_path: Path, suffix: str, share: float) -> None:
    root = fill(tmp_path, {"red": 6, "green": 6}, size=(40, 40), suffix=suffix)
    for name in ("red/001", "green/002"):
        file = root / f"{name}{suffix}"
        file.write_bytes(file.read_bytes()[: round(file.stat().st_size * share)])
    message = refused(root)
    assert "2 of 12 images can't be read" in message
    assert f"green/002{suffix}: " in message
    assert f"red/001{suffix}: " in message


def test_a_truncated_image_is_found_without_decoding_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "CHECK_PIXELS", 0)
    root = fill(tmp_path, {"red": 6, "green": 6}, suffix=".jpg")
    file = root / "red" / "001.jpg"
    whole = file.read_bytes()
    file.write_bytes(whole[:-30])
    assert "1 of 12 images can't be read (red/001.jpg: image file is truncated" in refused(root)
    file.write_bytes(whole + b"appended by a camera" * 10)
    assert load_folder(root).num_classes == 2


def test_a_text_file_called_image(tmp_path: Path) -> None:
    root = fill(tmp_path, {"red": 6, "green": 6})
    (root / "red" / "page.jpg").write_text("<html>404</html>")
    assert "1 of 13 images can't be read (red/page.jpg: not an image)" in refused(root)


def test_damage_inside_a_png(tmp_path: Path) -> None:
    root = fill(tmp_path, {"red": 6, "green": 6}, size=(40, 40))
    content = bytearray((root / "red" / "003.png").read_bytes())
    content[len(content) // 2] ^= 0xFF
    (root / "red" / "003.png").write_bytes(content)
    assert "red/003.png" in refused(root)


def test_many_bad_images_are_not_all_listed(tmp_path: Path) -> None:
    root = fill(tmp_path, {"red": 9, "green": 9})
    for file in (root / "red").iterdir():
        file.write_bytes(b"?")
    message = refused(root)
    assert "9 of 18 images" in message
    assert message.count("not an image") == 3


def test_a_dangling_link(tmp_path: Path) -> None:
    root = fill(tmp_path, {"red": 6, "green": 6})
    (root / "red" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert "red/gone.png: No such file or directory" in refused(root)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable(tmp_path: Path) -> None:
    root = fill(tmp_path, {"red": 6, "green": 6})
    (root / "red" / "000.png").chmod(0)
    assert "red/000.png: Permission denied" in refused(root)
    (root / "green").chmod(0)
    try:
        with pytest.raises(BadInput, match="can't be read"):
            load_folder(root)
    finally:
        (root / "green").chmod(0o755)


def test_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = fill(tmp_path, {"red": 6, "green": 6})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    assert "12 of 12 images can't be read" in refused(root)


def test_decode_returns_planes(tmp_path: Path) -> None:
    picture((200, 0, 0)).save(tmp_path / "a.png")
    pixels = decode(tmp_path / "a.png", datasets.Preprocess(size=(12, 10)))
    assert pixels.shape == (3, 12, 10)
    assert pixels.dtype == np.uint8
    assert pixels[0].min() >= 200


def test_train_may_be_a_class(tmp_path: Path) -> None:
    fill(tmp_path, {"bus": 10, "car": 10, "train": 10})
    assert load_folder(tmp_path).classes == ("bus", "car", "train")
    fill(tmp_path / "train", {"freight": 10, "passenger": 10})
    assert "if train is a class, give it another name" in refused(tmp_path)
    fill(tmp_path / "val", {"freight": 5, "passenger": 5})
    assert load_folder(tmp_path).classes == ("freight", "passenger"), "beside val/ it is none"


def test_what_lies_beside_train_and_val_is_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The root of a file system has a folder that nobody can read."""
    for part in ("train", "val"):
        fill(tmp_path / part, {"red": 10, "blue": 10})
    (tmp_path / "lost+found").mkdir()
    images = folder._images

    def looked(path: Path) -> list[Path]:
        assert path.name != "lost+found"
        return images(path)

    monkeypatch.setattr(folder, "_images", looked)
    assert load_folder(tmp_path).classes == ("blue", "red")
