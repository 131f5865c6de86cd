"""What a reply answers, by rules that are tried one after the other; the first that finds just one answer is believed.

Where in the reply (`said`): inside the only pair of <answer> tags, else behind the last </think>, else all of it; a reply that was cut off
while thinking says nothing. Of a long one the first line and the last 4,000 characters are looked at. For a letter then, in this order:

    letter, letter and point, brackets, bold, backticks, quotes, boxed, math   the whole text is a letter, so marked: B, "B.", (B), **B**
    letter and text    the whole text is a letter and words that are not another option's: "B. Move to the right"
    option text        the whole text is an option's
    boxed              the last \\boxed{B} anywhere
    answer             the last claim anywhere: "the answer is B", "Answer: (B)", "the correct option is B", "I choose B", "B is correct"
    bold, backticks    the only letter so marked
    option             the only one that is named "option B" or "choice B"
    last line, first line   that line by the rules above, unless the lines list several options
    only letter        the only letter that stands by itself, neither an article nor denied ("not B")
    option words       the only option that occurs in the last line and is not denied there; in a line of a few words what tells it from the
                       others is enough ("it moved to the right" is "Move to the right")

A letter with the words of another option ("B. left", where left is A) is a contradiction, and no answer. Letters beyond the item's options
do not count, nor does "A" before a word that it is the article of. "yes" and "no", numbers and texts have their own short lists below.
owners.py has the rules of the benchmarks' own scripts.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence

from actial_fast.data.sources.answers import plain
from actial_fast.data.sources.tags import tagged_answer
from actial_fast.evaluation.items import Extract, Found, Item
from actial_fast.evaluation.numbers import extract_number

MOST = 4000  # characters at the end of an answer that are looked at, besides its first line: what is before is reasoning
LONGEST = 300  # characters of a line in which an option's words are looked for
FEW_WORDS = 15  # of a line in which the word that an option has alone stands for it
MARKS = (  # name, beginning and end of what a letter is wrapped in
    ("bold", "**", "**"),
    ("bold", "__", "__"),
    ("bold", "*", "*"),
    ("backticks", "``", "``"),
    ("backticks", "`", "`"),
    ("quotes", '"', '"'),
    ("quotes", "'", "'"),
    ("quotes", "\u201c", "\u201d"),
    ("boxed", "\\boxed{", "}"),
    ("math", "$", "$"),
    ("math", "\\(", "\\)"),
    ("math", "\\[", "\\]"),
    ("math", "\\text{", "}"),
    ("math", "\\mathrm{", "}"),
    ("math", "\\textbf{", "}"),
    ("brackets", "(", ")"),
    ("brackets", "[", "]"),
    ("brackets", "{", "}"),
    ("brackets", "\uff08", "\uff09"),
)
POINTS = ".,:;!)]\u3002\uff0e\uff1a"
BE = r"(?:is|would\s+be|must\s+be|should\s+be|has\s+to\s+be)"
CLAIM = re.compile(
    rf"(?i)(?<![a-z])(?:answer(?:\s+{BE})?|(?:option|choice)(?:\s+{BE}|(?=[*_]*\s*[:=]))|choose|chose|pick|select|go\s+with|going\s+with)"
    r"(?:\s+(?:option|choice|answer|letter))?[*_]{0,2}\s*(?:[:=]|\u2192|->)?\s*(?:(?:option|choice|letter)\s+)?"
)
NAMED = re.compile(r"(?i)(?<![a-z])(?:option|choice|letter)\s*")
WRONG = re.compile(
    r"[)\]}.*_`\"']*\s+(?:is|was|seems|can be|cannot be)\s+(?:wrong|incorrect|false|not|excluded|eliminated|ruled out|correct\?)"
)
CONFIRMED = re.compile(
    r"(?:(?<![A-Za-z0-9])[A-Z]|(?<=\()[a-z](?=\))|(?<=option )[a-z])[)\]}.*_`\"']*\s+(?:is|was|must be)\s+(?:the\s+)?"
    r"(?:correct|right|true|best|answer)\b"
)
AT = re.compile(r"(?:\\boxed\{|\\text\{|\\mathrm\{|[*_`\"'(\[{$\\<\u201c\uff08 ])*([A-Za-z])(?![A-Za-z0-9'\u2019])")
MORE = re.compile(
    r"[)\]}*_`\"']*\s*(?:,|/|&|\band\b|\bor\b)\s*(?:option\s+)?[(\[*`\"']*(?:[A-Z](?![A-Za-z0-9'\u2019])|[a-z](?![A-Za-z0-9'\u2019]|\s+[a-z]))"
)
ALONE = re.compile(r"(?<![A-Za-z0-9'\u2019.\\-])([A-Z])(?![A-Za-z0-9'\u2019-]|\.[A-Za-z])")
ARTICLE = re.compile(r"\s+(?!(?:because|since|as|is|was|for|given|due|based|which|where|with|from|according|and|or|that|but)\b)[a-z]")
LABELLED = re.compile(r"[(\[*_]*([A-Za-z])[*_]*\s*(?:[).:\]\u3002\uff1a]|,|\s[-\u2013\u2014])[*_]*\s*(\S.*)")
ONE_LINE = re.compile(r"(?m)^\s*[-*\s]*[(\[*_]*([A-Z])[*_]*[).:\]]")
FILLER = r"to|be|the|a|an|at|in|on|option|choice|answer|it|it's|is|towards?|move[sd]?|movement|necessarily|simply"  # behind "not"
DENIED = re.compile(
    r"(?i)(?:\b(?:not|no|never|neither|nor|no longer|cannot be|rather than|instead of|without|exclud\w+|eliminat\w+|rul\w+ out)|n't)"
    rf"(?:[ \t]+(?:{FILLER}))*[ \t]*[(\[*_`\"']*$"
)
YES = {"yes": "yes", "yeah": "yes", "yep": "yes", "true": "yes", "no": "no", "nope": "no", "false": "no"}
YES_WORD = re.compile(r"(?i)(?<![a-z'\u2019-])(yes|yeah|yep|true|no|nope|false)(?![a-z'\u2019-])")


CONTRADICTION = Found(None, "contradiction")


def rules(item: Item, reply: str) -> Found:
    """What a reply answers by this project's rules (see above), in the form of the item's answers."""
    place, text = said(reply)
    if len(text) > MOST:
        text = f"{text[:LONGEST].lstrip().splitlines()[0] if text[:LONGEST].strip() else ''}\n{text[-MOST:]}"
    found = BY_FORM[item.form](item, text) if text.strip() else Found(None)
    if found.text is None:
        return Found(None)
    return Found(found.text, f"{place}: {found.rule}" if place else found.rule)


def said(reply: str) -> tuple[str, str]:
    """Where the answer stands in a reply, and that part: ("answer tags", ...), ("after think", ...) or ("", the whole reply)."""
    if (tagged := tagged_answer(reply)) is not None:
        return "answer tags", tagged
    before, closed, after = reply.rpartition("</think>")
    if "<think>" in after:
        return "", ""
    return ("after think", after.strip()) if closed else ("", before + after)


def extract_letter(item: Item, text: str) -> Found:
    """The letter of the option that a text names."""
    text = text.strip()
    if (found := whole(item, text)).text or found == CONTRADICTION:
        return found
    for name, rule in EVERYWHERE:
        if letter := rule(item, text):
            return Found(letter, name)
    letter, words = _only(item, text), mentioned(item, text)
    if letter and words and letter != words:
        return CONTRADICTION
    return Found(letter or words or None, "only letter" if letter else "option words")


def whole(item: Item, text: str) -> Found:
    """The letter that all of a text is: a letter in marks, a letter and words, or an option's words."""
    inner, mark = text.strip(), ""
    while True:
        short = inner.rstrip(POINTS + " ")
        if len(short) == 1 and short.upper() in item.letters:
            return Found(short.upper(), mark or ("letter" if short == inner else "letter and point"))
        for name, left, right in MARKS:
            for candidate in (inner, inner.rstrip(".,:; ")):
                middle = candidate[len(left) : len(candidate) - len(right)]
                if (
                    len(candidate) > len(left) + len(right)
                    and candidate == left + middle + right
                    and left not in middle + right * (left != right)
                ):
                    break
            else:
                continue
            inner, mark = middle.strip(), mark or name
            break
        else:
            break
    if letter := _option(item, inner):
        return Found(letter, mark or "option text")
    both = LABELLED.fullmatch(inner.split("\n")[0].strip()) if "\n" not in inner.strip() else None
    if both and (letter := both.group(1).upper()) in item.letters and not MORE.match(inner, both.end(1)):
        named = _option(item, both.group(2).rstrip("*_` "))
        if named and named != letter:
            return CONTRADICTION
        if named or (both.group(1).isupper() and _explains(letter, inner, both)):
            return Found(letter, mark or "letter and text")
    return Found(None)


def _explains(letter: str, text: str, both: re.Match[str]) -> bool:
    """Whether what follows a letter neither takes it back nor names another."""
    rest = both.group(2)
    others = {match.group(1) for match in ALONE.finditer(rest) if not (match.group(1) == "A" and ARTICLE.match(rest, match.end()))}
    return not (WRONG.match(text, both.end(1)) or CLAIM.search(rest) or others - {letter, "I"})


def _option(item: Item, text: str) -> str:
    """The letter of the only option that has this text, '' if there is none."""
    said = plain(text)
    same = [letter for letter, option in zip(item.letters, item.options, strict=False) if said and plain(option) == said]
    return same[0] if len(same) == 1 else ""


def _boxed(item: Item, text: str) -> str:
    found = re.findall(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*+)\}", text)
    return (whole(item, found[-1]).text or "") if found else ""


def _claimed(item: Item, text: str) -> str:
    """The letter of the last claim; '' if that names several."""
    last, letter = -1, ""
    for claim in CLAIM.finditer(text):
        at = AT.match(text, claim.end())
        if at and not _denied(text, claim.start()):
            found, after = at.group(1), text[at.end() : at.end() + 40]
            if WRONG.match(after) or (found.islower() and re.match(r"\s+[a-z]", after)) or (found == "A" and ARTICLE.match(after)):
                continue
            last, letter = at.start(1), "" if MORE.match(text, at.end()) else found.upper()
        elif words := _option(item, re.split(r"[.!?](?:\s|$)|\n", text[claim.end() :])[0]):
            last, letter = claim.end(), words
    for claim in CONFIRMED.finditer(text):
        if claim.start() > last and not _denied(text, claim.start()):
            last, letter = claim.start(), claim.group()[0].upper()
    return letter if letter and letter in item.letters else ""


def _named(item: Item, text: str) -> str:
    """The letter of the only option that is called by its letter; '' where two are, or it is said to be wrong."""
    found = set()
    for name in NAMED.finditer(text):
        at = AT.match(text, name.end())
        if at and at.group(1).isupper() and not WRONG.match(text, at.end()) and not _denied(text, name.start()):
            found |= {at.group(1)} if not MORE.match(text, at.end()) else {at.group(1), ""}
    return found.pop() if len(found) == 1 and found <= set(item.letters) else ""


def _marked(name: str) -> Callable[[Item, str], str]:
    marks = [(left, right) for each, left, right in MARKS if each == name]

    def rule(item: Item, text: str) -> str:
        found = set()
        for left, right in marks:
            for match in re.finditer(rf"{re.escape(left)}([^\n*`]{{1,{LONGEST}}}?){re.escape(right)}", text):
                if not _denied(text, match.start()) and (letter := whole(item, match.group(1)).text):
                    found.add(letter)
        return found.pop() if len(found) == 1 else ""

    return rule


def _line(which: int) -> Callable[[Item, str], str]:
    def rule(item: Item, text: str) -> str:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if len(lines) < 2 or len(set(ONE_LINE.findall(text))) > 1:
            return ""
        return whole(item, lines[which]).text or _claimed(item, lines[which])

    return rule


def _only(item: Item, text: str) -> str:
    """The only letter of an option that stands by itself; '' where the options' own texts have such letters."""
    if any(ALONE.search(option) for option in item.options):
        return ""
    found = set()
    for match in ALONE.finditer(text):
        letter = match.group(1)
        if letter == "A" and ARTICLE.match(text, match.end()):
            continue
        if letter == "I" and re.match(r"\s+[a-z]", text[match.end() :]):
            continue
        if not _denied(text, match.start()) and not WRONG.match(text, match.end()):
            found.add(letter)
    return found.pop() if len(found) == 1 and found <= set(item.letters) else ""


def mentioned(item: Item, text: str) -> str:
    """The letter of the only option that occurs in the text's last line and is not denied there; '' if there is not just one."""
    lines = [line for line in text.splitlines() if line.strip()]
    line = re.sub(r"[*_`]", "", lines[-1]) if lines else ""
    if len(line) > LONGEST or (ONE_LINE.match(line) and len(set(ONE_LINE.findall(text))) > 1):
        return ""
    if letter := _occurring(item, [option.strip().rstrip(".") for option in item.options], line):
        return letter
    words = [set(re.findall(r"[\w.-]*\w", option.casefold())) for option in item.options]
    own = [each - set().union(*words[:n], *words[n + 1 :]) for n, each in enumerate(words)]
    few = len(line.split()) <= FEW_WORDS
    return _occurring(item, ["".join(each) if len(each) == 1 else "" for each in own], line) if few else ""


def _occurring(item: Item, texts: Sequence[str], line: str) -> str:
    """The letter of the only one of these texts, one an option, that occurs as words and is not denied; the longest are looked for first,
    so that "front-left" is not also "left"."""
    found = set()
    for letter, option in sorted(zip(item.letters, texts, strict=False), key=lambda pair: -len(pair[1])):
        words = re.compile(rf"(?i)(?<![\w.]){re.escape(option)}(?![\w]|\.\d)") if option else None
        while words and (match := words.search(line)):
            if not _denied(line, match.start()):
                found.add(letter)
            line = line[: match.start()] + "\0" * (match.end() - match.start()) + line[match.end() :]
    return found.pop() if len(found) == 1 else ""


def _denied(text: str, at: int) -> bool:
    return bool(DENIED.search(text[max(0, at - 60) : at]))


EVERYWHERE: tuple[tuple[str, Callable[[Item, str], str]], ...] = (
    ("boxed", _boxed),
    ("answer", _claimed),
    ("bold", _marked("bold")),
    ("backticks", _marked("backticks")),
    ("option", _named),
    ("last line", _line(-1)),
    ("first line", _line(0)),
)


def extract_option(item: Item, text: str) -> Found:
    """The text of the option that a reply names in words: letters say nothing where none are shown."""
    claims = [re.split(r"[.!?](?:\s|$)|\n", text[claim.end() :])[0] for claim in CLAIM.finditer(text)]
    tries: Sequence[tuple[str, str]] = [("option text", _option(item, text)), *(("answer", _option(item, claim)) for claim in claims[::-1])]
    for rule, letter in (*tries, ("option words", mentioned(item, text))):
        if letter:
            return Found(item.options[item.letters.index(letter)], rule)
    return Found(None)


def extract_yes_no(item: Item, text: str) -> Found:
    """yes or no: the whole text, the last \\boxed{}, the last claim, the first word, the last or the only one (true and false too)."""
    if word := YES.get(plain(text)):
        return Found(word, "whole")
    if (boxed := re.findall(r"\\boxed\{(?:\\text\{)?\s*(\w+)", text)) and (word := YES.get(boxed[-1].lower())):
        return Found(word, "boxed")
    claims = re.findall(r"(?i)\banswer(?:\s+is)?[*_]{0,2}\s*[:=]?\s*[*_`\"'(]*(yes|no|true|false)\b", text)
    if claims:
        return Found(YES[claims[-1].lower()], "answer")
    if first := re.match(r"(?i)[\s*_`\"'(]*(yes|no|yeah|yep|nope|true|false)\b(?=\s*[,.;:!*_\"')\n\u2014-]|\s*$)", text):
        return Found(YES[first.group(1).lower()], "first word")
    if last := re.search(r"(?i)(?:^|[.,:;!?\n*\u2014-]\s*)(yes|no|true|false)[.!*_`\"')\s]*$", text):
        return Found(YES[last.group(1).lower()], "last word")
    words = {YES[match.group(1).lower()] for match in YES_WORD.finditer(text) if not _denied(text, match.start())}
    return Found(words.pop(), "only word") if len(words) == 1 else Found(None)


def extract_text(item: Item, text: str) -> Found:
    """The text as it is: what it is worth is for answers.matches to say."""
    return Found(text.strip(), "text")


BY_FORM: dict[str, Extract] = {
    "letter": extract_letter,
    "option": extract_option,
    "yes-no": extract_yes_no,
    "number": extract_number,
    "text": extract_text,
}


def custom(name: str) -> Extract:
    """The user's own rule, `module:function` from the import path: called with the reply and the item, it gives the answer or None.

    Raises ValueError when there is none, and when it gives anything else."""
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ValueError(f"unknown extractor {name!r}; use rules, owner, paper, or module:function for your own")
    try:
        call = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"extractor {name!r} cannot be imported ({error}); is the module on PYTHONPATH?") from error
    except Exception as error:
        raise ValueError(f"extractor {name!r} cannot be imported: its module raises {type(error).__name__}: {error}") from error
    if not callable(call):
        raise ValueError(f"extractor {name!r} is a {type(call).__name__}, not a function of (reply, item)")

    def extract(item: Item, reply: str) -> Found:
        answer = call(reply, item)
        if answer is not None and not isinstance(answer, str):
            raise ValueError(f"extractor {name!r} gave {answer!r} for {item.id}; it gives the answer as text, or None")
        return Found(answer, name if answer is not None else "")

    return extract
