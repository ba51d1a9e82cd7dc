"""Pictures: sizes and pixels against stored ones of transformers, files of every kind, and what cannot be read.

The same comparisons with transformers beside it: `test_vision_live.py`.
"""

import base64
import http.server
import io
import json
import os
import struct
import threading
import zlib

import numpy as np
import pytest
import vision_cases as cases
from checkpoints import one_line
from PIL import Image

from mlx_gemma4.errors import UsageError
from mlx_gemma4.media import images, sources
from mlx_gemma4.media.images import TOKEN_BUDGETS, load_image, open_image, target_size, token_count
from mlx_gemma4.media.sources import MediaError, read_source


def encoded(image: Image.Image, kind: str = "png", **settings) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **settings)
    return out.getvalue()


def refused(source, **settings) -> str:
    with pytest.raises(MediaError) as error:
        load_image(source, 70, **settings)
    return one_line(error)


SMALL = Image.fromarray(cases.picture(40, 60))
PNG = encoded(SMALL)


# ------------------------------------------------------------------ as the reference


def test_sizes():
    rows = json.loads((cases.FOLDER / "sizes.json").read_text())
    assert len(rows) > 80 and {row[2] for row in rows} == set(TOKEN_BUDGETS)
    for height, width, tokens, new_height, new_width in rows:
        assert target_size(height, width, tokens) == (new_height, new_width), (height, width, tokens)
        assert token_count(height, width, tokens) == (new_height // 48) * (new_width // 48) <= tokens


@pytest.mark.parametrize("i", range(len(cases.PICTURES)), ids=[f"{h}x{w}-{n}" for h, w, n in cases.PICTURES])
def test_pixels(i):
    """Every byte: resizing is Pillow's, as in the reference without torchvision."""
    height, width, tokens = cases.PICTURES[i]
    with np.load(cases.FOLDER / "pixels.npz") as file:
        patches, positions, count = (file[f"{i}/{name}"] for name in ("patches", "positions", "tokens"))
    found = load_image(cases.picture(height, width), tokens)
    assert found.tokens == count and (found.height, found.width) == (height, width)
    assert found.patches.shape == (count * 9, 768) and found.patches.dtype == np.uint8
    assert np.array_equal(found.patches[:: cases.STEP], patches)
    assert np.array_equal(found.positions[:: cases.STEP], positions)


@pytest.mark.parametrize("tokens", [0, 71, 281, 2240, -70])
def test_a_budget_that_is_none(tokens):
    with pytest.raises(UsageError, match="70, 140, 280, 560, 1120") as error:
        load_image(b"not even read", tokens)
    one_line(error)


# ------------------------------------------------------------------ where a picture comes from


def test_every_kind_of_source(tmp_path, monkeypatch):
    path = tmp_path / "a picture with spaces é.png"
    path.write_bytes(PNG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    url = "data:image/png;base64," + base64.b64encode(PNG).decode()
    kinds = [path, str(path), path.name, f"~/{path.name}", path.as_uri(), f"file://localhost{path.as_uri()[7:]}", url]
    kinds += [PNG, bytearray(PNG), memoryview(PNG), SMALL, np.asarray(SMALL), Image.open(path)]
    for source in kinds:
        assert np.array_equal(np.asarray(open_image(source)), np.asarray(SMALL)), source


@pytest.fixture
def server():
    """A web server of pictures; .sizes says how long each answer claims to be."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", "/picture.png")
                self.end_headers()
                return
            self.send_response(200 if self.path in ("/picture.png", "/short") else 404)
            self.send_header("Content-Length", str(len(PNG) + (100 if self.path == "/short" else 0)))
            self.end_headers()
            self.wfile.write(PNG)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()


def test_the_network_only_when_allowed(server, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert "not allowed" in refused(f"{server}/picture.png")
    for name in ("picture.png", "moved"):
        found = open_image(f"{server}/{name}", allow_urls=True)
        assert np.array_equal(np.asarray(found), np.asarray(SMALL))
    assert "Not Found" in refused(f"{server}/nothing", allow_urls=True)
    assert f"of {len(PNG) + 100} bytes" in refused(f"{server}/short", allow_urls=True)
    with pytest.raises(MediaError, match="at most") as error:
        read_source(f"{server}/picture.png", what="picture", allow_urls=True, max_bytes=20)
    one_line(error)
    assert "cannot be fetched" in refused("http://127.0.0.1:1/x.png", allow_urls=True)


# ------------------------------------------------------------------ kinds of picture


@pytest.mark.parametrize("kind", ["png", "gif", "bmp", "tiff", "ppm", "ico", "tga"])
def test_kinds_without_loss(kind):
    source = SMALL.convert("P", palette=Image.Palette.ADAPTIVE) if kind == "gif" else SMALL
    settings = {"sizes": [SMALL.size]} if kind == "ico" else {}
    found = open_image(encoded(source, kind, **settings))
    assert found.mode == "RGB" and np.array_equal(np.asarray(found), np.asarray(source.convert("RGB")))


@pytest.mark.parametrize("kind", ["jpeg", "webp", "avif"])
def test_kinds_with_loss(kind):
    smooth = Image.fromarray(np.asarray(cases.picture(48, 64) // [1, 1, 256], np.uint8))
    found = open_image(encoded(smooth, kind, quality=95))
    assert np.abs(np.asarray(found).astype(int) - np.asarray(smooth)).mean() < 4


@pytest.mark.parametrize("turn", range(1, 9))
def test_orientation(turn):
    """A camera held any way: the picture comes out upright, as PIL's own exif_transpose has it."""
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = turn
    data = encoded(SMALL, "png", exif=exif)
    found, expected = open_image(data), ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert found.size == ((40, 60) if turn > 4 else (60, 40))
    assert np.array_equal(np.asarray(found), np.asarray(expected.convert("RGB")))


@pytest.mark.parametrize("value", [0, 9, 99, 65535])
def test_an_orientation_there_is_not(value):
    exif = Image.Exif()
    exif[0x0112] = value
    assert open_image(encoded(SMALL, "png", exif=exif)).size == SMALL.size


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white(mode):
    pixels = np.zeros((4, 6, 4), np.uint8)
    pixels[:, 3:] = 10, 20, 30, 255
    image = Image.fromarray(pixels)
    image = image.quantize() if mode == "P" else image.convert(mode)
    found = np.asarray(open_image(encoded(image)))
    assert (found[:, :3] == 255).all() and (found[:, 3:] < 40).all()


def test_transparency_strip_by_strip(monkeypatch):
    pixels = np.dstack([cases.picture(50, 30), cases.picture(30, 50)[..., 2].T])
    whole = open_image(pixels)
    canvas = Image.new("RGBA", (30, 50), "white")
    canvas.alpha_composite(Image.fromarray(pixels))
    assert np.array_equal(np.asarray(whole), np.asarray(canvas.convert("RGB")))
    for strip in (1, 95, 900):
        monkeypatch.setattr(images, "_STRIP", strip)
        assert np.array_equal(np.asarray(open_image(pixels)), np.asarray(whole))


def test_a_colour_declared_transparent():
    found = np.asarray(open_image(encoded(Image.new("RGB", (4, 4), (0, 0, 0)), "png", transparency=(0, 0, 0))))
    assert (found == 255).all()


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_sixteen_bits_of_grey_are_scaled(kind):
    """Pillow, and the reference with it, clips them at 255: all but the darkest 256th turns white."""
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    found = np.asarray(open_image(encoded(Image.fromarray(ramp), kind)))
    assert np.array_equal(found[..., 0].ravel(), np.arange(256)) and (found == found[..., :1]).all()


def test_sixteen_bits_of_colour():
    """A PNG as no library at hand writes it; its low bytes are dropped."""
    pixels = np.zeros((2, 3, 3), ">u2")
    pixels[1] = 0x12FF, 0x80FF, 0xFFFF

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 3, 2, 16, 2, 0, 0, 0))
    data += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert np.asarray(open_image(data)).tolist() == [[[0, 0, 0]] * 3, [[0x12, 0x80, 0xFF]] * 3]


def test_cmyk():
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert np.asarray(open_image(encoded(image, "tiff")))[0, 0].tolist() == [255, 0, 0]
    assert np.abs(np.asarray(open_image(encoded(image, "jpeg")))[0, 0].astype(int) - [255, 0, 0]).max() < 8


def test_the_first_picture_of_an_animation():
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue", "lime")]
    for kind in ("gif", "webp", "png", "tiff"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert np.asarray(open_image(data))[4, 4].tolist()[0] > 240, kind


def test_arrays():
    pixels = cases.picture(5, 7)
    for source, expected in (
        (pixels, pixels),
        (pixels[::-1, ::-1], pixels[::-1, ::-1]),
        (pixels.astype(np.uint16) * 257, pixels),
        (pixels[..., 0], np.repeat(pixels[..., :1], 3, axis=2)),
        (pixels[..., :1], np.repeat(pixels[..., :1], 3, axis=2)),
        (np.dstack([pixels, np.zeros((5, 7), np.uint8)]), np.full_like(pixels, 255)),
    ):
        assert np.array_equal(np.asarray(open_image(source)), expected)


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((3, 4), np.float32), np.zeros((0, 4, 3), np.uint8), np.zeros((4, 4, 2), np.uint8), np.zeros(9, np.uint8)],
    ids=["float", "empty", "two colours", "one axis"],
)
def test_arrays_that_are_no_picture(pixels):
    refused(pixels)


# ------------------------------------------------------------------ the edges and beyond


def test_the_smallest_picture():
    """As the reference: it grows to the whole budget."""
    found = load_image(encoded(Image.new("RGB", (1, 1), (9, 99, 199))), 70)
    assert found.tokens == 64 and (found.patches.reshape(-1, 3) == (9, 99, 199)).all()


def header_only(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixels."""
    body = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    head = struct.pack(">I", 13) + b"IHDR" + body + struct.pack(">I", zlib.crc32(b"IHDR" + body))
    return b"\x89PNG\r\n\x1a\n" + head + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


@pytest.mark.parametrize("size", [(20_000, 20_000), (65_535, 65_535), (2_000_000_000, 2_000_000_000)])
def test_a_decompression_bomb_is_refused_unopened(size):
    refused(header_only(*size))


def test_limits_of_pillow_do_not_matter(monkeypatch):
    """A program that lifts Pillow's guard has ours still; one that tightens it gets a line, too."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert "megapixels" in refused(header_only(20_000, 20_000))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "too large" in refused(PNG)


def test_a_hundred_megapixels(recwarn):
    """A large camera's picture is read like any other, and nothing is printed about it."""
    data = encoded(Image.new("1", (12_000, 8_400)))
    found = load_image(data, 70)
    assert (found.width, found.height, found.tokens) == (12_000, 8_400, 70) and not recwarn.list


def test_damaged_files(tmp_path):
    empty = tmp_path / "empty.png"
    empty.write_bytes(b"")
    assert refused(empty).startswith(f"{empty} is empty (0 bytes)")
    assert "is empty" in refused(b"")
    text = tmp_path / "text.png"
    text.write_text("no picture at all\n" * 9)
    assert refused(text).startswith(f"{text} is not a picture")
    assert "cut off" in refused(PNG[: len(PNG) // 2])
    for kind in ("jpeg", "webp", "gif", "bmp", "tiff", "avif"):
        data = encoded(SMALL, kind)
        for size in (4, 20, len(data) // 3, len(data) // 2):
            assert len(refused(data[:size])) > 20, (kind, size)


def test_noise_in_files_is_one_line_or_a_picture():
    """Bytes changed at random: whatever a decoder raises comes out as MediaError."""
    rng = np.random.default_rng(0)
    outcomes = set()
    for kind in ("png", "jpeg", "webp", "gif", "bmp", "tiff"):
        data = np.frombuffer(encoded(SMALL, kind), np.uint8)
        for _ in range(60):
            spoiled = data.copy()
            spoiled[rng.integers(0, len(data), 6)] = rng.integers(0, 256, 6)
            try:
                outcomes.add(open_image(spoiled.tobytes()).mode)
            except MediaError as error:
                assert "\n" not in str(error)
                outcomes.add("refused")
    assert outcomes == {"RGB", "refused"}


def test_what_is_no_file(tmp_path):
    assert "there is no file" in refused(tmp_path / "none.png")
    assert "is a folder" in refused(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "no ordinary file" in refused(tmp_path / "pipe")
    assert "no ordinary file" in refused("/dev/zero")
    assert "another machine" in refused("file://server/share/x.png")
    assert "damaged" in refused("data:image/png;base64,%%%")
    assert "damaged" in refused("data:image/png")
    assert len(refused("x" * 5000)) < 300 and "a?b" in refused("a\nb.png") and "a?b" in refused("a\0b.png")


def test_a_file_too_large_is_not_read(tmp_path, monkeypatch):
    with open(tmp_path / "huge.png", "wb") as file:
        file.truncate(sources.MAX_BYTES + 1)
    monkeypatch.setattr(sources.Path, "read_bytes", lambda self: pytest.fail("read"))
    assert "at most 268 MB" in refused(tmp_path / "huge.png")


def test_formats_that_run_something_are_not_opened():
    """PostScript, for which Pillow would start an interpreter."""
    assert "is not a picture" in refused(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    assert "EPS" not in images.formats()


def test_heic_without_its_decoder(monkeypatch):
    monkeypatch.setattr(images, "formats", lambda: ("PNG",))
    data = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)
    assert "pip install 'mlx-gemma4[heic]'" in refused(data)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bits_have_no_range(mode):
    assert "32 bits" in refused(encoded(Image.new(mode, (4, 4)), "tiff"))


def test_a_picture_made_upright_stays_upright():
    """Given again, as `open_image` returned it, it is not turned a second time."""
    image = Image.fromarray(np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("PNG", "JPEG", "WEBP", "TIFF"):
        out = io.BytesIO()
        image.save(out, kind, exif=exif)
        once = open_image(out.getvalue())
        assert once.size == (2, 3) == open_image(once).size, kind
