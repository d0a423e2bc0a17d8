"""Pictures as people have them: every depth of colour, odd names, links, what is no picture."""

from __future__ import annotations

import os
import struct
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image, TiffImagePlugin

from orderrl.data.encode import tokenize_folder
from orderrl.data.folder import FolderConfig, centre_crop, list_images
from orderrl.data.images import describe_left_out, find_images, image_size, read_image
from orderrl.metrics.images import ImageFolder
from tests.tokenizers.helpers import image_folder, save_tiny_vq, tiny_vq

RAMP = np.tile(np.linspace(0, 1, 32), (32, 1))
EIGHT, SIXTEEN = (RAMP * 255).astype(np.uint8), (RAMP * 65535).astype(np.uint16)


def written(folder: Path, name: str, array: np.ndarray) -> Path:
    Image.fromarray(array).save(folder / name)
    return folder / name


def binary(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


# -- levels -----------------------------------------------------------------------------------------------------------


def sixteen_bit_files(folder: Path) -> list[Path]:
    """The ramp with 16 bits in every form that Pillow reads."""
    big, colours = SIXTEEN.astype(">u2").tobytes(), np.stack([SIXTEEN] * 3, -1).astype(">u2").tobytes()
    twelve = (RAMP * 4095).astype(">u2").tobytes()
    return [
        written(folder, "grey.png", SIXTEEN),
        written(folder, "grey.tif", SIXTEEN),
        binary(folder, "grey.pgm", b"P5\n32 32\n65535\n" + big),
        binary(folder, "twelve.pgm", b"P5\n32 32\n4095\n" + twelve),
        binary(folder, "colour.ppm", b"P6\n32 32\n65535\n" + colours),
    ]


def test_pictures_of_16_bits_are_those_of_8_within_a_level(tmp_path: Path) -> None:
    for path in sixteen_bit_files(tmp_path):
        read = np.asarray(read_image(path)).astype(int)
        assert read.shape == (32, 32, 3) and np.abs(read - EIGHT[..., None]).max() <= 1, path.name


def test_references_are_read_like_data_sets(tmp_path: Path) -> None:
    sixteen_bit_files(tmp_path)
    folder = ImageFolder(tmp_path)
    assert {path.suffix for path in folder.files} == {".png", ".tif", ".pgm", ".ppm"}
    for number, path in enumerate(folder.files):
        assert np.array_equal(folder[number].permute(1, 2, 0).numpy(), np.asarray(read_image(path)))


def test_every_level_of_16_bits_goes_to_the_nearest_of_8(tmp_path: Path) -> None:
    levels = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    read = np.asarray(read_image(written(tmp_path, "all.png", levels)))[..., 0]
    assert np.array_equal(read, np.rint(levels / 257).astype(np.uint8))


@pytest.mark.parametrize("kind", ["float", "int32", "signed", "white is zero"])
def test_levels_without_a_known_range_are_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "odd.tif"
    if kind == "white is zero":
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags[262] = 0
        Image.fromarray(SIXTEEN).save(path, tiffinfo=tags)
        content = path.read_bytes()  # Pillow writes its own tag 262: change it in the file
        entry = struct.pack("<HHI", 262, 3, 1)
        place = content.index(entry) + len(entry)
        path.write_bytes(content[:place] + struct.pack("<HH", 0, 0) + content[place + 4 :])
    elif kind == "signed":
        image = Image.fromarray(EIGHT)
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags[339] = 2
        image.save(path, tiffinfo=tags)
    else:
        array = RAMP.astype(np.float32) if kind == "float" else (RAMP * 1e6).astype(np.int32)
        Image.fromarray(array).save(path)
    with pytest.raises(ValueError, match=r"odd\.tif: cannot be read as an image \(.*(8|16).bit") as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


def ordinary_files(folder: Path) -> list[Path]:
    colours = np.random.default_rng(0).integers(0, 256, (20, 24, 4), dtype=np.uint8)
    rgba = Image.fromarray(colours, "RGBA")
    rgb = rgba.convert("RGB")
    rgba.save(folder / "alpha.png")
    rgba.save(folder / "alpha.webp", lossless=True, exact=True)
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    rgb.convert("CMYK").save(folder / "cmyk.tif")
    rgb.convert("L").save(folder / "grey.bmp")
    Image.fromarray(colours[..., :2], "LA").save(folder / "la.png")
    rgb.convert("1").save(folder / "one.png")
    palette = rgb.quantize(16)
    palette.save(folder / "palette.png")
    palette.save(folder / "clear.png", transparency=3)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    rgb.save(folder / "turned.jpg", exif=exif)
    rgb.save(folder / "frames.webp", save_all=True, append_images=[rgb.transpose(Image.Transpose.ROTATE_180)])
    rgb.save(folder / "a_png.jpg", format="PNG")
    return sorted(folder.iterdir())


def test_every_other_picture_is_read_as_torchvision_reads_it(tmp_path: Path) -> None:
    """Transparency, palettes, CMYK, orientation, frames, and a name that lies about the kind."""
    for path in ordinary_files(tmp_path):
        expected = torchvision.datasets.folder.default_loader(str(path))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert np.array_equal(np.asarray(read_image(path)), np.asarray(expected)), path.name
        assert image_size(path) == expected.size


# -- damage -----------------------------------------------------------------------------------------------------------


def test_damaged_files_are_refused_in_one_line_with_their_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = np.random.default_rng(0)
    good = [path for path in [*ordinary_files(tmp_path), *sixteen_bit_files(tmp_path)] if path.stat().st_size > 60]
    for path in good:
        content = bytearray(path.read_bytes())
        for _ in range(8):
            harmed = bytearray(content)
            for place in source.integers(0, len(content), 4):
                harmed[place] ^= int(source.integers(1, 256))
            path.write_bytes(harmed[: int(source.integers(1, len(content) + 1))])
            try:
                read_image(path)
            except ValueError as error:
                assert str(error).startswith(f"{path}: cannot be read as an image (") and "\n" not in str(error)
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for ever
    large = written(tmp_path, "large.png", EIGHT)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for path, reason in ((large, "bomb"), (tmp_path / "dangling.png", "no file"), (tmp_path / "pipe.png", "no file")):
        with pytest.raises(ValueError, match=rf"{path.name}: cannot be read as an image \(.*{reason}"):
            read_image(path)


def test_files_that_start_other_programs_are_no_images(tmp_path: Path) -> None:
    path = binary(tmp_path, "page.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match=r"page\.png: cannot be read as an image"):
        read_image(path)


# -- crops ------------------------------------------------------------------------------------------------------------


def whole_then_cropped(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop as it is published: everything is scaled, then cropped."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def test_the_centre_crop_is_that_of_the_published_code_up_to_eight_times_as_long_as_wide() -> None:
    source = np.random.default_rng(0)
    for _ in range(100):
        short, size = (int(value) for value in source.integers(1, 90, 2))
        shape = source.permutation([short, int(source.integers(short, 8 * short + 1))])
        image = Image.fromarray(source.integers(0, 256, (*shape, 3), dtype=np.uint8))
        assert np.array_equal(np.array(centre_crop(image, size)), np.array(whole_then_cropped(image, size)))


@pytest.mark.parametrize(("length", "short"), [(60_000, 1), (60_001, 1), (3001, 2), (2000, 7)])
def test_long_images_show_the_same_middle(length: int, short: int) -> None:
    """Of a smooth image, where half a pixel makes little difference."""
    rows = (127 + 120 * np.sin(np.arange(length) / 40)).astype(np.uint8)[:, None, None]
    image = Image.fromarray(np.broadcast_to(rows, (length, short, 3)).copy())
    for turned in (image, image.transpose(Image.Transpose.ROTATE_90)):
        crop, whole = (np.array(cut(turned, 8)).astype(int) for cut in (centre_crop, whole_then_cropped))
        assert crop.shape == (8, 8, 3) and np.abs(crop - whole).max() <= 4


def test_memory_is_bounded_by_the_output(tmp_path: Path) -> None:
    """A strip of one pixel's width, scaled as a whole, would have four billion numbers."""
    largest = 0
    resize = Image.Image.resize

    def watched(self: Image.Image, size: tuple[int, int], *arguments: object) -> Image.Image:
        nonlocal largest
        largest = max(largest, size[0] * size[1])
        return resize(self, size, *arguments)  # type: ignore[arg-type]

    path = tmp_path / "thin.png"
    Image.new("L", (1, 60_000), 90).save(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "resize", watched)
        assert np.array(centre_crop(read_image(path), 256)).tolist() == np.full((256, 256, 3), 90).tolist()
    assert largest <= 10 * 256 * 256


# -- what a folder holds ----------------------------------------------------------------------------------------------


def test_what_is_hidden_is_no_class_and_no_image(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images", per_class=3, classes=("a", "b"))
    plain = list_images(FolderConfig(str(root)))
    hidden = root / ".ipynb_checkpoints"
    hidden.mkdir()
    Image.open(root / "a" / "00.png").save(hidden / "00-checkpoint.png")
    Image.open(root / "a" / "00.png").save(root / "b" / "._01.png")
    for system in ("__MACOSX", "b/@eaDir"):  # of archives from a Mac; thumbnails of a file server
        (root / system).mkdir()
        Image.open(root / "a" / "00.png").save(root / system / "00.png")
    images = list_images(FolderConfig(str(root)))
    assert images.table == plain.table and images.classes == ["a", "b"]
    assert "left out: 4 hidden: .ipynb_checkpoints/, __MACOSX/, b/@eaDir/, …" in images.describe()
    assert "classes: 2 (a, b)" in images.describe()


def test_what_is_no_image_of_a_class_is_left_out_and_said(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images", per_class=2, classes=("a", "b"))
    (root / "a" / "notes.TXT").write_text("x")
    (root / "README").write_text("x")
    Image.open(root / "a" / "00.png").save(root / "loose.png")
    images = list_images(FolderConfig(str(root)))
    assert sum(map(len, images.splits.values())) == 4
    assert images.left_out == {
        "no image (.txt)": ["a/notes.TXT"],
        "no image (no extension)": ["README"],
        "in no class folder": ["loose.png"],
    }
    (root / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="class folders without images: empty"):
        list_images(FolderConfig(str(root)))
    with pytest.raises(FileNotFoundError, match="no sub-folder with images"):
        list_images(FolderConfig(str(root / "a")))


def test_links_are_followed_once(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images", per_class=2, classes=("a", "b"))
    elsewhere = image_folder(tmp_path / "elsewhere", per_class=3, classes=("c",))
    (root / "c").symlink_to(elsewhere / "c")
    (root / "circle").symlink_to(root)
    (root / "a" / "up").symlink_to(root)
    (root / "b" / "a").symlink_to(root / "a")
    (root / "b" / "self.png").symlink_to(root / "b" / "self.png")
    images = list_images(FolderConfig(str(root), test_share=0, planner_share=0))
    names = images.splits["backbone"].names
    assert images.classes == ["a", "b", "c"] and len(names) == 8 and "b/self.png" in names
    assert images.left_out == {"found before by another path": ["circle/", "a/up/", "b/a/"]}


def test_the_order_is_that_of_torchvision(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images", per_class=2, classes=("b", "a-1", "a", "A", "a/z", "a/b", "a b"))
    expected = [str(Path(path).relative_to(root)) for path, _ in torchvision.datasets.ImageFolder(str(root)).samples]
    assert find_images(root).names == expected


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_odd_names_stay_in_their_line_and_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = [b"tab\there", b"line\nbreak", b"latin-\xe9", "schön".encode(), b"back\\slash", b"a=b,c@4:[x] 'y'"]
    root = image_folder(tmp_path / "images", per_class=2, classes=("plain",))
    content = (root / "plain" / "00.png").read_bytes()
    for name in odd:
        folder = os.fsencode(root) + b"/" + name
        os.mkdir(folder)  # noqa: PTH102 - paths of bytes
        for number in range(2):
            with open(folder + b"/" + name + b"%d.png" % number, "wb") as file:  # noqa: PTH123
                file.write(content)
    source = FolderConfig(str(root), image_size=8, test_share=0, planner_share=0)
    images = list_images(source)
    assert len(images.table.splitlines()) == 1 + 2 * (1 + len(odd))
    assert all(line.count("\t") == 3 for line in images.table.splitlines())
    assert {r"tab\there", r"line\nbreak", r"latin-\udce9", "schön", r"back\\slash"} <= set(images.classes)
    weights = save_tiny_vq(tmp_path / "t.safetensors")
    made = tokenize_folder(tiny_vq(), source, tmp_path / "set", weights)
    assert tokenize_folder(tiny_vq(), source, made, weights) == made
    assert "classes: 7 (" in capsys.readouterr().out
    (root / "plain" / "00.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"1 images changed, such as plain/00\.png"):
        tokenize_folder(tiny_vq(), source, made, weights)


def test_what_was_left_out_is_one_line() -> None:
    line = describe_left_out({"hidden": [".a", ".b\n", ".c", ".d"], "no image (.txt)": ["x.txt"]})
    assert line == r"4 hidden: .a, .b\n, .c, …; 1 no image (.txt): x.txt"


def test_a_folder_that_may_not_be_read_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = image_folder(tmp_path / "images", per_class=1)
    scandir = os.scandir

    def refusing(path: str) -> object:
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(ValueError, match=r"dog: the folder cannot be read \(Permission denied\)"):
        find_images(root)
