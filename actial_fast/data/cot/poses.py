"""Chains of thought written from a row's poses alone: every statement in them is true, and nothing is seen in the images."""

from __future__ import annotations

import random

from actial_fast.data.sources.row import BadRow, Row

SIDES = ("left", "right")
SHORT = {  # one wording a kind and no figures: a tiny model has to learn these from a few hundred rows
    "ego_translation": "The camera moved to the {ego}. So the answer is {letter}.",
    "object_translation": "The camera moved to the {ego}. For the object that is the {object}. So the answer is {letter}.",
    "ego_rotation": "The camera turned to the {turn}. So the answer is {letter}.",
}
SHORT_NONE = {  # the same of a camera that did not do what is asked about
    "ego_translation": "The camera did not move. So the answer is {letter}.",
    "object_translation": "The camera did not move. So the answer is {letter}.",
    "ego_rotation": "The camera did not turn. So the answer is {letter}.",
}
SHORT_SPATIAL = {  # of captures/spatial.py; the answer, which the poses decided, says it all
    "facing_side": "We see the {choice}. So the answer is {letter}.",
    "turn_size": "The camera travelled {choice} round the object. So the answer is {letter}.",
}
IDENTIFY = (
    "The first image shows the object from one viewpoint and the second shows the same object from another. The object stands still, so "
    "every difference between them comes from the camera.",
    "I have two photos of one object. Nothing but the camera changes between them, so I can read its motion from how the view changes.",
    "Image 1 is the starting view and image 2 the view after the move. It is the same object both times, and it has not moved.",
)
IDENTIFY_STILL = (
    "Both images show one object, which stands still, so every difference between them comes from the camera.",
    IDENTIFY[1],
)
COMPARE_CAMERA = (
    "From the camera's perspective: the flank of the object that lay towards the {ego} in the first image faces the camera more in the "
    "second, and the flank towards the {other} turns away.",
    "As the camera sees it, more of what was on the object's {ego}-hand edge in image 1 has come round to the front in image 2, while the "
    "{other}-hand edge has gone out of sight.",
    "Looking through the camera, image 2 shows more of the side that was at the {ego} of the object in image 1 and less of the side at its "
    "{other}.",
)
COMPARE_OBJECT = (
    "From the object's perspective: it faces the first camera, so what the camera calls {ego} is the object's own {object}.",
    "Seen by the object, which looks back at the first camera, the sides are swapped: the camera's {ego} is its {object}.",
    "If I stand in the object's place and look at the first camera, the camera's {ego}-hand side is at my {object}.",
)
COMPARE_STILL = (
    "From the camera's perspective: the same sides of the object face it in both images, at the same slant. From the object's perspective: "
    "the camera is in the same place.",
    "As the camera sees it, no flank of the object has come round to the front and none has gone out of sight. The object would see the "
    "camera where it was.",
    "Looking through the camera, the object shows the same surfaces in both images, whatever part of the picture it fills.",
)
ANALYSE_NONE = {
    "ego_translation": (
        "Position of the camera: nothing that was hidden has come into view, so the camera did not move to either side.",
        "For the camera's own translation I need the side to which its position shifted. It shows the same surfaces, so it did not move.",
    ),
    "object_translation": (
        "The camera shows the same surfaces of the object. Told from the object, too, it did not move.",
        "For the object's account I swap sides, but there is nothing to swap: the camera did not move.",
    ),
    "ego_rotation": (
        "Orientation of the camera: it looks in the same direction in both images, so the camera did not rotate.",
        "For the rotation only the viewing direction counts, not the place: that is the same, so the camera did not rotate.",
    ),
}
ANALYSE = {
    "ego_translation": (
        "Position of the camera: to see more of that flank it must stand further to the {ego} than before, so its position moved {ego}.",
        "For the camera's own translation I need the side to which its position shifted. Coming to see the {ego} flank takes a step to the "
        "{ego}.",
    ),
    "object_translation": (
        "The camera stepped to its own {ego}. Told from the object, which faces it, this step goes to the {object}.",
        "For the object's account I swap sides: a camera that moves to its {ego} moves to the {object} of an object that looks at it.",
    ),
    "ego_rotation": (
        "Orientation of the camera: compared with the first image its viewing direction is turned to the {turn}, about {yaw} degrees.",
        "For the rotation only the viewing direction counts, not the place: it swung by about {yaw} degrees to the {turn}.",
    ),
}
WHY_TURN = (
    "Having moved to the {ego}, it has to turn {turn} to keep the object in view.",
    "That fits the move: from further {ego}, the object is found by looking more to the {turn}.",
)
SYNTHESISE = (
    "Together: the camera went about {angle} degrees {sense} around the object as seen from above, moved to its own {ego}, which is the "
    "object's {object}, and turned {turn}.",
    "Putting it together, this is a move of about {angle} degrees {sense} around the object (seen from above): position to the {ego}, "
    "viewing direction to the {turn}; for the object, a move to the {object}.",
)
SYNTHESISE_ELSE = {
    "strafe": (
        "Together: the camera moved to its own {ego}, which is the object's {object}, about {angle} degrees {sense} around the object as "
        "seen from above, and did not rotate.",
        "Putting it together, the camera went sideways only: its position to the {ego}, for the object to the {object}. It did not rotate.",
    ),
    "pan": (
        "Together: the camera did not move, and it turned to the {turn} on the spot, by about {yaw} degrees.",
        "Putting it together, the camera stayed in its place and rotated to the {turn} by about {yaw} degrees.",
    ),
    "static": (
        "Together: the camera did not move and did not rotate about its vertical axis.",
        "Putting it together, the camera did not move, and it did not rotate to either side.",
    ),
}
CONCLUDE = (
    'So the question is answered by "{choice}", which is option {letter}.',
    'This makes the answer {letter}, "{choice}".',
    'The option that says "{choice}" is {letter}, so the answer is {letter}.',
)


def geometric_cot(row: Row, rng: random.Random, style: str = "full") -> str:
    """A chain of thought for a viewpoint row, in which the poses make every statement true; in short also for some spatial rows.

    Args:
        row: as questions.rows gives it: kind, choices, truth (a letter) and the pair's `meta`. Or a row of SAT's with a kind of
            SHORT_SPATIAL and answered by letter.
        rng: chooses the wordings.
        style: "full" follows the paper's steps (identify the images, compare from the camera's and the object's perspective, analyse
            the movement asked about, synthesise, answer); "short" is two or three fixed sentences from SHORT, without figures.

    Returns "<think>...</think><answer>LETTER</answer>" (short) or with a line break between the two (full).
    Raises BadRow when the row is no viewpoint row or its truth is not what its poses say.
    """
    assert style in ("full", "short"), style
    meta = row.meta
    if style == "short" and row.kind in SHORT_SPATIAL:
        index = ord(row.truth) - ord("A") if len(row.truth) == 1 else -1
        if not 0 <= index < len(row.choices):
            raise BadRow(row.where or row.id, f"the truth is {row.truth!r}, no letter of {len(row.choices)} choices; open it with letters")
        thought = SHORT_SPATIAL[row.kind].format(choice=row.choices[index], letter=row.truth)
        return f"<think>{thought}</think><answer>{row.truth}</answer>"
    if row.kind not in SHORT or not {"azimuth_change_deg", "yaw_deg", *SHORT} <= set(meta):
        raise BadRow(row.where or row.id, f"kind {row.kind!r} with meta {sorted(meta)} is no viewpoint row; its poses are needed")
    choice = meta[row.kind]
    letter = chr(ord("A") + row.choices.index(choice)) if choice in row.choices else ""
    if letter != row.truth:
        raise BadRow(row.where or row.id, f"the truth is {row.truth!r} but the poses say {choice!r}, option {letter!r}")
    facts = {
        "ego": meta["ego_translation"],
        "object": meta["object_translation"],
        "other": "left" if meta["ego_translation"] == "right" else "right",
        "turn": meta["ego_rotation"],
        "angle": round(abs(meta["azimuth_change_deg"])),
        "yaw": round(abs(meta["yaw_deg"])),
        "sense": "counterclockwise" if meta["azimuth_change_deg"] > 0 else "clockwise",
        "choice": choice,
        "letter": letter,
    }
    moved, turned, none = facts["ego"] in SIDES, facts["turn"] in SIDES, choice not in SIDES
    if style == "short":
        return f"<think>{(SHORT_NONE if none else SHORT)[row.kind].format(**facts)}</think><answer>{letter}</answer>"
    steps = [rng.choice(IDENTIFY if moved else IDENTIFY_STILL)]
    steps.append(f"{rng.choice(COMPARE_CAMERA)} {rng.choice(COMPARE_OBJECT)}" if moved else rng.choice(COMPARE_STILL))
    steps.append(rng.choice((ANALYSE_NONE if none else ANALYSE)[row.kind]))
    if row.kind == "ego_rotation" and moved and turned and facts["turn"] != facts["ego"]:  # any other turn did not keep the object in view
        steps[-1] += " " + rng.choice(WHY_TURN)
    alone = "strafe" if moved and not turned else "pan" if turned and not moved else "static"
    steps += [rng.choice(SYNTHESISE if moved and turned else SYNTHESISE_ELSE[alone]), rng.choice(CONCLUDE)]
    return f"<think>{chr(10).join(steps).format(**facts)}</think>\n<answer>{letter}</answer>"
