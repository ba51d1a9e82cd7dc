"""Clips: frames, times and pixels against stored ones of transformers, every kind of file, and what cannot be read.

The same comparisons with transformers beside it: `test_video_live.py`.
"""

import base64
import importlib.util
import io
import json
import os

import numpy as np
import pytest
import video_cases as cases
from checkpoints import one_line
from optional import missing
from PIL import Image

from mlx_gemma4.errors import UsageError
from mlx_gemma4.media import audio, container, video
from mlx_gemma4.media.audio import read_sound
from mlx_gemma4.media.images import process_image
from mlx_gemma4.media.sources import MediaError
from mlx_gemma4.media.video import choose, load_video

needs_av = pytest.mark.skipif(importlib.util.find_spec("av") is None, reason=missing("av", "video"))


def refused(source, kind: type[Exception] = MediaError, **settings) -> str:
    with pytest.raises(kind) as error:
        load_video(source, **settings)
    return one_line(error)


def same_pixels(found: video.Video, frames) -> bool:
    wanted = [process_image(Image.fromarray(frame), 70).patches for frame in frames]
    return len(found.frames) == len(wanted) and all(map(np.array_equal, (f.patches for f in found.frames), wanted))


# ------------------------------------------------------------------ as the reference


def test_frames_and_stamps():
    rows = json.loads((cases.FOLDER / "choices.json").read_text())
    assert len(rows) > 50 and max(row[0] for row in rows) > 200_000
    for total, rate, count, fps, indices, stamps in rows:
        found = choose(total, rate, fps, count)
        assert found.tolist() == indices, (total, rate, count, fps)
        times = tuple((found / rate).tolist())
        assert video.Video((), times, 0.0, "", None, None).stamps == tuple(stamps)


@pytest.mark.parametrize("i", range(len(cases.PICTURES)))
def test_pixels_of_the_torchvision_backend(i):
    """Theirs, resized with coarser weights: a few values differ by 1 or 2 of 255, none by more."""
    count, height, width, tokens = cases.PICTURES[i]
    with np.load(cases.FOLDER / "pixels.npz") as file:
        patches, positions, each = (file[f"{i}/{name}"] for name in ("patches", "positions", "tokens"))
    found = load_video(cases.pictures(count, height, width), rate=30.0, max_soft_tokens=tokens)
    assert len(found.frames) == 32 and all(frame.tokens == each for frame in found.frames)
    assert np.array_equal(found.frames[0].positions, positions)
    ours = np.concatenate([frame.patches for frame in found.frames])[:: cases.STEP]
    apart = np.abs(ours.astype(int) - patches)
    assert apart.max() <= 2 and (apart > 0).mean() < 0.03 and (apart > 1).mean() < 1e-3


@needs_av
def test_a_clip():
    """32 of 60 frames, each the one that decoding everything finds there, and what is heard."""
    found = load_video(cases.CLIP)
    numbers = [i * 60 // 32 for i in range(32)]
    everything = cases.decoded(cases.CLIP.read_bytes())
    assert same_pixels(found, [everything[i] for i in numbers])
    assert found.seconds == tuple(i / 30 for i in numbers) and found.duration == pytest.approx(2.0)
    assert found.tokens == 32 * 63 and set(found.stamps) == {"00:00", "00:01"} and found.note is None
    samples = found.sound.samples
    assert abs(found.sound.seconds - 2.0) < 0.05 and samples.dtype == np.float32
    spectrum = np.abs(np.fft.rfft(samples[8_000:24_000]))
    assert np.argmax(spectrum) == 440 and spectrum[440] / 8_000 == pytest.approx(0.3, abs=0.03)
    assert load_video(cases.CLIP, sound=False).sound is None


# ------------------------------------------------------------------ which frames


def test_all_frames_of_a_short_clip():
    """Where transformers raises."""
    found = load_video(cases.pictures(12), rate=6.0)
    assert len(found.frames) == 12 and found.seconds[-1] == 11 / 6 and found.duration == 2.0
    assert found.note == "the video has 12 frames, and all are taken"
    assert load_video(cases.pictures(1), rate=6.0).note == "the video has 1 frame, and all are taken"
    assert load_video(cases.pictures(32), rate=32.0).note is None


@pytest.mark.parametrize(
    ("total", "rate", "settings", "count", "note"),
    [
        (60, 30.0, {}, 32, None),
        (750, 1.0, {}, 32, "the video lasts 12:30: 32 frames, one every 23 s"),
        (60, 1.0, {"fps": 1.0}, 60, None),
        (60, 30.0, {"fps": 2.0}, 4, None),
        (75, 30.0, {"fps": 1.0}, 2, None),  # rounded down, as in the reference
        (5, 30.0, {"fps": 1.0}, 1, None),
        (200, 2.0, {"fps": 1.0}, 60, "the video lasts 1:40: 60 frames, one every 1.7 s"),
        (200, 2.0, {"fps": 1.0, "max_frames": 150}, 100, None),
        (200, 2.0, {"fps": 1.0, "max_frames": 10}, 10, "the video lasts 1:40: 10 frames, one every 10 s"),
        (20, 2.0, {"fps": 5.0}, 20, "the video has 20 frames, and all are taken"),
        (20, 2.0, {"fps": 2.0}, 20, None),
        (100, 30.0, {"max_frames": 64}, 64, None),
        (100, 30.0, {"max_frames": 1}, 1, "the video lasts 3.3 s: 1 frame, one every 3.3 s"),
        (3, 30.0, {"fps": 1e-9}, 1, None),
        (3, 30.0, {"fps": 1e300}, 3, "the video has 3 frames, and all are taken"),
    ],
)
def test_how_many_frames(total, rate, settings, count, note):
    frames = np.zeros((total, 1, 1, 3), np.uint8)
    found = load_video(frames, rate=rate, **settings)
    assert (len(found.frames), found.note) == (count, note)
    assert list(found.seconds) == sorted(set(found.seconds)) and found.seconds[0] == 0


@needs_av
def test_an_uneven_rate():
    """A second at 30 frames a second, then one every half second: frames by number as the reference chooses them, with
    their own times; by `fps` what is on screen at each moment."""
    times = [i * 1000 // 30 if i < 30 else 1000 + (i - 30) * 500 for i in range(40)]
    data = cases.make(milliseconds=times, count=40)
    everything = cases.decoded(data)
    found = load_video(data)
    numbers = [i * 40 // 32 for i in range(32)]
    assert same_pixels(found, [everything[i] for i in numbers])
    assert found.seconds == pytest.approx([times[i] / 1000 for i in numbers], abs=1e-3)
    assert found.stamps[-1] == "00:05"
    found = load_video(data, fps=1.0)
    numbers = [max(i for i, t in enumerate(times) if t <= s * 1000 + 1) for s in range(len(found.frames))]
    assert len(numbers) in (5, 6) and found.seconds == pytest.approx(range(len(numbers)), abs=0.5)
    assert list(found.seconds) == pytest.approx([times[i] / 1000 for i in numbers], abs=0.5)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"fps": 0}, "fps is how many"),
        ({"fps": float("nan")}, "fps is how many"),
        ({"fps": float("inf")}, "fps is how many"),
        ({"max_frames": 0}, "max_frames is how many"),
        ({"max_soft_tokens": 71}, "70, 140, 280, 560, 1120"),
        ({"rate": 30.0}, "rate goes with arrays"),
    ],
)
def test_options_out_of_range(settings, match):
    assert match in refused(b"not even read", UsageError, **settings)


def test_more_tokens_than_any_context_holds():
    frames = np.broadcast_to(np.zeros((1, 48, 48, 3), np.uint8), (5000, 48, 48, 3))
    line = refused(frames, rate=30.0, max_frames=5000)
    assert "5,000 frames" in line and "take fewer" in line


# ------------------------------------------------------------------ where a clip comes from


@needs_av
def test_every_kind_of_source(tmp_path, monkeypatch):
    data = cases.CLIP.read_bytes()
    path = tmp_path / "a clip, with spaces é%d.mp4"
    path.write_bytes(data)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    url = "data:video/mp4;base64," + base64.b64encode(data).decode()
    wanted = load_video(data, max_frames=2, sound=False)
    for source in (path, str(path), path.name, f"~/{path.name}", path.as_uri(), url, bytearray(data), memoryview(data)):
        found = load_video(source, max_frames=2, sound=False)
        assert all(np.array_equal(a.patches, b.patches) for a, b in zip(found.frames, wanted.frames, strict=True))
    monkeypatch.setattr(type(path), "read_bytes", lambda self: pytest.fail("a local file was read as a whole"))
    load_video(path, max_frames=1)


def test_arrays_and_lists():
    frames = cases.pictures(3)
    wanted = load_video(frames, rate=2.0)
    for source in ([Image.fromarray(f) for f in frames], list(frames), tuple(frames), frames[::1]):
        found = load_video(source, rate=2.0)
        assert found.seconds == (0.0, 0.5, 1.0) and same_pixels(found, frames)
        assert found.tokens == wanted.tokens and found.sound is None
    assert len(load_video(frames[..., 0]).frames) == 3
    found = load_video(frames)
    assert found.seconds[1] == 1 / 24 and "came without a rate, which is taken to be 24" in found.note
    assert "no video" in refused(frames[0]) and "0 frames" in refused([]) and "0 frames" in refused(frames[:0])
    assert "float64" in refused(frames / 255)
    assert "rate is how many" in refused(frames, UsageError, rate=0)


# ------------------------------------------------------------------ kinds of file

KINDS = {
    "mp4": ("mp4", "mpeg4", "aac"),
    "mov, all key frames": ("mov", "mjpeg", None),
    "mkv": ("matroska", "mpeg4", "aac"),
    "webm": ("webm", "libvpx", "libopus"),
    "webm, vp9": ("webm", "libvpx-vp9", "libopus"),
    "avi": ("avi", "mpeg4", None),
    "ts": ("mpegts", "mpeg2video", "mp2"),
    "gif": ("gif", "gif", None),
}


@needs_av
@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_those_of_decoding_everything(kind):
    """Any frames, also when seeking lies ahead: bit for bit."""
    form, codec, heard = KINDS[kind]
    sound = None if heard is None else cases.tone(2.0, 48_000)
    rate = 25 if form in ("gif", "mpegts") else 30
    data = cases.make(form, codec, rate=rate, sound=sound, sound_codec=heard or "")
    everything = cases.decoded(data)
    clip = container.Clip(io.BytesIO(data), "clip")
    index = clip.scan()
    assert len(index) == len(everything) == 60 and index.rate == rate and len(index.keys) >= (1 if form == "gif" else 5)
    rng = np.random.default_rng(3)
    for numbers in ([0], [59], [5, 6, 40], range(60), *(sorted(rng.choice(60, 5, replace=False)) for _ in range(4))):
        numbers = [int(i) for i in numbers]
        found = [np.asarray(image) for image in clip.frames(index, numbers)]
        assert len(found) == len(numbers)
        assert all(np.array_equal(image, everything[i]) for image, i in zip(found, numbers, strict=True)), numbers
    found = load_video(data)
    assert len(found.frames) == 32 and found.duration == pytest.approx(60 / rate, abs=0.05)
    assert found.seconds == pytest.approx([i * 60 // 32 / rate for i in range(32)], abs=1e-9)
    assert (found.sound is None) == (heard is None) == (found.note is not None)


@needs_av
def test_only_what_is_needed_is_decoded(monkeypatch):
    """Four frames of 600: 40 groups of 15, of which four are entered."""
    data = cases.make(count=600, group=15)
    reached = []
    whole = container._reach

    def watched(frames, time, from_key=False):
        def each():
            for frame in frames:
                reached.append(frame.pts)
                yield frame

        return whole(each(), time, from_key)

    monkeypatch.setattr(container, "_reach", watched)
    found = load_video(data, max_frames=4)
    everything = cases.decoded(data)
    assert same_pixels(found, [everything[i] for i in (0, 150, 300, 450)])
    assert len(reached) <= 4 * 15


@needs_av
def test_packets_that_do_not_tell(monkeypatch):
    """Where a seek misses, and where packets have no times: frames are counted, and are the same."""
    data = cases.CLIP.read_bytes()
    wanted = load_video(data)

    def unindexed(self):
        raise container.Unindexed

    monkeypatch.setattr(container, "_reach", lambda *_, **__: None)
    missed = load_video(data)
    monkeypatch.setattr(container.Clip, "scan", unindexed)
    for found in (missed, load_video(data)):
        assert found.seconds == wanted.seconds
        assert all(np.array_equal(a.patches, b.patches) for a, b in zip(found.frames, wanted.frames, strict=True))


@needs_av
@pytest.mark.parametrize(
    ("matrix", "turn"),
    [
        ((1, 0, 0, 1), None),
        ((0, 1, -1, 0), "ROTATE_270"),  # a phone held upright
        ((-1, 0, 0, -1), "ROTATE_180"),
        ((0, -1, 1, 0), "ROTATE_90"),
        ((-1, 0, 0, 1), "FLIP_LEFT_RIGHT"),
        ((1, 0, 0, -1), "FLIP_TOP_BOTTOM"),
        ((0, 1, 1, 0), "TRANSPOSE"),
        ((0, -1, -1, 0), "TRANSVERSE"),
    ],
)
def test_rotation(matrix, turn):
    data = cases.turned(cases.make(codec="mjpeg", count=2), matrix)
    first = Image.fromarray(cases.decoded(data)[0])
    wanted = first if turn is None else first.transpose(Image.Transpose[turn])
    found = load_video(data)
    assert (found.frames[0].width, found.frames[0].height) == wanted.size
    assert np.array_equal(found.frames[0].patches, process_image(wanted, 70).patches)


@needs_av
def test_transparency_becomes_white():
    frames = [Image.new("RGBA", (48, 48), (255, 0, 0, 0 if i else 255)) for i in range(2)]
    out = io.BytesIO()
    frames[0].save(out, "png", save_all=True, append_images=frames[1:], duration=100)
    found = load_video(out.getvalue())
    assert found.frames[0].patches[0, :3].tolist() == [255, 0, 0]
    assert (found.frames[1].patches == 255).all()


# ------------------------------------------------------------------ the sound


@needs_av
@pytest.mark.parametrize(
    ("sound", "note"),
    [
        (None, "has no sound"),
        (np.zeros(96_000, np.float32), "has a silent soundtrack"),
        (cases.tone(2.0, 48_000), None),
    ],
    ids=["none", "silent", "heard"],
)
def test_soundtracks(sound, note):
    found = load_video(cases.make(sound=sound))
    assert (found.sound is not None) == (note is None)
    assert found.note == (note and f"the video {note}")


@needs_av
def test_notes_are_one_line():
    found = load_video(cases.make(count=12))
    assert found.note == "the video has 12 frames, and all are taken; it has no sound"


@needs_av
def test_more_sound_than_the_context_holds(monkeypatch):
    monkeypatch.setattr(video, "MAX_SECONDS", 1)
    found = load_video(cases.CLIP)
    assert found.sound is None and "more sound than the model's context holds (1.0 s)" in found.note


@needs_av
@pytest.mark.parametrize(("form", "codec"), [("ipod", "aac"), ("adts", "aac"), ("webm", "libopus"), ("ogg", "libopus")])
def test_sound_files_through_pyav(form, codec, monkeypatch, tmp_path):
    """m4a, aac, webm and opus, where the operating system has no decoder."""
    monkeypatch.setenv("PATH", str(tmp_path))
    data = cases.make_sound(form, codec, cases.tone(1.0, 48_000))
    found = read_sound(data)
    assert abs(found.seconds - 1.0) < 0.06
    spectrum = np.abs(np.fft.rfft(found.samples[4_000:12_000]))
    assert np.argmax(spectrum) * 2 == 440
    with pytest.raises(MediaError) as error:
        read_sound(data[:40])
    one_line(error)


@needs_av
def test_the_sound_of_a_video(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert abs(read_sound(cases.CLIP).seconds - 2.0) < 0.05
    monkeypatch.setattr(audio, "MAX_SECONDS", 1)
    with pytest.raises(MediaError, match="more than the model's context holds") as error:
        read_sound(cases.CLIP)
    one_line(error)
    with pytest.raises(MediaError, match="holds no sound"):
        read_sound(cases.make())


@needs_av
def test_sound_cut_short(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    data = cases.make_sound("webm", "libopus", cases.tone(2.0, 48_000))
    with pytest.raises(MediaError, match=r"cut short: [01]\.\d s of 2\.0 s"):
        read_sound(data[: len(data) // 2])


# ------------------------------------------------------------------ what cannot be read


@needs_av
def test_what_is_no_video(tmp_path):
    assert "is empty (0 bytes)" in refused(b"")
    assert "is no video" in refused(b"no video at all\n" * 99)
    (tmp_path / "clip.mp4").touch()
    assert refused(tmp_path / "clip.mp4").startswith(f"{tmp_path / 'clip.mp4'} is empty")
    assert "there is no file" in refused(tmp_path / "none.mp4")
    assert "is a folder" in refused(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "no ordinary file" in refused(tmp_path / "pipe")
    assert "not allowed" in refused("https://example.org/clip.mp4")
    assert "a?b" in refused("a\0b.mp4")
    assert "holds sound and no frames; give it as sound" in refused(
        cases.make_sound("ipod", "aac", cases.tone(1, 48_000))
    )
    assert "holds sound and no frames" in refused(cases.FOLDER.parent / "audio" / "tones.mp3")


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif", "bmp", "tiff", "avif"])
def test_still_pictures(kind):
    out = io.BytesIO()
    Image.fromarray(cases.picture(0)).save(out, kind)
    assert refused(out.getvalue()) == "the video is a still picture, not a video; give it as an image"


def test_an_animated_webp():
    frames = [Image.fromarray(f) for f in cases.pictures(3)]
    out = io.BytesIO()
    frames[0].save(out, "webp", save_all=True, append_images=frames[1:])
    assert "an animated WEBP, which is not read as a video; convert it" in refused(out.getvalue())


def test_heic_is_a_picture():
    assert "give it as an image" in refused(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64))


@needs_av
@pytest.mark.parametrize("part", [0.001, 0.15, 0.3, 0.6])
@pytest.mark.parametrize("kind", ["mp4", "webm", "mkv", "gif", "mov"])
def test_cut_short(kind, part):
    """mp4 with its table in front, as cameras' apps and the web have it, and others."""
    data = {
        "mp4": lambda: cases.make(options={"movflags": "faststart"}),
        "mov": lambda: cases.CLIP.read_bytes(),
        "webm": lambda: cases.make("webm", "libvpx"),
        "mkv": lambda: cases.make("matroska", "mpeg4"),
        "gif": lambda: cases.make("gif", "gif", rate=25, count=20),
    }[kind]()
    assert len(load_video(data).frames) > 1
    line = refused(data[: int(len(data) * part)])
    assert any(word in line for word in ("cut short", "no video", "damaged", "no frames")), line


@needs_av
def test_an_absurd_size(monkeypatch):
    """On the header, before a frame is decoded."""
    data = bytearray(cases.make("gif", "gif", count=3))
    data[6:10] = b"\xff\xff\xff\xff"  # the screen: 65,535 x 65,535
    line = refused(bytes(data))
    assert "65535 x 65535" in line or "damaged" in line or "does not say" in line
    monkeypatch.setattr(container, "MAX_PIXELS", 3000)
    monkeypatch.setattr(container.Clip, "frames", lambda *_: pytest.fail("decoded"))
    assert "64 x 48, 0 megapixels" in refused(cases.CLIP)


@needs_av
def test_files_that_name_other_files(tmp_path):
    """Playlists, with which a file could have any other opened, or an address."""
    lists = ["#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{}\n#EXT-X-ENDLIST\n", "ffconcat version 1.0\nfile '{}'\n"]
    for text in lists:
        for where in (cases.CLIP, cases.CLIP.as_uri(), "http://127.0.0.1:1/x.ts"):
            path = tmp_path / "list.m3u8"
            path.write_text(text.format(where))
            assert "is no video" in refused(path)


@needs_av
def test_noise_in_files_is_one_line_or_a_video(capfd):
    rng = np.random.default_rng(0)
    outcomes = set()
    sources = [cases.CLIP.read_bytes(), cases.make("webm", "libvpx", 20), cases.make("gif", "gif", 20, 25)]
    for source in sources:
        data = np.frombuffer(source, np.uint8)
        for _ in range(15):
            spoiled = data.copy()
            spoiled[rng.integers(0, len(data), 6)] = rng.integers(0, 256, 6)
            try:
                load_video(spoiled.tobytes(), max_frames=4)
                outcomes.add("read")
            except MediaError as error:
                assert "\n" not in str(error)
                outcomes.add("refused")
    assert outcomes == {"read", "refused"}
    assert capfd.readouterr() == ("", ""), "the decoder must not print"


def test_without_the_decoder(monkeypatch, tmp_path):
    monkeypatch.setattr(container, "available", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refused(cases.CLIP) == f"{cases.CLIP} needs the decoder PyAV; install it with: {container.INSTALL}"
    assert container.INSTALL == "pip install 'mlx-gemma4[video]'"
    assert len(load_video(cases.pictures(2), rate=1.0).frames) == 2
    with pytest.raises(MediaError) as error:
        read_sound(cases.FOLDER.parent / "audio" / "tones.opus")
    line = one_line(error)
    assert "tones.opus is opus" in line and container.INSTALL in line and "ffmpeg -i" in line


def test_the_decoder_is_not_imported_before_it_is_needed(clean_python):
    code = (
        "import sys, mlx_gemma4.media.video, mlx_gemma4.media.audio; print('av' in sys.modules, 'PIL' in sys.modules)"
    )
    assert clean_python(code).strip() == "False False"
