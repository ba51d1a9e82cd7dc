"""Detection answers as models write them, right and wrong; boxes in pixels; the drawing."""

import json

import numpy as np
import pytest
from PIL import Image
from test_chat_media import load_tiny

from mlx_gemma4.chat import Chat, Stats
from mlx_gemma4.detect import Box, detect, draw, parse, prompt
from mlx_gemma4.errors import Gemma4Error, UsageError

ONE = '{"box_2d": [100, 200, 300, 400], "label": "cat"}'
CAT = Box("cat", 160, 60, 320, 180)  # y first, of 1000; the picture is 800 x 600
DOG = Box("dog", 0, 300, 800, 600)
TWO = f'[{ONE}, {{"box_2d": [500, 0, 1000, 1000], "label": "dog"}}]'


def test_the_prompt_is_the_word_detect_and_what():
    assert prompt("person and bicycle") == "detect person and bicycle"
    assert prompt("  red\n circle ") == "detect red circle"
    with pytest.raises(UsageError, match="nothing to detect"):
        prompt(" \n")


@pytest.mark.parametrize(
    ("answer", "boxes"),
    [
        (TWO, (CAT, DOG)),
        (f"```json\n{TWO}\n```", (CAT, DOG)),
        (f"```json\n{TWO}\n```\nI found a cat and a dog.", (CAT, DOG)),
        (f"```\n{TWO}\n```", (CAT, DOG)),
        (f"Here [1] they are (see below [sic]):\n{TWO}", (CAT, DOG)),
        (json.dumps(json.loads(TWO), indent=2), (CAT, DOG)),
        (ONE, (CAT,)),
        (f"{ONE}\n{ONE}", (CAT, CAT)),
        (f"{ONE}, {ONE}", (CAT, CAT)),
        (f"```json\n[{ONE}]\n```\nand\n```json\n[{ONE}]\n```", (CAT, CAT)),
        ("[]", ()),
        ("```json\n[ ]\n```", ()),
        ('[{"label": "cat", "box_2d": [100.0, 200, 300, 400.0]}]', (CAT,)),
        ('[{"box_2d": [300, 400, 100, 200], "label": "cat"}]', (CAT,)),
        ('[{"box_2d": [100, 200, 300, 400]}]', (Box("", 160, 60, 320, 180),)),
        ('[{"box_2d": [100, 200, 300, 400], "label": "cat", "score": 0.9}]', (CAT,)),
        ('[{"box_2d": [100, 200, 300, 400], "label": 7}]', (Box("7", 160, 60, 320, 180),)),
        ('[{"box_2d": [0, 0, 0, 0], "label": "a \\"cat\\""}]', (Box('a "cat"', 0, 0, 0, 0),)),
    ],
)
def test_answers_with_boxes(answer: str, boxes: tuple[Box, ...]):
    assert parse(answer, 800, 600) == boxes


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("", "without boxes: (nothing)"),
        ("There are no cats here.", "without boxes: There are no cats here."),
        (TWO[:-5], 'not whole JSON: [{"box_2d": [100, 200'),
        (f"```json\n[{ONE},", "not whole JSON"),
        ("[{'box_2d': [1, 2, 3, 4]}]", "not whole JSON"),
        ('[{"point": [100, 200], "label": "cat"}]', "with points, not boxes"),
        ('[{"bbox": [1, 2, 3, 4], "label": "cat"}]', "bbox and label instead of box_2d"),
        (f'[{ONE}, {{"label": "dog"}}]', "label instead of box_2d"),
        ("[[100, 200, 300, 400]]", "no list of boxes"),
        ('[{"box_2d": [1, 2, 3], "label": "cat"}]', "not four numbers from 0 to 1000"),
        ('[{"box_2d": [1, 2, 3, 1001], "label": "cat"}]', "not four numbers from 0 to 1000"),
        ('[{"box_2d": [1, 2, 3, -1], "label": "cat"}]', "not four numbers"),
        ('[{"box_2d": [1, 2, 3, NaN], "label": "cat"}]', "not four numbers"),
        ('[{"box_2d": [1, 2, 3, true], "label": "cat"}]', "not four numbers"),
        ('[{"box_2d": ["1", 2, 3, 4], "label": "cat"}]', "not four numbers"),
        ('[{"box_2d": 5, "label": "cat"}]', "not four numbers"),
        ("[" * 100_000 + '{"', "not whole JSON"),
    ],
)
def test_answers_without_are_one_line_that_shows_the_beginning(answer: str, says: str):
    with pytest.raises(Gemma4Error) as caught:
        parse(answer, 800, 600)
    line = str(caught.value)
    assert says in line
    assert "\n" not in line and len(line) < 200


def test_pixels_are_those_of_the_picture():
    corners = '[{"box_2d": [0, 0, 1000, 1000], "label": "all"}, {"box_2d": [333, 333, 667, 667], "label": "middle"}]'
    assert parse(corners, 3, 2) == (Box("all", 0, 0, 3, 2), Box("middle", 1, 1, 2, 1))
    assert parse(corners, 4000, 3000) == (Box("all", 0, 0, 4000, 3000), Box("middle", 1332, 999, 2668, 2001))


def changed(before: Image.Image, after: Image.Image) -> np.ndarray:
    """Whether each pixel differs, [H, W]."""
    assert before.size == after.size
    return (np.asarray(before) != np.asarray(after)).any(axis=2)


@pytest.mark.parametrize("size", [(800, 600), (4000, 3000), (200, 1000)])
def test_a_drawn_box_is_where_the_box_is(size: tuple[int, int]):
    width, height = size
    picture = Image.new("RGB", size, (128, 128, 128))
    box = Box("", width // 4, height // 4, width // 2, height // 2)
    marks = changed(picture, draw(picture, [box]))
    ys, xs = np.nonzero(marks)
    assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == (box.x1, box.y1, box.x2, box.y2)
    assert not marks[height // 4 + height // 8, width // 4 + width // 8], "the inside stays"


@pytest.mark.parametrize("ground", [(255, 255, 255), (0, 0, 0), (230, 30, 60), (255, 200, 0), (128, 128, 128)])
def test_a_box_shows_on_any_ground(ground: tuple[int, int, int]):
    picture = Image.new("RGB", (400, 300), ground)
    after = np.asarray(draw(picture, [Box("", 100, 100, 300, 200)])).astype(int)
    across = np.abs(after[150, 100:110] - np.array(ground)).max(axis=1)
    assert across.max() > 100


@pytest.mark.parametrize("size", [(800, 600), (120, 90), (64, 2000), (2000, 64)])
@pytest.mark.parametrize("label", ["cat", "a very long label " * 20, "two\nlines", "Katze auf dem Dach"])
def test_labels_stay_within_the_picture_and_apart(size: tuple[int, int], label: str):
    width, height = size
    picture = Image.new("RGB", size, (255, 255, 255))
    corners = [Box(label, 0, 0, 10, 10), Box(label, width - 10, height - 10, width, height)]
    for box in corners:
        bare, labelled = draw(picture, [Box("", box.x1, box.y1, box.x2, box.y2)]), draw(picture, [box])
        assert changed(bare, labelled).sum() > 50, "there is a label"
    edge = Box(label, width, height, width, height)
    draw(picture, [*corners, edge])


def test_colours_go_by_label():
    picture = Image.new("RGB", (600, 400), (255, 255, 255))
    boxes = [Box("a", 50, 100, 150, 200), Box("b", 250, 100, 350, 200), Box("a", 450, 100, 550, 200)]
    after = np.asarray(draw(picture, boxes))
    first, second, third = (tuple(after[150, x + 1]) for x in (50, 250, 450))
    assert first == third != second


def test_tiny_pictures_get_boxes_without_labels():
    picture = Image.new("RGB", (20, 10), (255, 255, 255))
    box = Box("cat", 2, 2, 12, 8)
    assert draw(picture, [box]).tobytes() == draw(picture, [Box("", 2, 2, 12, 8)]).tobytes() != picture.tobytes()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_tiny(tmp_path_factory.mktemp("detect"), "26b-a4b")


def stats(reason: str) -> Stats:
    return Stats(1, 0, 1.0, 7, 1.0, 8, 100, 1, 1, reason)


def test_the_model_is_shown_the_upright_picture_and_asked(loaded, monkeypatch, tmp_path):
    asked = []

    def send(self, text, **options):
        asked.append((text, self.senses.load(text, images=options["images"]), self.sampling.temperature))
        self.stats = stats("stop")
        return TWO

    monkeypatch.setattr(Chat, "send", send)
    picture = Image.new("RGB", (600, 800), (255, 0, 0))
    exif = picture.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    picture.save(tmp_path / "turned.jpg", exif=exif)
    found = detect(*loaded, tmp_path / "turned.jpg", "cat and dog", image_tokens=70)
    assert (found.width, found.height) == (800, 600) == found.picture.size
    assert found.boxes == (CAT, DOG) and found.answer == TWO
    ((text, parts, temperature),) = asked
    (image,) = parts[0]["image"].parts
    assert (text, parts[1]["text"], temperature) == ("detect cat and dog", "detect cat and dog", 0.0)
    assert (image.width, image.height) == (800, 600) and 50 < image.tokens <= 70


def test_an_answer_that_does_not_end_is_an_error(loaded):
    with pytest.raises(Gemma4Error, match=r"still going on after 5 tokens|without boxes|not whole JSON"):
        detect(*loaded, np.zeros((40, 40, 3), np.uint8), "cat", max_tokens=5)


def test_a_model_that_does_not_see(tmp_path):
    blind = load_tiny(tmp_path / "blind", "26b-a4b", towers=False)
    with pytest.raises(UsageError, match="see"):
        detect(*blind, np.zeros((40, 40, 3), np.uint8), "cat")
