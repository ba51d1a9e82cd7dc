"""Pictures: files of any common kind to upright RGB, and RGB to the patches the vision tower reads.

Owns decoding (Pillow; HEIC through pillow-heif where it is installed), orientation, transparency, deep colours, the
size that a token budget allows, and patches. Pixels are those of transformers' `Gemma4ImageProcessorPil`, bit for bit.
Its torchvision twin resizes with coarser weights, and the two differ by 2 of 255 at most.

Leaves the bytes of a source to `sources.py` and the tower to `models/vision.py`. Nothing here needs MLX.
"""

import importlib
import importlib.util
import io
import math
import os
import warnings
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UsageError
from .sources import Bytes, MediaError, read_source

if TYPE_CHECKING:
    from PIL import Image

    Source = str | os.PathLike[str] | Bytes | Image.Image | np.ndarray

# Tokens a picture may have at most; each allows another size.
TOKEN_BUDGETS = (70, 140, 280, 560, 1120)
DEFAULT_BUDGET = 280
PATCH = 16  # pixels along the side of a patch
POOL = 3  # patches along the side of a token

# Where Pillow stops as well, and so the reference does: twice a quarter gigabyte of RGB. Checked on the header, before
# any pixel is decoded.
MAX_PIXELS = 178_956_970

# Formats with nothing to run and no other files to open, unlike e.g. EPS.
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "HEIF", "JPEG2000", "ICO", "PPM", "TGA")
_READS = "PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF and HEIC are read"
HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
_ORIENTATION = 0x0112  # the EXIF tag
_STRIP = 4 << 20  # pixels made opaque at a time


@dataclass(frozen=True, eq=False)
class ProcessedImage:
    """A picture as the tower reads it."""

    patches: np.ndarray  # uint8 [P, PATCH * PATCH * 3], row by row; inside a patch row, column, colour
    rows: int  # patches from top to bottom
    columns: int  # patches from left to right
    width: int  # pixels of the upright picture before it was resized
    height: int

    @property
    def tokens(self) -> int:
        """How many embeddings it becomes."""
        return len(self.patches) // POOL**2

    @property
    def positions(self) -> np.ndarray:
        """int32 [P, 2]: (x, y) of each patch."""
        y, x = np.divmod(np.arange(len(self.patches), dtype=np.int32), np.int32(self.columns))
        return np.stack([x, y], axis=-1)


def load_image(source: "Source", max_soft_tokens: int = DEFAULT_BUDGET, *, allow_urls: bool = False) -> ProcessedImage:
    """`open_image` and `process_image` in one; the same arguments and errors."""
    check_budget(max_soft_tokens)
    return process_image(open_image(source, allow_urls=allow_urls), max_soft_tokens)


def open_image(source: "Source", *, allow_urls: bool = False) -> "Image.Image":
    """An upright RGB picture.

    source: what `sources.read_source` takes, a PIL image, or an array: uint8 or uint16 [H, W], [H, W, 1], [H, W, 3]
    or [H, W, 4]. EXIF orientation is applied, transparency laid over white, CMYK converted, 16 bits rounded to 8; of
    an animation the first picture counts.

    Like transformers (`image_utils.load_image`, `image_transforms.convert_to_rgb`), but for grey pictures of 16 bits,
    which there come out white wherever they are not almost black.

    Raises MediaError in one line that names the picture.
    """
    from PIL import Image

    if isinstance(source, np.ndarray):
        return _to_rgb(_from_array(source), "the picture")
    if isinstance(source, Image.Image):
        return _decode(source, "the picture")
    data, name = read_source(source, what="picture", allow_urls=allow_urls)
    readable = formats()
    try:
        with warnings.catch_warnings():
            # Pillow warns from half of MAX_PIXELS; and of EXIF blocks it cannot read.
            warnings.simplefilter("ignore")
            found = Image.open(io.BytesIO(data), formats=readable)
    except Image.DecompressionBombError as e:
        raise MediaError(f"{name} is too large ({e}); scale it down first") from None
    except Exception:  # a plugin may raise anything at damaged data
        if data[4:8] == b"ftyp" and data[8:12] in HEIC_BRANDS and "HEIF" not in readable:
            raise MediaError(f"{name} is HEIC, which needs a decoder: pip install 'mlx-gemma4[heic]'") from None
        raise MediaError(f"{name} is not a picture, or damaged; {_READS}") from None
    return _decode(found, name)


def process_image(image: "Image.Image", max_soft_tokens: int = DEFAULT_BUDGET) -> ProcessedImage:
    """Patches of an upright RGB picture, resized to the largest size the budget allows.

    Source: transformers `image_processing_pil_gemma4.py: Gemma4ImageProcessorPil._preprocess`. Its rescaling to
    [0, 1] and padding to the budget are left out: the tower divides by 255 and takes no padding.

    Raises UsageError for another number than `TOKEN_BUDGETS`.
    """
    from PIL import Image

    width, height = image.size
    new_height, new_width = target_size(height, width, max_soft_tokens)
    if (new_height, new_width) != (height, width):
        image = image.resize((new_width, new_height), resample=Image.Resampling.BICUBIC)
    rows, columns = new_height // PATCH, new_width // PATCH
    pixels = np.asarray(image).reshape(rows, PATCH, columns, PATCH, 3)
    patches = np.ascontiguousarray(pixels.transpose(0, 2, 1, 3, 4)).reshape(rows * columns, -1)
    return ProcessedImage(patches, rows, columns, width, height)


def target_size(height: int, width: int, max_soft_tokens: int = DEFAULT_BUDGET) -> tuple[int, int]:
    """(height, width) in pixels that a picture of this size is resized to; both multiples of 48.

    The largest size of nearly the same proportions within the budget; smaller pictures grow. One so thin that a side
    would vanish gets a side of 48.
    Source: transformers `image_processing_pil_gemma4.py: get_aspect_ratio_preserving_size`.

    Raises UsageError for another number than `TOKEN_BUDGETS`.
    """
    check_budget(max_soft_tokens)
    side = PATCH * POOL
    factor = math.sqrt(max_soft_tokens * side**2 / (height * width))
    new_height, new_width = (math.floor(factor * length / side) * side for length in (height, width))
    # Both cannot vanish: 70 tokens are 401 pixels square.
    if new_height == 0:
        return side, min(width // height, max_soft_tokens) * side
    if new_width == 0:
        return min(height // width, max_soft_tokens) * side, side
    return new_height, new_width


def token_count(height: int, width: int, max_soft_tokens: int = DEFAULT_BUDGET) -> int:
    """Tokens a picture of this size becomes. Raises UsageError as `target_size` does."""
    new_height, new_width = target_size(height, width, max_soft_tokens)
    return new_height * new_width // (PATCH * POOL) ** 2


def check_budget(max_soft_tokens: int) -> None:
    """Raises UsageError for another number than `TOKEN_BUDGETS`."""
    if max_soft_tokens not in TOKEN_BUDGETS:
        allowed = ", ".join(map(str, TOKEN_BUDGETS))
        raise UsageError(f"{max_soft_tokens} tokens for a picture are not possible; allowed: {allowed}")


def _decode(image: "Image.Image", name: str) -> "Image.Image":
    width, height = image.size
    if width * height > MAX_PIXELS:
        mega = f"{width * height / 1e6:.0f} megapixels"
        raise MediaError(f"{name} is {width} x {height}, {mega}; at most {MAX_PIXELS // 10**6} are read: scale it down")
    if not width * height:
        raise MediaError(f"{name} has no pixels ({width} x {height})")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
            return _to_rgb(_upright(image), name)
    except MediaError:
        raise
    except MemoryError:
        raise MediaError(f"{name} ({width} x {height}) does not fit into memory; scale it down first") from None
    except Exception as e:  # a plugin may raise anything at damaged data
        why = str(e).strip().partition("\n")[0] or type(e).__name__
        raise MediaError(f"{name} is damaged or cut off ({why}); download or export it again") from None


def _upright(image: "Image.Image") -> "Image.Image":
    """What `PIL.ImageOps.exif_transpose` does, without writing the EXIF block anew, at which odd ones fail."""
    from PIL import Image

    turn = Image.Transpose
    methods = (
        *(None, None, turn.FLIP_LEFT_RIGHT, turn.ROTATE_180, turn.FLIP_TOP_BOTTOM),
        *(turn.TRANSPOSE, turn.ROTATE_270, turn.TRANSVERSE, turn.ROTATE_90),
    )
    found = image.getexif().get(_ORIENTATION)
    method = methods[found] if isinstance(found, int) and 1 <= found <= 8 else None
    if method is None:
        return image
    image = image.transpose(method)
    # Some formats keep the block as bytes beside it; the same picture given again must not be turned again.
    for place in ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"):
        image.info.pop(place, None)
    return image


def _to_rgb(image: "Image.Image", name: str) -> "Image.Image":
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        image = Image.fromarray(_eight_bits(np.asarray(image)))
    elif image.mode in ("I", "F"):
        raise MediaError(f"{name} has 32 bits per pixel, of which no range is known; save it with 8 or 16")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        return _over_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _over_white(image: "Image.Image") -> "Image.Image":
    """A strip at a time: as a whole it would take four copies of the picture."""
    from PIL import Image

    width, height = image.size
    out, rows = Image.new("RGB", image.size), max(1, _STRIP // width)
    for top in range(0, height, rows):
        part = image.crop((0, top, width, min(top + rows, height))).convert("RGBA")
        canvas = Image.new("RGBA", part.size, (255, 255, 255, 255))
        canvas.alpha_composite(part)
        out.paste(canvas.convert("RGB"), (0, top))
    return out


def _eight_bits(pixels: np.ndarray) -> np.ndarray:
    """0..65535 to 0..255, nearest."""
    return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _from_array(pixels: np.ndarray) -> "Image.Image":
    from PIL import Image

    if pixels.dtype not in (np.uint8, np.uint16):
        raise MediaError(f"a picture of {pixels.dtype} has no known range; give uint8 (0..255) or uint16 (0..65535)")
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.size == 0 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))):
        raise MediaError(f"an array of shape {list(pixels.shape)} is no picture; give [H, W], [H, W, 3] or [H, W, 4]")
    if pixels.shape[0] * pixels.shape[1] > MAX_PIXELS:
        raise MediaError(f"an array of {pixels.shape[1]} x {pixels.shape[0]} pixels is too large; scale it down")
    return Image.fromarray(np.ascontiguousarray(_eight_bits(pixels) if pixels.dtype == np.uint16 else pixels))


@cache
def formats() -> tuple[str, ...]:
    """Those of `_FORMATS` that this machine decodes."""
    from PIL import Image

    if importlib.util.find_spec("pillow_heif"):
        importlib.import_module("pillow_heif").register_heif_opener()
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)
