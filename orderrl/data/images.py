"""Image files as people have them: which files of a folder are images, and how they become RGB of 8 bits.

Data sets and references find and read their images here and nowhere else.
"""

import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from orderrl.runtime.sources import printable, walk

T = TypeVar("T")

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Of image files, in small or capital letters: those of torchvision's ImageFolder."""
# By content, whatever the name. Pillow reads more, but starts other programs for some kinds (EPS).
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
_SHOWN = 3  # names of what was left out


class FoundImages(NamedTuple):
    """What a folder holds: its images in torchvision's order, and everything else."""

    names: list[str]  # relative to it, with "/" between folders; by class folder, then by folder, then by file
    left_out: dict[str, list[str]]  # names by the reason, in words


def find_images(folder: Path) -> FoundImages:
    """All images of a folder and its sub-folders, as `runtime.sources.walk` finds them: no hidden ones, no circles."""
    names: list[str] = []
    left_out: dict[str, list[str]] = defaultdict(list)
    for name, reason in walk(folder):
        extension = PurePosixPath(name).suffix.lower()
        if not reason and extension in EXTENSIONS:
            names.append(name)
        else:
            left_out[reason or f"no image ({extension or 'no extension'})"].append(name)
    names.sort(key=lambda name: (name.partition("/")[0], *os.path.split(name)))  # torchvision's order
    return FoundImages(names, dict(left_out))


def describe_left_out(left_out: Mapping[str, list[str]]) -> str:
    """One line: how many things were left out, why, and the first names; empty if there are none."""
    parts = []
    for reason, names in left_out.items():
        shown = ", ".join(map(printable, names[:_SHOWN])) + (", …" if len(names) > _SHOWN else "")
        parts.append(f"{len(names)} {reason}: {shown}")
    return "; ".join(parts)


# -- reading ----------------------------------------------------------------------------------------------------------


def read_image(path: Path) -> Image.Image:
    """The image in a file as RGB with 8 bits a channel.

    As torchvision's loader reads it (`convert("RGB")`): transparency is dropped and the stored colours stay, palettes
    are looked up, CMYK is converted without colour profiles, the orientation in EXIF is not applied (labels, crops and
    published tokens of ImageNet were made that way), and of several frames the first counts. Grey levels of 16 bits,
    which torchvision would clip, are divided by 257; colours of 16 bits come with their upper 8 bits. Floating-point,
    signed and 32-bit levels have no agreed range and are refused.

    Args:
        path: of the file; its content decides what it is, not its name.

    Raises:
        ValueError: if the file is missing, damaged, no image, of levels without a known range, or has more than twice
            `PIL.Image.MAX_IMAGE_PIXELS` pixels; one line with the path.
    """
    return _opened(path, lambda image: _eight_bits(image).convert("RGB"))


def image_size(path: Path) -> tuple[int, int]:
    """Width and height, from the head of the file; errors as of `read_image`."""
    return _opened(path, lambda image: image.size)


def _opened(path: Path, read: Callable[[Image.Image], T]) -> T:
    """What `read` makes of the open image."""
    try:
        if not path.is_file():
            raise ValueError("it does not exist or is no file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd but readable EXIF data and palettes, a line for every file
            with Image.open(path, formats=FORMATS) as image:
                return read(image)
    except Exception as error:  # decoders raise whatever a damaged file makes them raise
        reason = " ".join(str(error).replace(str(path), "the file").split()) or type(error).__name__
        raise ValueError(f"{printable(str(path))}: cannot be read as an image ({printable(reason)})") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """An image whose levels `convert` scales rightly; ValueError if nothing says which range its levels have."""
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})  # of TIFF
    if image.mode == "F" or any(kind not in (1, 4) for kind in tags.get(_SAMPLE_FORMAT, (1,))):
        raise ValueError("floating-point or signed levels have no agreed range; save it with 8 or 16 bits")
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # these have 16 bits here, scaled by their maximum
        raise ValueError("levels of 32 bits have no agreed range; save it with 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    if tags and (tuple(tags.get(_BITS, ())) != (16,) or tags.get(_PHOTOMETRIC) == 0):
        raise ValueError("TIFF of 12-bit levels, or with 16 bits and 0 for white; save it as 16-bit PNG")
    levels = np.asarray(image).astype(np.int64)
    return Image.fromarray(((levels + 128) // 257).astype(np.uint8))
