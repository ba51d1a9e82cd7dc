"""Sound files to clips: every format, rate and channel count; windows over 30 s; one line for what cannot be heard."""

import io
import itertools
import struct
import sys
import wave
from pathlib import Path

import audio_cases as cases
import numpy as np
import pytest
import recipe
from optional import optional

from mlx_gemma4.media import audio, container
from mlx_gemma4.media.audio import Sound, clips_of, describe, read_sound, windows
from mlx_gemma4.media.mel import token_count
from mlx_gemma4.media.resample import resample
from mlx_gemma4.media.sources import MediaError


def tone(hertz: float, rate: int, seconds: float, level: float = 0.5) -> np.ndarray:
    return level * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)


def wav(samples: np.ndarray, rate: int, width: int = 2) -> bytes:
    """PCM of `width` bytes from floats [n] or [n, channels]."""
    samples = samples[:, None] if samples.ndim == 1 else samples
    whole = np.round(samples * (2 ** (8 * width - 1) - 1)).astype(np.int64)
    if width == 1:
        raw = (whole + 128).astype(np.uint8).tobytes()
    else:
        raw = whole.astype("<i8").view(np.uint8).reshape(*samples.shape, 8)[..., :width].tobytes()
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(raw)
    return out.getvalue()


def float_wav(samples: np.ndarray, rate: int) -> bytes:
    raw = samples.astype("<f4").tobytes()
    chunks = struct.pack("<4sIHHIIHH", b"fmt ", 16, 3, 1, rate, rate * 4, 4, 32)
    chunks += struct.pack("<4sI", b"data", len(raw)) + raw
    return struct.pack("<4sI4s", b"RIFF", 4 + len(chunks), b"WAVE") + chunks


def strength(samples: np.ndarray, hertz: float) -> float:
    """Amplitude of one frequency in mono sound at 16 kHz, its ends left out."""
    inner = samples[800:-800]
    angles = 2j * np.pi * hertz * np.arange(len(inner)) / 16_000
    window = np.hanning(len(inner))
    return float(2 * np.abs((inner * window * np.exp(-angles)).sum()) / window.sum())


def fails(source, match: str, **options) -> str:
    with pytest.raises(MediaError, match=match) as error:
        read_sound(source, **options)
    text = str(error.value)
    assert "\n" not in text and len(text) < 300
    return text


# What is read


@pytest.mark.parametrize("suffix", ["flac", "mp3", "ogg"])
def test_compressed_files(suffix):
    """440 Hz on the left, 880 Hz on the right: half as loud each, and as long as they were."""
    sound = read_sound(cases.FOLDER / f"tones.{suffix}")
    assert sound.samples.dtype == np.float32 and abs(sound.seconds - 0.3) < 1e-3
    assert strength(sound.samples, 440) == pytest.approx(0.25, rel=0.02)
    assert strength(sound.samples, 880) == pytest.approx(0.25, rel=0.02)
    assert strength(sound.samples, 660) < 0.005


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_wav_widths(width):
    x = cases.sound(8_000)
    found = read_sound(wav(x, 16_000, width)).samples
    assert len(found) == 8_000 and np.abs(found - x).max() <= 2 / 2 ** (8 * min(width, 3) - 1)


def test_float_wav_is_read_as_it_is():
    x = cases.sound(8_000)
    assert np.array_equal(read_sound(float_wav(x, 16_000)).samples, x)


@pytest.mark.parametrize("channels", [1, 2, 3, 6, 8])
def test_channels_are_averaged(channels):
    x = np.stack([tone(200 * (i + 1), 16_000, 0.5) for i in range(channels)], axis=1)
    found = read_sound(wav(x, 16_000)).samples
    assert np.abs(found - x.mean(axis=1)).max() < 1e-4
    assert np.abs(read_sound(x, rate=16_000).samples - x.mean(axis=1)).max() < 1e-6


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000, 192_000])
def test_rates(rate):
    x = tone(440, rate, 0.5) + tone(3_000, rate, 0.5, 0.1)
    sound = read_sound(wav(x, rate, 3))
    assert len(sound.samples) == -(-len(x) * 16_000 // rate)
    truth = tone(440, 16_000, 0.6) + tone(3_000, 16_000, 0.6, 0.1)
    inner = slice(400, -400)
    assert np.abs(sound.samples[inner] - truth[: len(sound.samples)][inner]).max() < 1e-5


@pytest.mark.parametrize("spelling", ["path", "string", "address", "bytes"])
def test_sources(tmp_path, spelling):
    path = tmp_path / "a file, with spaces.wav"
    path.write_bytes(wav(cases.sound(1_600), 16_000))
    source = {"path": path, "string": str(path), "address": path.as_uri(), "bytes": path.read_bytes()}[spelling]
    assert len(read_sound(source).samples) == 1_600


def test_arrays():
    x = cases.sound(4_000)
    assert np.array_equal(read_sound(x, rate=16_000).samples, x)
    integers = np.round(x * 32_767).astype(np.int16)
    assert np.abs(read_sound(integers, rate=16_000).samples - x).max() < 1e-4
    fails(x, "sample rate")
    fails(x, "sample rate", rate=12)
    fails(x.astype(np.complex64), "complex64", rate=16_000)
    fails(x.reshape(2, 20, 100), r"\[2, 20, 100\]", rate=16_000)
    fails(np.zeros(0, np.float32), "empty", rate=16_000)


def test_a_pipe_s_wav_without_length():
    """Programs that cannot go back leave the largest number, or 0 in both places."""
    data = bytearray(wav(cases.sound(1_600), 16_000))
    data[4:8] = data[40:44] = b"\xff" * 4
    assert len(read_sound(bytes(data)).samples) == 1_600


# Rates


@pytest.mark.parametrize(("rate", "target"), [(44_100, 16_000), (48_000, 16_000), (8_000, 16_000), (12_345, 16_000)])
def test_resample_lets_sound_through_and_nothing_else(rate, target):
    top = min(rate, target) / 2
    for hertz in (50, 1_000, 0.9 * top):
        found = resample(tone(hertz, rate, 1.0).astype(np.float32), rate, target)
        truth = tone(hertz, target, 1.0)
        assert np.abs(found[1_600:-1_600] - truth[: len(found)][1_600:-1_600]).max() < 1e-5  # -94 dB
    if rate > target:
        for hertz in (1.0 * top + 10, 1.1 * top):
            found = resample(tone(hertz, rate, 1.0).astype(np.float32), rate, target)
            assert np.abs(found[1_600:-1_600]).max() < 1e-5
    constant = resample(np.ones(rate, np.float32), rate, target)
    assert np.abs(constant[1_600:-1_600] - 1).max() < 1e-5


def test_resample_is_the_same_in_blocks(monkeypatch):
    x = cases.sound(30_000)
    whole = resample(x, 44_100, 16_000)
    monkeypatch.setattr("mlx_gemma4.media.resample.BLOCK", 7)
    assert np.abs(resample(x, 44_100, 16_000) - whole).max() < 1e-6


# Longer than 30 s


@pytest.mark.parametrize(
    "samples",
    [1, 16_000, 480_000, 480_001, 496_000, 927_999, 928_000, 928_001, 5_000_001, 30_000_000, 83_000_000]
    + [480_000 + 91_733 * i for i in range(1, 40)],
)
def test_windows(samples):
    found = windows(samples)
    assert found[0][0] == 0 and found[-1][1] == samples
    lengths = [stop - start for start, stop in found]
    assert max(lengths) <= 480_000, "the tower was not trained on more"
    assert len(found) == 1 or len(found) == -(-(samples - 32_000) // 448_000), "no more windows than needed"
    for (_, stop), (start, _) in itertools.pairwise(found):
        assert stop - start == 32_000, "neighbours share two seconds"
        assert start % 640 == 0, "windows start on whole tokens"
    assert max(lengths) - min(lengths) <= 640 * len(found) and min(lengths) * 2 > max(lengths) - 640
    assert sum(map(token_count, lengths)) <= (samples / 640 + 50 * len(found)) + 1


def test_31_seconds_are_two_windows_and_the_user_is_told():
    sound = Sound(cases.sound(31 * 16_000), "talk.mp3")
    clips = clips_of(sound)
    assert [(c.start, c.stop) for c in clips] == [(0, 16.52), (14.52, 31)]
    assert [c.tokens for c in clips] == [413, 412]
    assert describe(clips) == (
        "talk.mp3 lasts 31.0 s and the model hears 30 s at once: "
        "it gets 2 windows of 17 s that overlap by 2 s, 825 tokens in all"
    )
    assert np.array_equal(clips[1].mel[1:], clips_of(Sound(sound.samples[14 * 16_000 + 8_320 :]))[0].mel[1:])


def test_30_seconds_are_one_and_nobody_is_told():
    for seconds in (0.2, 1, 10, 29.9, 30):
        (clip,) = clips_of(Sound(cases.sound(round(seconds * 16_000))))
        assert describe([clip]) is None and clip.start == 0 and clip.stop == seconds
        assert clip.tokens == token_count(round(seconds * 16_000))


def test_describe_minutes():
    clips = clips_of(Sound(cases.sound(150 * 16_000), "song.flac"))
    assert describe(clips).startswith("song.flac lasts 2:30 and the model hears 30 s at once: it gets 6 windows of ")


# What cannot be heard


def test_not_there(tmp_path):
    fails(tmp_path / "none.wav", "there is no file .*none.wav")
    fails(tmp_path, "is a folder")
    (tmp_path / "zero.wav").touch()
    fails(tmp_path / "zero.wav", r"empty \(0 bytes\)")


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n" + bytes(100), b"hello, world", b"x", bytes(1000)])
def test_not_sound(content):
    assert "flac, mp3 or ogg" in fails(content, "is no sound file")


@pytest.mark.parametrize(
    "head", [b"RIFF\0\0\0\0WAVE", b"fLaC", b"OggS" + bytes(24) + b"\x01vorbis", b"ID3", b"\xff\xfb"]
)
def test_heads_with_nothing_behind(head):
    fails(head + b"\x00" * 400, "damaged|cut short|empty")


@pytest.mark.parametrize("part", [0.02, 0.3, 0.6, 0.98])
@pytest.mark.parametrize("suffix", ["wav", "float.wav", "flac", "mp3", "ogg"])
def test_cut_short(suffix, part):
    """Never half of a recording as if it were all of it."""
    x = cases.sound(16_000)
    made = {"wav": lambda: wav(x, 16_000), "float.wav": lambda: float_wav(x, 16_000)}
    data = made[suffix]() if suffix in made else (cases.FOLDER / f"tones.{suffix}").read_bytes()
    if suffix == "mp3" and part == 0.98:
        return  # less than the two frames by which an honest file's count may be off
    fails(data[: int(part * len(data))], "cut short|damaged")


def test_damaged_in_the_middle():
    """Noise over a flac's frames is found by its checksums."""
    data = bytearray((cases.FOLDER / "tones.flac").read_bytes())
    data[len(data) // 2 :] = recipe_noise(len(data) - len(data) // 2)
    fails(bytes(data), "cut short|damaged")


def recipe_noise(count: int) -> bytes:
    return (recipe.uniform("noise", (count,), 1) * 256).astype(np.uint8).tobytes()


@pytest.mark.parametrize("level", [0.0, 2.0**-15, -(2.0**-15)])
def test_silent(level):
    fails(np.full(16_000, level, np.float32), "is silent: 1.0 s", rate=16_000)
    fails(wav(np.zeros(8_000), 16_000), "is silent")
    read_sound(np.full(16_000, 2.0**-14, np.float32), rate=16_000)


@pytest.mark.parametrize("samples", [1, 80, 160])
def test_too_short(samples):
    fails(np.ones(samples, np.float32), "too short", rate=16_000)
    assert clips_of(read_sound(np.ones(161, np.float32), rate=16_000))[0].tokens == 1


def test_no_samples():
    fails(wav(np.zeros(0), 16_000), "empty|damaged")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_no_numbers(bad):
    x = cases.sound(3_200).copy()
    x[77] = bad
    fails(x, "no numbers", rate=16_000)
    fails(float_wav(x, 16_000), "no numbers")


def test_too_long(monkeypatch):
    """Found out from the header, before anything is decoded."""
    monkeypatch.setattr(audio, "MAX_SECONDS", 2)
    monkeypatch.setattr(audio, "_stream", lambda *_: pytest.fail("decoded"))
    fails(wav(cases.sound(16_000), 4_000), "lasts 4.0 s, more than the model's context holds")
    assert 131_072 / 25 - 1 <= 5_242 <= 131_072 / 25


def test_too_long_where_the_header_does_not_say(monkeypatch):
    monkeypatch.setattr(audio, "MAX_SECONDS", 2)
    fails(np.ones(3 * 16_000, np.float32), "lasts 3.0 s", rate=16_000)


def test_without_the_decoder(monkeypatch):
    monkeypatch.setitem(sys.modules, "miniaudio", None)
    fails(wav(cases.sound(1_600), 16_000), "pip install miniaudio")


@pytest.mark.parametrize(
    ("head", "kind"),
    [(bytes(4) + b"ftypM4A ", "m4a"), (b"\xff\xf1\x50", "aac"), (b"caff", "caf"), (b"\x1a\x45\xdf\xa3", "webm")],
)
def test_formats_without_their_decoder(monkeypatch, tmp_path, head, kind):
    """With it: `test_video.py`."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(container, "available", lambda: False)
    line = fails(head + bytes(100), f"is {kind}, which needs the decoder PyAV")
    assert "pip install 'mlx-gemma4[video]'" in line and "ffmpeg -i" in line
    path = tmp_path / "my song.x"
    path.write_bytes(head + bytes(100))
    assert "my song.x' sound.wav" in fails(path, f"is {kind}")


def test_opus():
    optional("av", "video")
    sound = read_sound(cases.FOLDER / "tones.opus")
    assert len(sound.samples) == 800 and np.abs(sound.samples).max() > 0.3


def fake_afconvert(folder: Path, monkeypatch, script: str) -> None:
    tool = folder / "afconvert"
    tool.write_text(f"#!{sys.executable}\nimport sys, pathlib\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_the_platform_s_decoder(monkeypatch, tmp_path):
    """Called with afconvert's own arguments; what it writes is read like any wav."""
    (tmp_path / "out.wav").write_bytes(wav(cases.sound(1_600), 16_000))
    checks = "a = sys.argv[1:]; assert a[:4] == ['-f', 'WAVE', '-d', 'LEF32'] and len(a) == 6, a; "
    checks += "assert pathlib.Path(a[4]).suffix == '.m4a'; "
    script = checks + f"pathlib.Path(a[5]).write_bytes(pathlib.Path({str(tmp_path / 'out.wav')!r}).read_bytes())"
    fake_afconvert(tmp_path, monkeypatch, script)
    assert len(read_sound(bytes(4) + b"ftypM4A " + bytes(100)).samples) == 1_600


def test_the_platform_s_decoder_fails(monkeypatch, tmp_path):
    fake_afconvert(tmp_path, monkeypatch, "sys.exit('Error: ExtAudioFileOpenURL failed')")
    fails(bytes(4) + b"ftypM4A " + bytes(100), "afconvert .*ExtAudioFileOpenURL failed")
