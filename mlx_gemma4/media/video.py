"""Clips: from files, arrays or lists of pictures to the frames the vision tower reads, and the soundtrack.

Owns which frames are taken and what the user is told about it, and the refusal of what is no video. Leaves decoding to
`container.py`, pixels to `images.py`, features of sound to `audio.py` and `mel.py`.

Frames and their times are those of transformers' `Gemma4VideoProcessor` and `Gemma4Processor`, but for three things.
There a clip of fewer than 32 frames is an error; here all of its frames are taken. There the time of a frame is its
number divided by the average rate, which is wrong for clips of uneven rate (screen recordings, some phones); here it is
the frame's own, and one asked for by `fps` is the one on screen at its moment. And its torchvision resizes with coarser
weights than Pillow, as for pictures: up to 2 % of the values differ by 1 of 255, one in 100,000 by 2, none by more.
"""

import io
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import urlsplit

import numpy as np

from ..errors import UsageError
from .audio import MAX_SECONDS, SILENCE, Sound, clock
from .container import UNKNOWN_RATE, Clip, Index, Unindexed
from .images import HEIC_BRANDS, ProcessedImage, check_budget, formats, open_image, process_image, token_count
from .mel import SAMPLE_RATE, SHORTEST
from .resample import resample
from .sources import Bytes, MediaError, path_of_url, read_source, short_name

if TYPE_CHECKING:
    from PIL import Image

    Source = str | os.PathLike[str] | Bytes | np.ndarray | Sequence[Image.Image | np.ndarray]

# Source: transformers `video_processing_gemma4.py: Gemma4VideoProcessor`, `num_frames` and `max_soft_tokens`.
FRAMES = 32
FRAME_TOKENS = 70
# With `fps` and without `max_frames`, longer clips are sampled sparser: the length Gemma 4 was made for.
SECONDS_AT_FPS = 60
# The longest context there is; more is refused before anything is decoded.
MAX_TOKENS = 262_144
# What is not a file on this machine is held in memory.
MAX_BYTES = 2 << 30


@dataclass(frozen=True, eq=False)
class Video:
    """A clip as the towers read it."""

    frames: tuple[ProcessedImage, ...]
    seconds: tuple[float, ...]  # when each is shown, after the first frame of the clip
    duration: float  # seconds, of the whole clip
    name: str
    sound: Sound | None  # None where there is none to hear, or it was not asked for
    note: str | None  # one line about what was done, for the user

    @property
    def tokens(self) -> int:
        """Soft tokens of the frames."""
        return sum(frame.tokens for frame in self.frames)

    @property
    def stamps(self) -> tuple[str, ...]:
        """ "MM:SS" of each frame, as the prompt has it: transformers `processing_gemma4.py: replace_video_token`."""
        return tuple(f"{int(s // 60):02d}:{int(s % 60):02d}" for s in self.seconds)


def load_video(
    source: "Source",
    *,
    fps: float | None = None,
    max_frames: int | None = None,
    max_soft_tokens: int = FRAME_TOKENS,
    sound: bool = True,
    rate: float | None = None,
    allow_urls: bool = False,
) -> Video:
    """Frames of a clip, spread evenly over it, and its soundtrack.

    source: what `sources.read_source` takes (a path is not read into memory), an array [frames, H, W, 3] (also
    [frames, H, W] and with transparency), or a list of pictures. rate: frames a second of an array or a list; None
    is 24, as transformers has it. fps: frames to take a second, of clips up to 60 s or `max_frames` frames; longer ones
    are sampled sparser, and `Video.note` says so. None takes 32, or `max_frames`. max_soft_tokens: of a frame, one of
    `images.TOKEN_BUDGETS`. sound: whether the soundtrack is decoded; one that is missing or silent becomes None and a
    line in the note.

    Raises MediaError, one line, for what is not there, empty, no video, a still picture, only sound, cut short, damaged
    or absurdly large, and where PyAV is missing; UsageError for options out of range.
    """
    check_budget(max_soft_tokens)
    if fps is not None and not 0 < fps < math.inf:
        raise UsageError(f"fps is how many frames to take a second, above 0; got {fps}")
    if max_frames is not None and max_frames < 1:
        raise UsageError(f"max_frames is how many frames to take at most, 1 or more; got {max_frames}")
    wish = _Wish(fps, max_frames, max_soft_tokens)
    if isinstance(source, np.ndarray | list | tuple):
        return _from_pictures(source, wish, rate)
    if rate is not None:
        raise UsageError("rate goes with arrays and lists of pictures; a file says its own")
    with _opened(source, allow_urls) as (file, name):
        _refuse_pictures(file, name)
        clip = Clip(file, name)
        try:
            found = _frames(clip, clip.scan(), wish)
        except Unindexed:
            found = _frames(clip, clip.count(), wish)
        track, remark = _soundtrack(clip) if sound else (None, None)
    return _complete(found, track, remark)


def choose(total: int, rate: float, fps: float | None = None, most: int | None = None) -> np.ndarray:
    """Numbers of the frames to take of `total` at an even rate: int64, ascending, each once.

    fps None: `most` or 32, spread evenly, all of a clip that has fewer. Otherwise `fps` a second, `most` at most.
    Source: transformers `video_utils.py: default_sample_indices_fn`.
    """
    count = most or FRAMES
    if fps is not None:
        asked = max(1, int(min(total / rate * fps, total)))
        count = min(asked, most or max(1, round(SECONDS_AT_FPS * fps)))
    count = min(count, total)
    return np.arange(count, dtype=np.int64) * total // count


@dataclass(frozen=True)
class _Wish:
    """What the caller asked for."""

    fps: float | None
    most: int | None
    tokens: int

    def frames(self, index: Index) -> np.ndarray:
        """Numbers of the frames to take."""
        even = choose(len(index), index.rate, self.fps, self.most)
        if self.fps is None or index.even:
            return even
        moments = np.arange(len(even)) * index.duration / len(even)
        return np.unique(np.searchsorted(index.seconds, moments, "right") - 1)

    def check(self, count: int, width: int, height: int, name: str) -> None:
        """Raises MediaError for more tokens than any context holds."""
        tokens = count * token_count(height, width, self.tokens)
        if tokens > MAX_TOKENS:
            raise MediaError(
                f"{count:,} frames of {name} become {tokens:,} tokens, more than the {MAX_TOKENS:,} of the longest "
                "context; take fewer (fps, max_frames) or smaller ones"
            )

    def note(self, taken: int, total: int, rate: float, duration: float) -> str | None:
        """What to tell the user about the frames, without the clip's name; None where all is as expected."""
        asked = (self.most or FRAMES) if self.fps is None else int(total / rate * self.fps)
        if taken == total < asked:
            return f"has {total} frame{'s' * (total > 1)}, and all are taken"
        spacing = duration / taken
        if spacing > 1 if self.fps is None else taken < min(asked, total):
            every = f"{spacing:.2g}" if spacing < 10 else f"{spacing:.0f}"
            return f"lasts {clock(duration)}: {taken} frame{'s' * (taken > 1)}, one every {every} s"
        return None


def _frames(clip: Clip, index: Index, wish: _Wish) -> Video:
    """Without sound; the note still lacks the name, here and below."""
    numbers = wish.frames(index)
    wish.check(len(numbers), index.width, index.height, clip.name)
    frames = tuple(process_image(picture, wish.tokens) for picture in clip.frames(index, numbers.tolist()))
    # An even clip's times are its numbers', to the bit; stored ones are rounded, in some files to milliseconds.
    seconds = numbers / index.rate if index.even else index.seconds[numbers]
    note = wish.note(len(frames), len(index), index.rate, index.duration)
    return Video(frames, tuple(seconds.tolist()), index.duration, clip.name, None, note)


def _from_pictures(source: Any, wish: _Wish, rate: float | None) -> Video:
    name = "the video"
    if rate is not None and not 0 < rate < math.inf:
        raise UsageError(f"rate is how many frames a second the pictures are, above 0; got {rate}")
    if isinstance(source, np.ndarray) and (source.ndim not in (3, 4) or (source.ndim == 3 and source.shape[2] <= 4)):
        raise MediaError(f"an array of shape {list(source.shape)} is no video; give [frames, H, W, 3]")
    if not len(source):
        raise MediaError(f"{name} is empty (0 frames)")
    total, each = len(source), rate or float(UNKNOWN_RATE)
    numbers = choose(total, each, wish.fps, wish.most)
    first = open_image(source[0])
    wish.check(len(numbers), first.width, first.height, name)
    frames = tuple(process_image(open_image(source[i]), wish.tokens) for i in numbers.tolist())
    note = wish.note(len(frames), total, each, total / each)
    video = Video(frames, tuple((numbers / each).tolist()), total / each, name, None, note)
    unknown = f"came without a rate, which is taken to be {UNKNOWN_RATE} frames a second"
    return _complete(video, None, None if rate else unknown)


def _complete(video: Video, sound: Sound | None, remark: str | None) -> Video:
    said = [phrase for phrase in (video.note, remark) if phrase]
    return replace(video, sound=sound, note=f"{video.name} {'; it '.join(said)}" if said else None)


def _soundtrack(clip: Clip) -> tuple[Sound | None, str | None]:
    """The sound, or what to say instead."""
    parts, found, rate = [], 0, 0
    for part, rate in clip.sound():
        parts.append(part)
        found += len(part)
        if found > MAX_SECONDS * rate:
            return None, f"has more sound than the model's context holds ({clock(MAX_SECONDS)}), which is left out"
    if not found:
        return None, "has no sound"
    samples = resample(np.concatenate(parts), rate, SAMPLE_RATE)
    if len(samples) < SHORTEST or not np.isfinite(samples).all() or np.abs(samples).max() <= SILENCE:
        return None, "has a silent soundtrack"
    return Sound(samples, clip.name), None


@contextmanager
def _opened(source: Any, allow_urls: bool) -> Iterator[tuple[BinaryIO, str]]:
    """A file that can seek, and its name. A file on this machine is opened where it is."""
    path = _path(source)
    if path is None or not _there(path):
        # Also the line for what is no file, or empty.
        data, name = read_source(source, what="video", allow_urls=allow_urls, max_bytes=MAX_BYTES)
        yield io.BytesIO(data), name
        return
    name = short_name(str(path))
    try:
        file = path.open("rb")
    except OSError as e:
        raise MediaError(f"{name} cannot be read ({e.strerror or e})") from None
    with file:
        yield file, name


def _there(path: Path) -> bool:
    try:
        return path.is_file() and path.stat().st_size > 0
    except (OSError, ValueError):  # ValueError: a zero byte in the name
        return False


def _path(source: Any) -> Path | None:
    if isinstance(source, Bytes):
        return None
    text = os.fspath(source)
    scheme = urlsplit(text).scheme.lower() if isinstance(source, str) and ":" in text[:8] else ""
    if scheme in ("data", "http", "https"):
        return None
    return path_of_url(text) if scheme == "file" else Path(text).expanduser()


def _refuse_pictures(file: BinaryIO, name: str) -> None:
    """Raises MediaError for a file that is a picture. An animated GIF or PNG is none."""
    from PIL import Image

    head = file.read(16)
    file.seek(0)
    frames, kind = 0, "HEIF"
    if not (head[4:8] == b"ftyp" and head[8:12] in HEIC_BRANDS):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = Image.open(file, formats=formats())
                # A GIF's frames are only counted by reading them all.
                frames = 1 + getattr(found, "is_animated", False)
                kind = found.format
        except Exception:  # no picture: whatever a plugin raises, PyAV has the word
            return
    if frames > 1 and kind not in ("GIF", "PNG"):
        raise MediaError(f"{name} is an animated {kind}, which is not read as a video; convert it to mp4 or gif")
    if frames <= 1:
        raise MediaError(f"{name} is a still picture, not a video; give it as an image")
