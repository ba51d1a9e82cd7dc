"""Sound files in, clips the audio tower hears out.

Owns: reading wav, aiff, flac, mp3 and ogg (vorbis) through miniaudio, m4a and aac through macOS's `afconvert`, and
those elsewhere, opus, webm and the sound of videos through PyAV where it is installed; one line for everything that
cannot be heard; any channels and rate to mono at 16 kHz; cutting what is longer than the tower hears at once into
overlapping windows. Leaves the bytes of a source to `sources.py`, PyAV to `container.py`, features to `mel.py` and the
network to `models/audio.py`.
"""

import io
import math
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .mel import FRAMES_PER_TOKEN, SAMPLE_RATE, SAMPLES_PER_TOKEN, SHORTEST, log_mel
from .resample import resample
from .sources import Bytes, MediaError, read_source

if TYPE_CHECKING:
    import miniaudio

# What the tower was trained to hear at once: 750 tokens. Source: transformers `processing_gemma4.py: audio_seq_length`,
# `feature_extraction_gemma4.py: max_length`, where the rest is cut away.
WINDOW_SECONDS = 30
# What two neighbouring windows share, so that a word at the seam is whole in one of them.
OVERLAP_SECONDS = 2
# More soft tokens than the context of E2B and E4B holds (131,072) are refused before they are decoded.
MAX_SECONDS = 131_072 * SAMPLES_PER_TOKEN // SAMPLE_RATE
MAX_BYTES = 2 << 30
# Sound that never leaves the last of 16 bits is none.
SILENCE = 2.0**-15

READS = "wav, aiff, flac, mp3 or ogg (vorbis)"


@dataclass(frozen=True, eq=False)
class Sound:
    """Decoded sound: `samples` float32 [n], mono, 16 kHz, around [-1, 1]; `name` is what messages call it."""

    samples: np.ndarray
    name: str = "the sound"

    @property
    def seconds(self) -> float:
        return len(self.samples) / SAMPLE_RATE


@dataclass(frozen=True, eq=False)
class ProcessedClip:
    """One thing to hear: features of at most 30 s, and where in its sound they lie."""

    mel: np.ndarray  # float32 [T, 128]
    start: float  # seconds
    stop: float
    name: str = "the sound"

    @property
    def tokens(self) -> int:
        """Soft tokens it becomes, and placeholders it needs in the prompt."""
        return math.ceil(len(self.mel) / FRAMES_PER_TOKEN)


def read_sound(
    source: str | os.PathLike[str] | Bytes | np.ndarray, *, rate: int | None = None, allow_urls: bool = False
) -> Sound:
    """Sound from what `sources.read_source` takes (paths, URLs, a file's bytes), or from samples and their rate.

    source: an array is float in [-1, 1] or signed integers, [n] or [n, channels], `rate` times a second. Channels are
    averaged.

    Raises MediaError, one line, for what is not there, empty, not sound, cut short, silent, shorter than 10 ms or
    longer than the context, and where a decoder is missing.
    """
    if isinstance(source, np.ndarray):
        name = "the sound"
        mono, rate = _mono(source, name), _check_rate(rate, name)
    else:
        data, name = read_source(source, what="sound", allow_urls=allow_urls, max_bytes=MAX_BYTES)
        mono, rate = _decode(data, name)
    if not np.isfinite(mono).all():
        raise MediaError(f"{name} holds samples that are no numbers; export it again")
    _check_length(len(mono) / rate, name)
    samples = resample(mono, rate, SAMPLE_RATE)
    if len(samples) < SHORTEST:
        raise MediaError(f"{name} is too short to hear ({len(samples) / 16:.1f} ms); give at least 10 ms of sound")
    if np.abs(samples).max() <= SILENCE:
        raise MediaError(f"{name} is silent: {len(samples) / SAMPLE_RATE:.1f} s without a sound; check the recording")
    return Sound(samples, name)


def clips_of(sound: Sound) -> list[ProcessedClip]:
    """What the tower hears of a sound: one clip, or overlapping windows of equal length where it lasts over 30 s.

    Every sample is in a window and neighbours share 2 s. `describe` says what was done; show it.
    """
    out = []
    for start, stop in windows(len(sound.samples)):
        features = log_mel(sound.samples[start:stop])
        out.append(ProcessedClip(features, start / SAMPLE_RATE, stop / SAMPLE_RATE, sound.name))
    return out


def windows(samples: int) -> list[tuple[int, int]]:
    """(start, stop) of the windows of a sound of so many samples at 16 kHz; starts lie on whole tokens."""
    most, overlap = WINDOW_SECONDS * SAMPLE_RATE, OVERLAP_SECONDS * SAMPLE_RATE
    if samples <= most:
        return [(0, samples)]
    count = math.ceil((samples - overlap) / (most - overlap))
    # Rounded up to tokens: no window becomes longer than `most`, because most - overlap is whole tokens, too.
    seams = [-(-i * (samples - overlap) // (count * SAMPLES_PER_TOKEN)) * SAMPLES_PER_TOKEN for i in range(count)]
    return [(a, b + overlap) for a, b in zip(seams, [*seams[1:], samples - overlap], strict=True)]


def describe(clips: Sequence[ProcessedClip]) -> str | None:
    """The line for the user when a sound became several windows; None when it is heard as it is.

    clips: those of one sound, as `clips_of` returns them.
    """
    if len(clips) < 2:
        return None
    longest = max(clip.stop - clip.start for clip in clips)
    return (
        f"{clips[0].name} lasts {clock(clips[-1].stop)} and the model hears {WINDOW_SECONDS} s at once: it gets "
        f"{len(clips)} windows of {longest:.0f} s that overlap by {OVERLAP_SECONDS} s, "
        f"{sum(clip.tokens for clip in clips):,} tokens in all"
    )


def clock(seconds: float) -> str:
    """ "45.0 s", "1:05" or "1:02:05" """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _mono(samples: np.ndarray, name: str) -> np.ndarray:
    """float32 [n] from [n] or [n, channels]; integers are scaled to [-1, 1)."""
    if samples.dtype.kind not in "fi" or samples.ndim not in (1, 2) or 0 in samples.shape[1:]:
        raise MediaError(
            f"{name} is an array of {samples.dtype} {list(samples.shape)}; "
            "give floats or signed integers of shape [samples] or [samples, channels]"
        )
    if not len(samples):
        raise MediaError(f"{name} is empty (0 samples)")
    scale = 1.0 if samples.dtype.kind == "f" else 1.0 / (np.iinfo(samples.dtype).max + 1.0)
    mono = samples if samples.ndim == 1 else samples.mean(axis=1, dtype=np.float64)
    return (mono * scale).astype(np.float32)


def _check_rate(rate: int | None, name: str) -> int:
    if rate is None or not 1000 <= rate <= 1_000_000 or int(rate) != rate:
        raise MediaError(f"{name} needs its sample rate, 1,000 to 1,000,000 a second; got {rate}")
    return int(rate)


def _check_length(seconds: float, name: str) -> None:
    if seconds > MAX_SECONDS:
        raise MediaError(
            f"{name} lasts {clock(seconds)}, more than the model's context holds ({clock(MAX_SECONDS)}); cut it"
        )


def _decode(data: bytes, name: str) -> tuple[np.ndarray, int]:
    """Mono float32 samples at the file's own rate, and that rate."""
    kind = _kind(data)
    if kind is None:
        raise MediaError(f"{name} is no sound file; give {READS}")
    if kind not in ("wav", "flac", "mp3", "vorbis"):
        tool = shutil.which("afconvert") if kind in ("m4a", "aac", "caf") else None
        if tool is None:
            return _container_decode(data, kind, name)
        data, kind = _platform_decode(tool, data, kind, name), "wav"
    try:
        import miniaudio
    except ImportError:
        raise MediaError("sound needs the package miniaudio; install it with: pip install miniaudio") from None
    try:
        info = getattr(miniaudio, f"{kind}_get_info")(data)
    except miniaudio.MiniaudioError:
        raise MediaError(f"{name} starts like {kind} but cannot be decoded; it is damaged or cut short") from None
    rate, channels, promised = _check_rate(info.sample_rate, name), info.nchannels, info.num_frames
    _check_length(promised / rate, name)
    parts, found = [], 0
    try:
        for part in _stream(data, info):
            parts.append(part.reshape(-1, channels).mean(axis=1, dtype=np.float32))
            found += len(parts[-1])
            _check_length(found / rate, name)
    except miniaudio.MiniaudioError:
        raise MediaError(f"{name} is damaged after {found / rate:.1f} s; export or download it again") from None
    _check_whole(data, kind, promised, found, rate, name)
    if not found:
        raise MediaError(f"{name} is empty (0 samples); record it again")
    return np.concatenate(parts), rate


def _stream(data: bytes, info: "miniaudio.SoundFileInfo") -> Iterator[np.ndarray]:
    """Interleaved float32 samples, a piece at a time, at the file's own rate."""
    import miniaudio

    pieces = miniaudio.stream_memory(
        data, miniaudio.SampleFormat.FLOAT32, info.nchannels, info.sample_rate, frames_to_read=1 << 16
    )
    for piece in pieces:
        yield np.frombuffer(piece, np.float32)


def _check_whole(data: bytes, kind: str, promised: int, found: int, rate: int, name: str) -> None:
    """Raises MediaError when a file holds less sound than it says."""
    if kind == "wav":
        whole = _wav_is_whole(data) and found >= promised
    elif kind == "vorbis":
        whole = promised > 0  # the length stands in the last page
    else:
        # An mp3's count may be a frame or two off; 0 is a stream whose length nobody knew.
        whole = found >= promised - (2 * 1152 if kind == "mp3" else 0)
    if not whole:
        of = f" of {promised / rate:.1f} s" if promised > found else ""
        raise MediaError(f"{name} is cut short: {found / rate:.1f} s{of} are there; copy or download it again")


def _wav_is_whole(data: bytes) -> bool:
    """Whether all of a RIFF file's samples are there; miniaudio takes what it finds."""
    if data[:4] != b"RIFF":
        return True  # miniaudio's count is the header's
    at = 12
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] == b"data":
            # Programs that write into a pipe put 0 or nearly the largest number.
            return size == 0 or size > 0x7FFF0000 or at + 8 + size <= len(data)
        at += 8 + size + size % 2
    return False


def _kind(data: bytes) -> str | None:
    """What a file is, by its first bytes: what miniaudio decodes (wav, flac, mp3, vorbis), another name, or None."""
    if data[:4] in (b"RIFF", b"RIFX", b"RF64") and data[8:12] == b"WAVE":
        return "wav"
    if data[:4] == b"FORM" and data[8:12] in (b"AIFF", b"AIFC"):
        return "wav"  # the same decoder
    if data[:4] == b"fLaC":
        return "flac"
    if data[:4] == b"OggS":
        return "vorbis" if b"\x01vorbis" in data[:128] else "opus" if b"OpusHead" in data[:128] else "ogg"
    if data[4:8] == b"ftyp":
        return "m4a"
    if data[:4] == b"caff":
        return "caf"
    if data[:4] == b"\x1a\x45\xdf\xa3":
        return "webm"
    if len(data) > 1 and data[0] == 0xFF and data[1] & 0xF6 == 0xF0:
        return "aac"
    if data[:3] == b"ID3" or (len(data) > 1 and data[0] == 0xFF and data[1] & 0xE6 == 0xE2):
        return "mp3"
    return None


def _container_decode(data: bytes, kind: str, name: str) -> tuple[np.ndarray, int]:
    """Mono float32 samples and their rate from what miniaudio does not decode, through PyAV."""
    from .container import INSTALL, Clip, available

    if not available():
        file = shlex.quote(name if Path(name).suffix else f"sound.{kind}")
        raise MediaError(
            f"{name} is {kind}, which needs the decoder PyAV: {INSTALL}; or convert it: ffmpeg -i {file} sound.wav"
        )
    parts, found, rate = [], 0, 0
    for part, rate in Clip(io.BytesIO(data), name, "sound").sound():
        parts.append(part)
        found += len(part)
        _check_length(found / rate, name)
    if not found:
        raise MediaError(f"{name} holds no sound; record or export it again")
    return np.concatenate(parts), rate


def _platform_decode(tool: str, data: bytes, kind: str, name: str) -> bytes:
    """A wav file from what the operating system decodes and miniaudio does not."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, f"in.{kind}"), Path(folder, "out.wav")
        source.write_bytes(data)
        command = [tool, "-f", "WAVE", "-d", "LEF32", str(source), str(target)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode or not target.is_file():
            why = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
            raise MediaError(f"{name} cannot be decoded by afconvert ({why}); it may be damaged, or hold no sound")
        return target.read_bytes()
