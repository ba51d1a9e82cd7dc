"""Clips against transformers running beside us: its choice of frames, its decoding, its video processor.

Skipped without torch, transformers and PyAV; what resizes, without torchvision, too. The same comparisons from stored
references: `test_video.py`.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import video_cases as cases
from optional import optional, transformers_with_gemma4
from PIL import Image

from mlx_gemma4.media.images import TOKEN_BUDGETS, process_image
from mlx_gemma4.media.video import Video, choose, load_video

optional("torch")
optional("av", "video")
transformers = transformers_with_gemma4()

sys.path.insert(0, str(Path(__file__).parent / "fixtures"))
import make_video  # noqa: E402
from transformers.video_utils import default_sample_indices_fn, read_video_pyav  # noqa: E402


def stamps(seconds) -> list[str]:
    return list(Video((), tuple(float(s) for s in seconds), 0.0, "", None, None).stamps)


def test_frames_and_stamps():
    """Of many lengths and rates, by number and by rate."""
    rng = np.random.default_rng(5)
    for _ in range(300):
        total, rate = int(rng.integers(1, 1700)), float(rng.choice([12.5, 24000 / 1001, 25, 30000 / 1001, 30, 60]))
        if total >= 32:
            found = choose(total, rate)
            assert (found.tolist(), stamps(found / rate)) == make_video.reference(total, rate, 32, None)
        count, fps = int(rng.integers(1, total + 1)), float(rng.choice([0.1, 0.5, 1, 2, 5]))
        found = choose(total, rate, None, count)
        assert (found.tolist(), stamps(found / rate)) == make_video.reference(total, rate, count, None)
        if fps <= rate:
            found = choose(total, rate, fps, total)
            assert (found.tolist(), stamps(found / rate)) == make_video.reference(total, rate, None, fps)


@pytest.mark.parametrize("settings", [{}, {"max_frames": 7}, {"fps": 5.0}])
def test_a_file_as_they_read_it(settings):
    """Their PyAV reader decodes from the start; every frame, number and time is the same."""
    wish = {"num_frames": settings.get("max_frames", 32)} if "fps" not in settings else settings
    frames, metadata = read_video_pyav(str(cases.CLIP), lambda metadata: default_sample_indices_fn(metadata, **wish))
    found = load_video(cases.CLIP, **settings)
    assert list(found.seconds) == list(metadata.timestamps) and found.duration == pytest.approx(metadata.duration)
    assert len(found.frames) == len(frames)
    for ours, theirs in zip(found.frames, frames, strict=True):
        assert np.array_equal(ours.patches, process_image(Image.fromarray(theirs), 70).patches)


@pytest.mark.parametrize("tokens", TOKEN_BUDGETS)
@pytest.mark.parametrize("size", [(48, 64), (240, 135), (90, 500)])
def test_their_processor(size, tokens):
    """torchvision's resizing differs from Pillow's by 2 of 255 at most; sizes and positions do not."""
    pytest.importorskip("torchvision", reason="transformers' video processor: pip install torchvision")
    rng = np.random.default_rng(8)
    frames = rng.integers(0, 256, (5, *size, 3), dtype=np.uint8)
    frames[2:] = cases.pictures(3, *size)
    values, positions, count = make_video.pixels(frames, tokens, 3)
    found = load_video(frames, rate=30.0, max_soft_tokens=tokens, max_frames=3)
    assert [frame.tokens for frame in found.frames] == [count] * 3
    assert np.array_equal(found.frames[0].positions, positions)
    apart = np.abs(np.stack([frame.patches for frame in found.frames]).astype(int) - values)
    assert apart.max() <= 2 and (apart > 0).mean() < 0.03 and (apart > 1).mean() < 1e-4
