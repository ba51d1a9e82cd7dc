"""Files with frames and sound in them (mp4, mov, webm, mkv, ...), read through PyAV, the package `av`.

Owns everything that knows PyAV: opening without letting a file name other files, where the frames lie, decoding those
that are wanted and nothing else, turning them upright, and the sound. Memory holds a few frames, however long a clip
is. Leaves the choice of frames to `video.py` and what becomes of sound to `audio.py`.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np

from .images import open_image
from .sources import MediaError

if TYPE_CHECKING:
    from PIL import Image

# More than 8K has; checked on the header.
MAX_PIXELS = 8192 * 8192
# Up to this many frames ahead are reached by decoding on, for a seek throws away what the decoder's threads hold.
_NEAR = 16
# How many key frames further back a seek is tried again; the last is the beginning.
_BACK = (0, 1, 8, 1 << 40)
# No playlists and no lists of files, with which a file could have others opened, or addresses on the network.
_CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,gif,apng,avi,mpegts,mpeg,mpegvideo,flv,live_flv,asf,ogg,mxf,nut,ivf,h264,"
    "hevc,obu,m4v,dv,wav,aiff,mp3,flac,aac,caf"
)
# Containers whose header says how long they last.
_TIMED = ("mov", "matroska", "avi")
_REFUSED = {
    "video": "is no video, or damaged or cut short; mp4, mov, webm, mkv, avi and animated gif are read",
    "sound": "cannot be decoded; it is damaged or cut short, or holds no sound",
}
# Frames a second where nothing says. Source: transformers `processing_gemma4.py: replace_video_token`.
UNKNOWN_RATE = 24

INSTALL = "pip install 'mlx-gemma4[video]'"


class Unindexed(Exception):
    """The packets do not tell where the frames are; `Clip.count` finds out."""


@dataclass(frozen=True, eq=False)
class Index:
    """Where the frames of a clip lie, in the order they are shown."""

    times: np.ndarray  # int64 [frames], ascending, in `unit` seconds
    keys: np.ndarray  # int64, the times decoding can start at; none where frames must be counted
    unit: Fraction
    duration: float  # seconds, from the first frame's beginning to the last one's end
    rate: float  # frames a second, on average
    width: int  # as stored, before the clip is turned upright
    height: int

    def __len__(self) -> int:
        return len(self.times)

    @cached_property
    def seconds(self) -> np.ndarray:
        """float64 [frames], after the first."""
        return (self.times - self.times[0]) * float(self.unit)

    @cached_property
    def even(self) -> bool:
        """Whether no frame lies half a frame or more from where an even rate has it."""
        return bool(np.abs(self.seconds * self.rate - np.arange(len(self))).max() < 0.5)


class Clip:
    """An open file, wanted for its frames ("video") or its sound. `file` must be able to seek and stays open.

    Raises MediaError where PyAV is missing.
    """

    def __init__(self, file: BinaryIO, name: str, kind: Literal["video", "sound"] = "video"):
        self.file, self.name, self.kind = file, name, kind
        if not available():
            raise MediaError(f"{name} needs the decoder PyAV; install it with: {INSTALL}")

    def scan(self) -> Index:
        """Reads the whole file and decodes none of it.

        Raises MediaError for what is no video, has no frames, is cut short or of an absurd size; Unindexed where
        packets lack times.
        """
        times, keys, end, whole = [], [], 0.0, True
        latest, last = -(1 << 63), 0
        with self._open() as container, self._told():
            stream = self._frames_of(container)
            kind = container.format.name.partition(",")[0]
            for packet in container.demux(list(container.streams)):
                if not packet.size:
                    continue
                if packet.pts is not None and packet.time_base is not None:
                    end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                if packet.stream.index != stream.index:
                    continue
                whole = not packet.is_corrupt
                if packet.is_discard:
                    continue
                if packet.pts is None:
                    raise Unindexed
                if packet.pts >= latest:
                    latest, last = packet.pts, packet.duration or 0
                times.append(packet.pts)
                if packet.is_keyframe:
                    keys.append(packet.pts)
            promised = (container.duration or 0) / 1e6
            there = end - min(0.0, (container.start_time or 0) / 1e6)
            if kind in _TIMED and (not whole or _lacks(there, promised)):
                raise self._cut_short(there, promised)
            if kind == "gif" and not self._ends_with(b";"):
                raise MediaError(f"{self.name} is cut short after {len(times)} frames; copy or download it again")
            ordered, starts = np.sort(np.array(times, np.int64)), np.sort(np.array(keys, np.int64))
            return self._index(stream, ordered, starts, last)

    def count(self) -> Index:
        """Decodes all frames, one at a time, where `scan` cannot tell how many there are."""
        times, timed = [], True
        with self._open() as container, self._told():
            stream = self._frames_of(container)
            for frame in container.decode(stream):
                timed = timed and frame.pts is not None and (not times or frame.pts > times[-1])
                times.append(frame.pts if timed else len(times))
            found = np.array(times, np.int64)
            if timed:
                return self._index(stream, found, np.empty(0, np.int64), 0)
            rate = stream.average_rate or Fraction(UNKNOWN_RATE)
            return self._index(stream, np.arange(len(times)), np.empty(0, np.int64), 0, unit=1 / rate)

    def frames(self, index: Index, wanted: Sequence[int]) -> "Iterator[Image.Image]":
        """The frames of these numbers, ascending and each once, as upright RGB pictures.

        Decodes from the key frame before each. Raises Unindexed where a frame is not found where `index` has it.
        """
        if not len(index.keys):
            yield from self._counted(wanted)
            return
        with self._open() as container, self._told():
            stream = self._frames_of(container)
            frames, at = container.decode(stream), -1  # `at`: the number of the last frame decoded
            for number in wanted:
                time = int(index.times[number])
                place = int(np.searchsorted(index.keys, time, "right")) - 1
                frame = None
                if place < 0 or np.searchsorted(index.times, index.keys[place]) <= at + _NEAR:
                    frame = _reach(frames, time)
                for back in _BACK if frame is None else ():
                    # Some containers seek to nearly where they are asked to.
                    container.seek(int(index.keys[max(0, place - back)]), stream=stream)
                    frames = container.decode(stream)
                    frame = _reach(frames, time, from_key=True)
                    if frame is not None:
                        break
                if frame is None:
                    raise Unindexed
                yield self._upright(frame)
                at = number

    def sound(self) -> Iterator[tuple[np.ndarray, int]]:
        """Pieces of the soundtrack, mono float32, each with its rate; nothing where there is none.

        Channels are averaged, as `audio.py` does. Raises MediaError for one that is damaged or cannot be decoded.
        """
        av = _av()

        with self._open() as container:
            stream = container.streams.best("audio")
            if stream is None:
                return
            what = self.name if self.kind == "sound" else f"the sound of {self.name}"
            if not isinstance(stream, av.AudioStream) or stream.codec_context is None:
                raise MediaError(f"{what} is coded in a way that PyAV does not decode; convert it to AAC")
            plain = av.AudioResampler(format="fltp")  # rate and channels stay
            end = 0.0
            with self._told(lambda: f"{what} is damaged after {end:.1f} s"):
                for frame in container.decode(stream):
                    for piece in plain.resample(frame):
                        # By its time, not by its samples: where nothing was recorded there are none.
                        end = max(end, (piece.time or 0) + piece.samples / piece.sample_rate)
                        yield piece.to_ndarray().mean(axis=0, dtype=np.float32), piece.sample_rate
                promised = float((stream.duration or 0) * (stream.time_base or 0))
                if not container.streams.video:
                    promised = promised or (container.duration or 0) / 1e6
            if container.format.name.partition(",")[0] in _TIMED and _lacks(end, promised):
                raise self._cut_short(end, promised)

    # What the methods above share

    def _cut_short(self, there: float, promised: float) -> MediaError:
        of = f" of {promised:.1f} s" if promised > there else ""
        return MediaError(f"{self.name} is cut short: {there:.1f} s{of} are there; copy or download it again")

    @contextmanager
    def _open(self) -> Iterator[Any]:
        av = _av()

        self.file.seek(0)
        try:
            container = av.open(self.file, "r", options={"format_whitelist": _CONTAINERS})
        except _errors():
            raise MediaError(f"{self.name} {_REFUSED[self.kind]}") from None
        with container:
            yield container

    @contextmanager
    def _told(self, line: Callable[[], str] | None = None) -> Iterator[None]:
        """Whatever a decoder raises, as one line."""
        try:
            yield
        except _errors() as e:
            why = f" ({reason})" if (reason := getattr(e, "strerror", None)) else ""
            raise MediaError(f"{line() if line else f'{self.name} is damaged'}{why}; export it again") from None

    def _frames_of(self, container: Any) -> Any:
        av = _av()
        kinds = av.stream.Disposition
        still = kinds.attached_pic | kinds.timed_thumbnails
        stream = container.streams.best("video")
        if stream is None or stream.disposition & still:
            if container.streams.audio:
                raise MediaError(f"{self.name} holds sound and no frames; give it as sound")
            raise MediaError(f"{self.name} holds no frames; export it again")
        if not isinstance(stream, av.VideoStream) or stream.codec_context is None:
            raise MediaError(f"{self.name} is coded in a way that PyAV does not decode; convert it to H.264")
        width, height = stream.width, stream.height
        if not width * height:
            raise MediaError(f"{self.name} does not say how large its frames are; it is damaged, or cut short")
        if width * height > MAX_PIXELS:
            mega = f"{width * height / 1e6:.0f} megapixels"
            raise MediaError(
                f"{self.name} has frames of {width} x {height}, {mega}; "
                f"at most {MAX_PIXELS // 10**6} are read: scale it down"
            )
        # Also where the size changes on the way.
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        stream.thread_type = "AUTO"
        return stream

    def _index(
        self, stream: Any, times: np.ndarray, keys: np.ndarray, last: int, unit: Fraction | None = None
    ) -> Index:
        """last: how long the last frame stays, in units; 0 where that is not known."""
        step: Fraction = unit or stream.time_base or Fraction(1)
        if not len(times):
            raise MediaError(f"{self.name} holds no frames; export it again")
        if len(np.unique(times)) < len(times):
            raise Unindexed
        said = float(stream.average_rate or 0)
        span = float((int(times[-1]) - int(times[0])) * step)
        stays = float(last * step) or (1 / said if said else span / max(1, len(times) - 1)) or 1 / UNKNOWN_RATE
        duration = span + stays
        rate = len(times) / duration
        # The header's is the exact fraction, where it is true of these frames.
        if said and abs(len(times) / said - duration) <= max(2 / said, 0.01 * duration):
            rate = said
        return Index(times, keys, step, duration, rate, stream.width, stream.height)

    def _counted(self, wanted: Sequence[int]) -> "Iterator[Image.Image]":
        rest = iter(wanted)
        number = next(rest, None)
        with self._open() as container, self._told():
            for i, frame in enumerate(container.decode(self._frames_of(container))):
                if number is None:
                    return
                if i == number:
                    yield self._upright(frame)
                    number = next(rest, None)
        if number is not None:
            raise MediaError(f"{self.name} has fewer frames than before; was it changed while it was read?")

    def _ends_with(self, mark: bytes) -> bool:
        """Whether these bytes are among the last few."""
        self.file.seek(0, 2)
        self.file.seek(max(0, self.file.tell() - 64))
        return mark in self.file.read()

    def _upright(self, frame: Any) -> "Image.Image":
        from PIL import Image

        clear = any(part.is_alpha for part in frame.format.components) or frame.format.name == "pal8"
        # Over white, as pictures are, where something can be seen through.
        pixels = frame.to_ndarray(format="rgba" if clear else "rgb24")
        image = open_image(pixels) if clear else Image.fromarray(pixels)
        turn = _turn(frame)
        return image if turn is None else image.transpose(turn)


def _lacks(there: float, promised: float) -> bool:
    """Whether so many seconds of those promised are too few; headers are off by a frame or two of sound."""
    return promised - there > max(0.2, min(1.0, 0.05 * promised))


def _reach(frames: Iterator[Any], time: int, from_key: bool = False) -> Any:
    """The frame of this time, decoding on; None where it has passed, or does not come.

    from_key: None, too, where what comes first is no key frame, after a seek, and would be decoded from nothing.
    """
    for frame in frames:
        if frame.pts is None or frame.pts > time or (from_key and not frame.key_frame):
            return None
        if frame.pts == time:
            return frame
        from_key = False
    return None


def _turn(frame: Any) -> "Image.Transpose | None":
    """How a frame becomes upright, from its display matrix: quarter turns and mirrors; other angles are left."""
    from PIL import Image

    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return None
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    # (x, y) is shown at (a x + c y, b x + d y), y pointing down.
    turn, straight = Image.Transpose, abs(a) >= abs(b)
    first, second = (a > 0, d > 0) if straight else (b > 0, c > 0)
    if straight:
        return {
            (True, True): None,
            (False, True): turn.FLIP_LEFT_RIGHT,
            (True, False): turn.FLIP_TOP_BOTTOM,
            (False, False): turn.ROTATE_180,
        }[first, second]
    return {
        (True, True): turn.TRANSPOSE,
        (True, False): turn.ROTATE_270,
        (False, True): turn.ROTATE_90,
        (False, False): turn.TRANSVERSE,
    }[first, second]


def _av() -> Any:
    """PyAV: an extra, so no import statement."""
    return importlib.import_module("av")


def _errors() -> tuple[type[Exception], ...]:
    """What PyAV raises at damaged data: its own, and LookupError where a stream turns up that no header named."""
    return (_av().error.FFmpegError, LookupError, ValueError, ArithmeticError, MemoryError)


def available() -> bool:
    """Whether PyAV is installed."""
    return importlib.util.find_spec("av") is not None
