"""Clips that any machine makes alike, for the video tests and their references.

Owns the pictures, and writing them with PyAV in codecs that every build of it has. What is in `fixtures/video/` and how
it was made: `fixtures/make_video.py`. Leaves the comparisons to `test_video.py` and `test_video_live.py`.
"""

import io
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "fixtures" / "video"
CLIP = FOLDER / "clip.mp4"  # 60 frames of 64 x 48 at 30 a second, H.264 with B frames, a key frame every 12; AAC
HEIGHT, WIDTH = 48, 64
# Of arrays whose patches are kept: (frames, height, width, tokens), and every so many patches.
PICTURES = [(40, 48, 64, 70), (33, 120, 90, 140)]
STEP = 241


def picture(i: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """uint8 [H, W, 3]: another for every i, without hard edges; the blue says which."""
    y, x = np.mgrid[:height, :width]
    planes = [(x * 2 + i * 3) % 256, (y * 3 + i * 2) % 256, np.full_like(x, 16 + i * 3 % 224)]
    return np.stack(planes, axis=-1).astype(np.uint8)


def pictures(count: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    return np.stack([picture(i, height, width) for i in range(count)])


def tone(seconds: float, rate: int, level: float = 0.3) -> np.ndarray:
    return (level * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def make(
    container: str = "mp4",
    codec: str = "mpeg4",
    count: int = 60,
    rate: int = 30,
    *,
    sound: np.ndarray | None = None,
    sound_codec: str = "aac",
    sound_rate: int = 48_000,
    milliseconds: Sequence[int] | None = None,
    group: int = 12,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    options: dict[str, str] | None = None,
) -> bytes:
    """A file of `count` frames; with `milliseconds` each is shown from then on. sound: mono samples."""
    import av

    # A file on disk: a table in front (`faststart`) is put there by reading the file again.
    with tempfile.TemporaryDirectory() as folder, av.open(f"{folder}/clip", "w", container, options or {}) as file:
        stream = file.add_stream(codec, rate=rate)
        stream.height, stream.width = size
        stream.pix_fmt = {"gif": "rgb8", "mjpeg": "yuvj420p", "rawvideo": "bgr24"}.get(codec, "yuv420p")
        if codec != "gif":
            stream.codec_context.gop_size = group
        unit = Fraction(1, 1000) if milliseconds else Fraction(1, rate)
        stream.codec_context.time_base = unit
        heard = file.add_stream(sound_codec, rate=sound_rate, layout="mono") if sound is not None else None
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(picture(i, *size), format="rgb24")
            frame.pts, frame.time_base = (milliseconds[i] if milliseconds else i), unit
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
        if heard is not None:
            add_sound(file, heard, sound, sound_rate)
        file.close()
        return Path(folder, "clip").read_bytes()


def make_sound(container: str, codec: str, samples: np.ndarray, rate: int = 48_000) -> bytes:
    """A file of mono samples alone."""
    import av

    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        add_sound(file, file.add_stream(codec, rate=rate, layout="mono"), samples, rate)
    return out.getvalue()


def add_sound(file, stream, samples: np.ndarray, rate: int) -> None:
    import av

    whole = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
    whole.sample_rate, whole.pts = rate, 0
    pieces = av.AudioResampler(stream.format, "mono", rate, frame_size=stream.codec_context.frame_size or 1024)
    for piece in [*pieces.resample(whole), *pieces.resample(None)]:
        file.mux(stream.encode(piece))
    file.mux(stream.encode(None))


def decoded(data: bytes) -> list[np.ndarray]:
    """All frames of a file, one after the other: what seeking is compared with."""
    import av

    with av.open(io.BytesIO(data)) as file:
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]


def turned(data: bytes, matrix: tuple[int, int, int, int]) -> bytes:
    """An mp4 whose track is shown turned: (a, b, c, d) of its display matrix, each 1, 0 or -1."""
    a, b, c, d = (int(value * 65536).to_bytes(4, "big", signed=True) for value in matrix)
    at = data.index(b"tkhd") + 4 + 40
    old = data[at : at + 36]
    assert old[:4] == b"\0\1\0\0", "not where the matrix is"
    return data[:at] + a + b + bytes(4) + c + d + bytes(12) + old[32:] + data[at + 36 :]
