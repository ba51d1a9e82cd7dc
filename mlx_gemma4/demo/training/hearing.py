"""What is asked about sounds, and the answers.

Owns: the wordings and which of them are kept for the test. Leaves sounds to `sounds.py`.
"""

import random

import sounds

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")


def beeps(count: int, kind: str = "") -> str:
    """ "three high beeps" """
    kind = kind and kind + " "
    return f"{NUMBERS[count]} {kind}beep{'' if count == 1 else 's'}"


def describe(sound: sounds.Sound) -> str:
    """What is heard, in a sentence."""
    notes = sound.notes
    if sound.long:
        kind = {"rises": "rising", "falls": "falling"}.get(notes[0].glide or "", "high" if notes[0].high else "low")
        return f"I hear a {kind} tone."
    if all(n.high == notes[0].high for n in notes):
        return f"I hear {beeps(len(notes), 'high' if notes[0].high else 'low')}."
    order = ", ".join("high" if n.high else "low" for n in notes)
    return f"I hear {beeps(len(notes))}: {order}."


# (wordings of the training, wordings of the test)
WHAT = (("What do you hear?", "What is this sound?", "Describe the sound.", "What can you hear?", "Listen. What is it?",
         "What is it?", "Describe what you hear."), ("What is the sound?", "Tell me what you hear."))  # fmt: skip
COUNT = (("How many beeps do you hear?", "How many beeps are there?", "Count the beeps.", "How often does it beep?",
          "How many beeps?", "How many times does it beep?"),
         ("How many beeps are in this sound?", "How many beeps can you hear?"))  # fmt: skip
PITCH = (("Is it high or low?", "Is the sound high or low?", "Is the tone high or low?", "High or low?",
          "Are the beeps high or low?"), ("Is the pitch high or low?", "Is this sound high or low?"))  # fmt: skip
GLIDE = (("Does the tone rise or fall?", "Does it rise or fall?", "Is the tone rising or falling?",
          "Does the sound go up or down?"), ("Does the sound rise or fall?",))  # fmt: skip
KIND = (("Is it a tone or beeps?", "Do you hear a tone or beeps?", "Is this a tone or a beep?"),
        ("Is the sound a tone or beeps?",))  # fmt: skip


def questions(rng: random.Random, sound: sounds.Sound, test: bool) -> list[tuple[str, str, str]]:
    """(kind, question, answer) for all that can be asked about a sound."""
    notes, side = sound.notes, int(test)
    out = [("hear-what", rng.choice(WHAT[side]), describe(sound))]
    if sound.long:
        glide = notes[0].glide
        said = {"rises": "The tone rises.", "falls": "The tone falls."}.get(glide or "", "The tone stays the same.")
        out.append(("hear-glide", rng.choice(GLIDE[side]), said))
        out.append(("hear-kind", rng.choice(KIND[side]), "It is a tone."))
    else:
        out.append(("hear-count", rng.choice(COUNT[side]), f"I hear {beeps(len(notes))}."))
        many = len(notes) > 1
        out.append(("hear-kind", rng.choice(KIND[side]), f"It is {beeps(len(notes))}."))
        if many and rng.random() < 0.3:
            which, note = rng.choice((("first", notes[0]), ("last", notes[-1])))
            out.append(("hear-one", f"Is the {which} beep high or low?",
                        f"The {which} beep is {'high' if note.high else 'low'}."))  # fmt: skip
    if notes[0].glide is None and all(n.high == notes[0].high for n in notes):
        word = "high" if notes[0].high else "low"
        out.append(("hear-pitch", rng.choice(PITCH[side]), f"{'They are' if len(notes) > 1 else 'It is'} {word}."))
    return out
