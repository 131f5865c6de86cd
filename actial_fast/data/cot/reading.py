"""What a chain of thought about two viewpoints says of left, right and degrees, statement by statement, in English.

The rules, in the order in which they are applied to a sentence:

1. A question, an option that is quoted, and what is only considered (would, might, at first glance, one might expect) say nothing. A
   condition (if, suppose, when a camera ..., moving to the right uncovers ...) is to be met: what follows from it counts when it holds
   (Statement.given).
2. A side belongs to a move, a turn or neither by the words around it in its clause, else before it: "the right flank" and "on the right"
   say where something is, not where the camera went. A side alone ("So: right") belongs to what was talked about last.
3. A move is told from the camera's place or the object's. The clause's own words decide ("for the mug", "the camera's right", "sees it
   go"); else those of the sentence; else a heading, a question or the sentence before. What only the sentence before says is less than
   certain (Statement.loose).
4. "not", "never", "rather than", "can be excluded" deny: the statement is then that it was not that side. Two of these in a clause cannot
   be resolved (Statement.unclear).
5. No move and no turn are statements too ("the position is unchanged", "no rotation"), unless another axis is meant (up, forward, pitch,
   roll) or something else than the camera stands still.
6. What is taken back later was said nevertheless.
7. A description of what one image shows, and of movements along other axes, is not looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest

from actial_fast.data.cot import vocabulary as v
from actial_fast.data.cot.clauses import (
    by_camera,
    frame_of,
    is_bare,
    it_is_the_camera,
    kind_at,
    number_of,
    of_the_first,
    only_frame,
    stated,
    told_of,
    without_places,
)
from actial_fast.data.cot.wording import DENIES, Clause, Sentence, sentences


@dataclass(frozen=True)
class Statement:
    """One statement.

    about: ego_translation, object_translation, ego_rotation, orbit (the sense round the object, from above), gain or loss (the flank that
    is seen more or less), frames (whether the two frames' sides swap), angle, picture (an argument from positions in the picture).
    value: left, right, none; counterclockwise or clockwise; swapped or same; "" for an angle. denied: it is said not to be that.
    loose: whose left it is was taken from another sentence. unclear: that it is said cannot be resolved. given: what has to be true of
    the camera for this to count, as a statement. low, high: degrees. of: turn, orbit or either, what an angle is of. said: the sentence.
    """

    about: str
    value: str
    said: str
    denied: bool = False
    loose: bool = False
    unclear: bool = False
    given: Statement | None = None
    low: float = 0.0
    high: float = 0.0
    of: str = ""


def read(text: str) -> list[Statement]:
    """Everything that a chain of thought states of the camera's move and turn, in order."""
    return list(_Reader().read(text))


@dataclass
class _Said:
    """What is carried from clause to clause of a sentence. maybe: it is only considered; conditional: it follows from condition, the first
    statement after an if (None until that is met); denies: the clause before denied what this one says ("I can exclude that ..."); other: a
    label named another axis; frame: whose left and right; before and main: the clause before, and the last one that is no relative clause,
    for their subjects."""

    maybe: bool = False
    conditional: bool = False
    condition: Statement | None = None
    denies: bool = False
    frame: str = ""
    before: str = ""
    main: str = ""
    other: bool = False

    def enter(self, clause: Clause) -> None:
        """Whether a clause is considered, or begins or ends a condition."""
        if clause.joined in v.TURNS_BACK:
            self.conditional, self.condition, self.maybe = False, None, False
        lead = f"{clause.joined} " if clause.joined in ("if", "when") else ""
        start = v.CONDITION.search(lead + clause.rest) or v.GENERALLY.match(lead + clause.rest)
        if start and start.start() < len(lead + clause.text) and not v.HEARD.search(lead + clause.text):
            self.conditional, self.condition = True, None
        told = v.TOLD.search(clause.text) and not v.NOT.search(clause.text)
        self.maybe = self.maybe or bool((v.MAYBE.search(clause.text) and not told) or (clause.label and v.CASE.match(clause.text)))

    def passed(self, found: list[Statement]) -> Iterator[Statement]:
        """The statements under their condition; the first one after an if is the condition."""
        for statement in found:
            if self.conditional and self.condition is None:
                self.condition = statement
            else:
                yield replace(statement, given=self.condition)

    def subject(self, clause: Clause) -> str:
        """The clause whose subject this one shares where it has none of its own."""
        if clause.joined in v.SAME_SUBJECT:
            return self.before
        return self.main if clause.joined in (",", ")") and v.PREDICATE.match(clause.text) else ""

    def leave(self, clause: Clause) -> None:
        """What the next clause has to know of this one."""
        self.other = self.other or bool(clause.label and v.OTHER.search(clause.text))
        self.denies = bool((v.NOT.search(clause.text) and v.THINKS.search(clause.text)) or v.OUT.search(clause.text))
        self.before, self.main = clause.text, self.main if clause.joined in ("which", "who") else clause.text


@dataclass
class _Reader:
    """What is carried from sentence to sentence. kind: what was talked about last (move, turn or other); frame: from where; head and lined:
    the same by a heading, and by how a line begins (begins: now); asked: kind and frame of the question that a line answers; supposing:
    whether the sentence before supposed something."""

    kind: str = ""
    frame: str = ""
    head: str = ""
    begins: bool = False
    lined: str = ""
    line: int = -1
    supposing: bool = False
    asked: tuple[str, str] = ("", "")

    def read(self, text: str) -> Iterator[Statement]:
        before: Sentence | None = None
        for sentence in sentences(text):
            self.begins = sentence.line != self.line
            if self.begins:
                self.line, self.frame, self.lined, self.asked = sentence.line, "", "", ("", "")
            if sentence.asks or v.LISTS.search(sentence.plain):
                self._note(sentence)
            elif self.supposing and v.CONSEQUENCE.match(sentence.plain):
                pass
            else:
                yield from self._sentence(sentence)
            if before is not None:
                yield from _picture(before, sentence)
            before = sentence
        if before is not None:
            yield from _picture(before, None)

    def _note(self, sentence: Sentence) -> None:
        """What a sentence that states nothing is about."""
        self.frame = frame_of(sentence.plain) or self.frame
        self.kind = kind_at(sentence.plain, 0) or self.kind

    def _sentence(self, sentence: Sentence) -> Iterator[Statement]:
        text = sentence.plain
        self.supposing = bool(v.SUPPOSES.match(text))
        for found in v.SWAP.finditer(text):
            one, other = [side for side in found.groups() if side]
            yield Statement("frames", "swapped" if one != other else "same", sentence.said, denied=bool(v.NOT.search(found.group())))
        text = v.SWAP.sub(" ", text)
        text = re.sub(r'"[^"]{1,40}"', "that", text) if v.QUOTES.search(text) else text.replace('"', "")
        if sentence.heads:
            self.head = frame_of(text)
            self.kind = kind_at(text, 0) or self.kind
        if three := v.THREE.search(text):
            for about, said in zip(("ego_translation", "object_translation", "ego_rotation"), three.groups(), strict=True):
                yield Statement(about, said if said in ("left", "right") else "none", sentence.said)
            text = text[: three.start()]
        sentence = replace(sentence, plain=text)
        yield from self._flanks(sentence)
        yield from self._clauses(sentence)

    def _clauses(self, sentence: Sentence) -> Iterator[Statement]:
        said, told_object = _Said(), False
        none: list[Statement] = []
        clauses = sentence.clauses()
        for clause, following in zip_longest(clauses, clauses[1:]):
            said.enter(clause)
            frame = self._framed(clause, following, said, last=clauses[-1] in (clause, following))
            found = list(self._statements(clause, sentence, frame, said))
            if found:
                none = [each for each in found if each.value == "none" and each.about != "ego_rotation"]
            elif only_frame(clause):  # "no movement, neither from the camera's nor from the object's perspective"
                found = [replace(each, about=about) for each in none for about in told_of(clause.text)]
            told_object = told_object or any(each.about == "object_translation" for each in found)
            yield from self._angles(clause, sentence, said.maybe or said.conditional)
            yield from said.passed([] if said.maybe else found)
            said.leave(clause)
        self.frame = said.frame if said.frame == "faced" or (said.frame == "object" and not told_object) else ""

    def _framed(self, clause: Clause, following: Clause | None, said: _Said, *, last: bool) -> str:
        """Whose left and right a clause tells of, as far as its sentence says; what it is about, where it is a label."""
        own = frame_of(clause.text) or ("object" if clause.label and v.THING.match(clause.text) else "")
        if own == "faced" and said.frame in ("camera", "object"):
            own = ""  # what was said before is more certain
        if v.HEARD.search(clause.text):
            own = "object"
        said.frame = own or said.frame
        if asked := v.QUESTION.search(clause.text):
            number = next(i for i, each in enumerate(asked.groups()) if each) % 3
            self.kind = "turn" if number == 2 else "move"
            said.frame = ("camera", "object", said.frame)[number]
            self.asked = self.kind, said.frame
            self.lined = said.frame if self.begins and clause.label else self.lined
        elif v.ANSWERS.search(clause.text) and clause.label and self.asked[0]:
            self.kind, said.frame = self.asked
        elif clause.label and not kind_at(clause.text, 0):
            self.kind = "other" if v.OTHER.search(clause.text) else "move" if own else self.kind
        if clause.label and not said.before and self.begins and own in ("camera", "object"):
            self.lined = own
        if not own and following and last and only_frame(following):
            return frame_of(following.text)  # "it moved to the left, from the object's perspective"
        return said.frame

    def _statements(self, clause: Clause, sentence: Sentence, frame: str, said: _Said) -> Iterator[Statement]:
        """What a clause states of sides and of none, and what it is about."""
        text, subject = without_places(clause.text), said.subject(clause)
        loose = not frame and not self.lined and not self.head and self.frame in ("object", "faced")
        frame = (frame if frame != "faced" else "") or self.lined or frame or self.head or self.frame or "camera"
        if frame == "faced":
            theirs = re.search(r"\b(?:its|my|your|our) (?:own )?(?:left|right)\b", text) or "camera" not in text
            loose, frame = True, "object" if theirs else "camera"
        denials = len(v.NOT.findall(text)) + (clause.joined in DENIES) + bool(v.OUT.search(text)) + said.denies
        sides = list(re.finditer(rf"\b{v.SIDES}\b", text))
        for side in sides:
            kind = kind_at(text, side.start(), is_bare(text) or bool(frame_of(text)))
            if kind == "inherit":
                kind = "turn" if v.TURNING.match(subject) else self.kind or "move"
            if kind not in ("move", "turn") or not by_camera(text, side.start(), subject) or of_the_first(sentence, text):
                continue
            self.kind = kind
            about, value = stated(kind, frame, side.group(), bool(v.BELOW.search(sentence.plain)))
            yield Statement(about, value, sentence.said, bool(denials % 2), loose and about == "object_translation", denials > 1)
        if not sides:
            yield from self._none(text, subject, sentence, frame, loose, denials, said.other)
        kind = kind_at(text, len(text))
        self.kind = "other" if clause.label and v.OTHER.search(text) and not sides else kind or self.kind

    def _none(self, text: str, before: str, sentence: Sentence, frame: str, loose: bool, denials: int, other: bool) -> Iterator[Statement]:
        """That the camera did not move or turn."""
        still, ahead = v.STILL.search(text), v.AHEAD.search(text)
        about = "object_translation" if frame == "object" else "ego_translation"
        if still and by_camera(text, still.start(), before):
            yield Statement(about, "none", sentence.said, bool(denials - ("not change" in text)), loose)
        elif ahead and by_camera(text, ahead.start(), before):
            yield Statement("ego_rotation", "none", sentence.said, bool(denials - ("not change" in text or "without" in text)))
        elif denials and not other and not v.OTHER.search(text) and not v.MERELY.search(text):
            kind = kind_at(text, len(text)) or (self.kind if v.BARE_NONE.search(text) else "")
            cues = [m for m in (v.TURN if kind == "turn" else v.MOVE).finditer(text) if not v.PLACES.match(m.group())]
            if kind not in ("move", "turn") or v.NOT_MOVING.search(text) or not (cues or v.BARE_NONE.search(text)):
                return
            place = cues[0].start() if cues else 0
            there_is = bool(v.NONE_OF.search(text[:place]) or "nowhere" in text) or not cues or denials > len(v.NOT.findall(text))
            done = v.NOT_DONE.search(text[:place]) and by_camera(text, place, before) and it_is_the_camera(text, place, sentence)
            if there_is or done:
                yield Statement(about if kind == "move" else "ego_rotation", "none", sentence.said, denials > 1, loose)

    def _angles(self, clause: Clause, sentence: Sentence, considered: bool) -> Iterator[Statement]:
        """Degrees, and what they are of."""
        found = [(m.start(), number_of(m[1]), number_of(m[2] or m[1])) for m in v.DEGREES.finditer(clause.text)]
        for turn, pattern in ((90.0, v.QUARTER), (180.0, v.HALF)):
            found += [(m.start(), turn, turn) for m in pattern.finditer(clause.text)]
        for start, low, high in [] if considered else found:
            cues = [("turn", v.TURN), ("orbit", v.MOVE), ("orbit", v.ORBITS), ("", v.NO_ANGLE)]
            before = [(m.start(), of) for of, pattern in cues for m in pattern.finditer(clause.text) if m.start() <= start]
            after = [(-m.start(), of) for of, pattern in cues for m in pattern.finditer(clause.text) if m.start() > start]
            of = max(before or after)[1] if before or after else {"turn": "turn", "move": "orbit"}.get(self.kind, "")
            bound = v.BOUND.search(clause.text[:start])
            if of and not v.NOT.search(clause.text[:start]):
                if bound:
                    low, high = (low, 360.0) if bound["least"] else (0.0, high)
                yield Statement("angle", "", sentence.said, low=min(low, high), high=max(low, high), of=of)

    def _flanks(self, sentence: Sentence) -> Iterator[Statement]:
        """Which flank is said to have come into view, or gone."""
        text, maybe = v.ASIDE.sub(" ", sentence.plain), False
        for piece in v.SEPARATE.split(text):
            maybe = bool(v.MAYBE.search(piece)) or (maybe and not v.BACK.search(text[: text.find(piece)]))
            if maybe or v.NOT.search(piece) or v.CONDITION.search(piece) or self.supposing or not v.PARTS.search(piece):
                continue
            gain, loss = v.GAIN.search(piece), v.LOSS.search(piece)
            own = {m[1] for m in re.finditer(r"\b\w+'s own (left|right)\b", piece)}
            placed = {next(filter(None, m.groups())) for pattern in (v.PLACED, v.ADJECTIVE) for m in re.finditer(pattern, piece)}
            if bool(gain) == bool(loss) or (v.OWN_OBJECT.search(piece) and not own) or re.search(r"\bits (?:own )?(?:left|right)\b", piece):
                continue
            sides, frame = (own, "object") if own else (placed, "camera")
            if len(sides) == 1:
                yield Statement("gain" if gain else "loss", sides.pop(), sentence.said, of=frame)


def _picture(one: Sentence, following: Sentence | None) -> Iterator[Statement]:
    """An argument from where things stand in the picture: something else than the camera went to a side of it, and so the camera did."""
    found = v.SHIFTED.search(one.plain)
    if not found or not v.FRAMED.search(one.plain) or v.GIVES_UP.search(one.plain):
        return
    concluded = [each.plain for each in (one, following) if each is not None and v.SO.search(each.plain) and "camera" in each.plain]
    if concluded:
        yield Statement("picture", "", one.said)


def speaks_of(text: str) -> set[str]:
    """Which of the translations and the rotation a chain of thought speaks of at all: in a sentence with a word of theirs, and a side or a
    denial."""
    found = set()
    for sentence in sentences(text):
        if not re.search(rf"\b{v.SIDES}\b", sentence.plain) and not v.NOT.search(sentence.plain) and not v.STILL.search(sentence.plain):
            continue
        if v.TURN.search(sentence.plain):
            found.add("ego_rotation")
        if told_of(sentence.plain)[:1] == ["object_translation"] or any(v.THING.match(clause.text) for clause in sentence.clauses()):
            found.add("object_translation")
        if v.MOVE.search(sentence.plain):
            found.add("ego_translation")
    return found
