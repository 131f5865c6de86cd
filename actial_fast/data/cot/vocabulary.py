"""The words that reading.py knows: of moves, turns, frames, denials, angles; to be read beside its rules. What they miss is added here."""

from __future__ import annotations

import re

SIDES = r"(left|right|counterclockwise|clockwise)"
MOVE = re.compile(
    r"\b(?:mov(?:e|es|ed|ing|ement|ements)|shift(?:s|ed|ing)?|(?:side-?)?step(?:s|ped|ping)?|walk(?:s|"
    r"ed|ing)?|went|go(?:es|ing|ne)?|slid(?:e|es|ing)?"
    r"|translat(?:e|es|ed|ing|ion|ions)|travel(?:s|led|ling|ed|ing)?|relocat(?:e|es|ed|ing|ion)|displac(?:e|es|ed|ement)|drift(?:s|ed|ing)?"
    r"|carried|pass(?:es|ed|ing)?|position(?:s|ed)?|stands?|stood|place|spot|vantage|viewpoint|taken from|"
    r"circl(?:e|es|ed|ing)|orbit(?:s|ed|ing)?"
    r"|arc|strafe[sd]?|seen from (?:further|farther|the left|the right|its|a place)|(?:look|looking) at (?:it|"
    r"the \w+) from|sits?|located|swept|sw(?:ings?|ung|inging) a?round|advanced|headed|proceed(?:s|ed)?|"
    r"ran"
    r"|standpoint|trajectory|wander(?:s|ed|ing)?|glid(?:e|es|ed|ing)|reposition(?:s|ed|ing)?|sidle[sd]?|"
    r"(?:com(?:e|es|ing)|came)(?: a?round)?(?= (?:from|to))|progress(?:es|ed)?|migrat\w+|veer(?:s|ed)? off|"
    r"transition(?:s|ed)?|motion|(?:further|farther)(?= (?:to the )?(?:left|right)))\b"
)  # fmt: skip
TURN = re.compile(
    r"\b(?:rotat(?:e|es|ed|ing|ion|ions|ional)|turn(?:s|ed|ing)?(?! (?:away|out|into))|pan(?:s|ned|ning)?|"
    r"yaw(?:s|ed|ing)?|swivel(?:s|led|ling|ed|ing)?"
    r"|sw(?:ing|ings|ung|inging)(?! a?round)|pivot(?:s|ed|ing)?|orientation|oriented|heading|(?:optical |"
    r"viewing )?axis|viewing direction|line of sight|gaze"
    r"|view direction|direction of view|look(?:s|ed|ing)?(?: (?:more|further|farther))? to(?:wards?)?|"
    r"look(?:s|ed|ing)? (?:more|further|farther)"
    r"|point(?:s|ed|ing)?|aim(?:s|ed|ing)?|veer(?:s|ed|ing)?|twist(?:s|ed|ing)?|spun|spin(?:s|ning)?)\b"
)  # fmt: skip
OTHER = re.compile(
    r"\b(?:up|down|upwards?|downwards?|vertical(?:ly)?(?! axis)|height|higher|lower|forwards?|backwards?|"
    r"front ?/ ?back|back|distance|closer|farther"
    r"|pitch(?:es|ed)?|tilt(?:s|ed|ing)?|roll(?:s|ed)?|elevation|scale|zoom(?:s|ed)?|depth|[yz]|in and out)\b"
)
LOOSE_AXIS = re.compile(r"\b(?:vertical axis|up ?/ ?down and)\b")
CAMERA = (
    r"camera(?:-first|-second)?|photographer|viewpoint|vantage point|viewer|observer|lens|cameraman|"
    r"shot|photo|view|position|place|spot|standpoint|"
    r"orientation|axis|direction|heading|gaze|rotation|translation|movement|move|motion|turn|step|shift|"
    r"pan|yaw|slide|trajectory|drift|walk|it|we|i|"
    r"you|one|displacement|relocation|orbit|arc|path|pivot|swing|change|difference|motion|viewing|this|"
    r"that|which|who|he|she|they|answer|aim"
)
CAMERAS = re.compile(rf"\b(?:{CAMERA})\b")
OWNERS = r"(?:camera(?:-first|-second)?|photographer|viewer|observer|lens|image|picture|photo|frame|cameraman|photograph)"
PART = (
    r"(?:flank|side|edge|face|surface|part|half|panel|facet|wall|plane|portion|rim|end|profile|corner|"
    r"pocket|door|ear cup|side panel|side wall)"
)
FOLLOWS = (
    "ones?|displacement|relocation|drift|orbit|arc|path|motion|pivot|component|horizontal|lateral|translational|"
    "rotational|can|will|must|may|does|did|do|were|are|be|been|had|could|should|makes?|shows?|explains?|"
    "means|gives?|keeps?|takes?|requires?|seems?|appears?|however|direction|and|or|to|in|by|of|from|"
    "around|about|while|as|so|because|since|between|relative|along|rather|instead|not|without|with|"
    "through|for|but|after|again|too|then|on|at|when"
    "|until|than|which|was|is|has|have|before|during|translation|movement|move|rotation|turn|shift|"
    "step|pan|yaw|slide|swing|approximately|roughly|some|slightly|also|just"
    "|still|this|it|that|toward|towards|over|under|almost|nearly|more|less|further|only|would|if|the|"
    "would|a|compared|till|where|i|we|around|camera|across|camera-first|camera-second|whereas|against|"
    "within|throughout"
)
# whose left and right
OWN_OBJECT = re.compile(
    rf"\b(?:the |a |its )?(?!{OWNERS}'s)\w+(?:'s|s') (?:own )?(?:left|right)\b(?! (?!(?:side|hand|{FOLLOWS})\b)[a-z])|"
    rf"\b(?:object|subject)'s (?:own )?(?:{SIDES[1:-1]})\b"
)
OWN_CAMERA = re.compile(rf"\b{OWNERS}'s (?:own )?(?:{SIDES[1:-1]})\b|\bits own (?:{SIDES[1:-1]})\b")
TELLS = (
    r"(?:perspective|point of view|viewpoint|view|frame(?: of reference)?|reference frame|coordinates|"
    r"coordinate system|eyes|standpoint|side of things|account|sense|terms|words)"
)
FRAME_CAMERA = re.compile(
    rf"\b{OWNERS}(?:'s)? (?:own )?(?:{TELLS}|itself)\b|\b(?:seen|told|judged|viewed) (?:by|from) the {OWNERS}\b|\bas the {OWNERS} sees\b"
    rf"|\bfor (?:the {OWNERS}|oneself|me|us|yourself)\b|\bego\w*|\bits own {TELLS}\b(?!,? (?:the )?camera)|"
    rf"\b{TELLS} of the {OWNERS}|\bfrom the {OWNERS}'s(?! \w)|^(?:the )?{OWNERS}$|\b(?:in|by) (?:the )?{OWNERS} (?:frame|"
    rf"coordinates)\b|\b{OWNERS}-cent\w+"
)
FRAME_OBJECT = re.compile(
    rf"\b(?!{OWNERS}\b)(?:\w+'s|\w+s'|its(?! own)|object|subject) (?:own |horizontal )*{TELLS}\b|\b(?:told|"
    rf"seen|viewed|judged|described|watched|observed|faced|perceived) (?:by|from) (?:the|this|that) (?!{OWNERS}\b)"
    rf"(?!(?:same|very|second|first|other|left|right|side|front|back|above|below|place|further|farther|new)\b)\w+"
    rf"|\bfor (?:the|this|that|a|any|an) (?!to\b|{OWNERS}\b)(?!(?:first|second|third|rotation|turn|orientation|"
    r"question|other|same|last|move|translation|angle|yaw|final|answer|two|three|position|reason|horizontal|"
    r"viewing|direction)\b)\w+"
    rf"|\b(?:from|in) (?:the|its) (?!{OWNERS}'s)\w+'s(?! \w)|^(?:the )?(?:object|subject)$|\bfor (?:them|"
    r"him|her|it)\b|(?<!\bi )(?<!\bwe )(?<!you )(?<!camera )(?<!photographer )\bwould (?:have )?(?:say|"
    r"said|see|seen|notice|noticed|describe|report|observe|tell|watched|agree|confirm)\b|\b(?:myself|ourselves|yourself|"
    rf"oneself) (?:as|in|into|where|being) the (?!{OWNERS}\b)\w+|\bfrom the (?!{OWNERS}'s)\w+'s (?:position|"
    rf"place|spot)\b|\bhas camera-second on its\b|\bits own {TELLS},? (?:the )?camera\b|\b(?:point of view|"
    rf"viewpoint|perspective|frame|standpoint|eyes) of the (?!{OWNERS}\b)\w+|^to (?:the|this|that) (?!{OWNERS}\b|"
    rf"left|right)\w+(?:$| (?:it|this|that|the camera)\b)|(?:or|and|nor) the (?!{OWNERS})\w+'s$|\bwith respect to the (?!{OWNERS}\b)\w+|"
    rf"\b(?:in|into) the (?!{OWNERS}\b)\w+(?:'s)? (?:place|shoes)\b|\bobject frame\b|\bobject-cent\w+"
    r"|\bin terms of the (?!rotation|orientation|position|translation|scene|{OWNERS})\w+|\bstanding (?:in|"
    r"where|on)\b|\b(?:imagin\w+|comparing) (?:being|to be|that (?:we|you|i) (?:are|"
    rf"were|am)) (?:the|that|this|in)\b|\bthe (?!left|right|{OWNERS}\b)\w+(?: (?!to\b)\w+)? (?:would |will |might )?(?:says?|"
    r"sees?|saw|notices?|notes|finds?|describes?|calls?|reports?|experiences?|observes?|perceives?|registers?|"
    r"watches)\b"
    rf"|\b(?:object|subject|thing) (?:would )?(?:says?|sees?|saw|notices?|finds?|describes?)\b"
)
FACES = re.compile(
    rf"\b(?!(?:{PART}|{OWNERS}|which|that|and)\b)\w+ (?:that |which )?(?:looks? (?:straight )?(?:back )?at|"
    r"faces?|facing|looking (?:straight )?(?:back )?at|stares? (?:back )?at) "
    r"(?:the |at )?(?:camera(?:-first)?|lens|photographer)\b(?! more)|\babout the (?:object|subject)\b"
)
SEES = re.compile(
    r"^(?:and )?(?:it |he |she |they )?(?:would |will |does not |did not |does )?(?:sees?|saw|finds?|"
    r"notices?|notes|says?|observes?|watch(?:es|ed)|perceives?|registers?|experiences?|reports?|calls|"
    r"describes?|witness(?:es|ed))\b"
)
# what is only considered
MAYBE = re.compile(
    r"\b(?:would(?! (?:guess|estimate|say|put|reckon)\b)|could|might|may (?:look|seem|appear|think|be tempted)|"
    r"should (?:have|then)|at first (?:glance|sight)|one (?:may|can) think|tempt\w+|normally|usually"
    r"|typically|as a rule|expect\w*|it seems as|looks as if|appears as if|intuitively)\b"
)
HEARD = re.compile(r"\b(?:if (?:you|one|we|i) (?:asked?|could ask)|(?:could|able to) (?:see|look|speak|talk|tell)|had eyes|asked the)\b")
TOLD = re.compile(
    r"\bwould (?:have )?(?:seen|said|noticed|watched|agree|confirm|put it|speak of|call it|say|see|describe|"
    r"notice|report|call|tell|find|observe)\b"
)
CONDITION = re.compile(
    r"^(?:if|(?:had|were) (?:the|it|he|she|they|a)|suppose|supposing|assume|assuming|let us (?:suppose|assume)|imagine (?:that )?"
    r"(?:the|a) camera)\b"
    r"|\b(?:when|whenever) (?:an?|any|you|one|we|someone|anyone)\b|\ba (?:camera|photographer|viewer|person) (?:that|who|which)\b"
    r"|\b(?:you|one) (?:uncovers?|sees?|gets?|needs?|has|have|do(?:es)? not)\b"
    r"|^(?:moving|going|stepping|walking|turning|rotating|panning) (?:to )?(?:the )?(?:left|right)\b.*\b(?:uncover|"
    r"reveal|mean|require|expose|show|bring)"
)
CONSEQUENCE = re.compile(r"^(?:then|in that case|that would|this would|it would|in this case)\b")
TURNS_BACK = ("but", "yet", "though", "although", "so", "therefore", "hence", "thus")  # what ends a condition
NOT = re.compile(r"\b(?:not|never|no|none|without|can not|neither|nor|nowhere|unlikely)\b|\brather than\b|\binstead of\b")
OUT = re.compile(
    r"\b(?:excluded?|rules? out|ruled? (?:it )?out|eliminated?|impossible|inconsistent|incorrect|wrong|"
    r"contradict(?:s|ed)?|does not fit|discarded?|rejected?)\b"
)
MERELY = re.compile(
    r"\b(?:simply|merely|just|only|pure(?:ly)?|alone|in place|enough|necessarily|far|much|very|a lot|"
    r"of (?:more|less|about|around|over|at)|any (?:more|longer)|what counts)\b"
)
STILL = re.compile(
    r"\b(?:position|place|spot|viewpoint|location)\b.{0,25}\b(?:unchanged|same|not change[d]?|fixed|constant)\b"
    r"|\b(?:same|unchanged|identical) (?:\w+ )?(?:position|place|spot|viewpoint|location)\b|\b(?:stay(?:s|"
    r"ed)?|remain(?:s|ed)?) (?:in place|put)\b"
)
AHEAD = re.compile(
    r"\b(?:orientation|viewing direction|direction|heading|axis|rotation|yaw)\b.{0,40}\b(?:unchanged|same|not change[d]?|constant|fixed)\b"
    r"|\b(?:same|unchanged|identical|kept its|keeps its|kept the) (?:\w+ )?(?:orientation|viewing direction|heading|direction)\b"
    r"|\bwithout turning\b"
)
GAIN = re.compile(
    r"\b(?:more of|(?:far |much )?(?:more|better)(?: clearly| directly)? (?:visible|exposed|open|front\w*)|"
    r"com(?:e|es|ing) (?:round|around|into view|to the front)"
    r"|faces? (?:us|the camera|the lens)(?: more| now)?|facing (?:us|the (?:camera|lens))|(?:is|are|"
    r"been|becomes?|now) (?:more )?(?:exposed|uncovered|revealed)|open(?:s|ed) up"
    r"|(?:seen|visible) (?:more|better|frontally)|gain\w*|dominat\w+|become visible|becomes visible|"
    r"head-on|turned (?:to|towards?) us|appearance of|faces the camera more|became the front|become the front)\b"
)
LOSS = re.compile(
    r"\b(?<!was )(?<!were )(?<!been )(?:less of|less visible|(?:exposed|visible) less|turn(?:s|ed) away|"
    r"out of sight|no longer visible|not visible any ?more|disappear\w*"
    r"|now hidden|is hidden|are hidden|hidden more|has closed)\b"
)
SEPARATE = re.compile(r"[,;()]\s*(?:and|while|whereas|but|so)?|\bwhile\b|\bwhereas\b|\band (?=the\b)|\bbut\b|\bso\b")
PLACED = rf"(?:\bon|\bat|\bnear|\btowards?|\bto|\bin) (?:the )?(?:far |very |extreme )?(left|right)(?: (?:{PART}))?\b"
ADJECTIVE = re.compile(rf"\b(left|right)(?: \w+)? {PART}\b|\b(left|right) {PART}\b")
SWAP = re.compile(
    rf"\b{OWNERS}'s (left|right) (?:translation|move|movement|shift|displacement) is (?:a )?(left|right)\b|"
    rf"\bhas its (left|right) where (?:the )?{OWNERS} has its (left|right)\b|"
    rf"\b{OWNERS}(?:'s| calls) (left|right)(?: side)? (?:is|becomes|corresponds to|means|equals) (?:therefore |"
    rf"also |then |thus )?(?:at |on )?(?:the )?(?!{OWNERS})\w+(?:'s)? (?:own )?(left|right)\b"
    r"|\b(?:\w+'s|its) (?:own )?(left|right)(?: side| hand)? (?:is|corresponds to|becomes|lies) (?:therefore |"
    rf"also |then |thus )?(?:at |on )?(?:the )?(?:{OWNERS}'s|our) (left|right)\b"
)
NUMBERS = {
    word: value
    for words, value in (
        ("five ten fifteen twenty twenty-five thirty thirty-five forty forty-five fifty fifty-five sixty sixty-five seventy seventy-five "
    "eighty", 5),
        ("eighty-five ninety ninety-five", 85),
    )
    for value, word in zip(range(value, 200, 5), words.split(), strict=False)
}  # fmt: skip
NUMBER = r"(?:\d+(?:\.\d+)?|" + "|".join(sorted((w.replace("-", "[- ]") for w in NUMBERS), key=len, reverse=True)) + ")"
DEGREES = re.compile(rf"({NUMBER})(?: ?(?:\u00b0|degrees?))?(?: (?:to|and|or) ({NUMBER}))?[ -]?(?:\u00b0|degrees?\b|deg\b)")
QUARTER = re.compile(r"\bquarter[- ](?:of a )?turn\b|\bquarter of the way\b")
HALF = re.compile(r"\b(?:half[- ]turn|u-turn|half (?:a|of a) turn|half of the way)\b")
NO_ANGLE = re.compile(r"\b(?:pitch|tilt|roll|elevation|field of view|fov|downwards?|upwards?|above|below the|spine|normal|each|per)\b")
ORBITS = re.compile(
    r"\b(?:arc|around|circl\w+|orbit\w*|travel\w*|angle between|between the (?:two )?(?:views|viewpoints)|"
    r"views?|through an angle|azimuth\w*)\b"
)
BELOW = re.compile(r"\b(?:from|seen) (?:below|underneath)\b")
FRAMED = re.compile(r"\b(?:frame|picture|image|photo(?:graph)?|border|edge)s?\b")
SO = re.compile(r"\b(?:so|therefore|thus|hence|indicat\w+|suggest\w*|means?|implies|shows? that|must|consequently|since|because|as|when)\b")
GIVES_UP = re.compile(
    r"\b(?:not rely|say(?:s)? nothing|could also|may look|can not (?:tell|decide|be)|misleading|not enough|does not tell)\b"
)

QUESTION = re.compile(
    r"\b(?:question|q|answer)(?: number| no)? ?\(?(?:(1|one)|(2|two)|(3|three))\b|\b(?:(first)|(second)|(third)) (?:question|answer)\b"
)
ANSWERS = re.compile(r"\b(?:answers?|result|conclusion|so)\b")
CASE = re.compile(r"^(?:option|hypothesis|case|possibility|scenario|candidate|alternative) (?:\d|[a-z]|one|two|three|first|second|third)$")
THING = re.compile(
    rf"^(?:the|this|that|and the|as for the) (?!(?:{CAMERA}|{OWNERS}|object)$)(?!.*\b(?:translation|rotation|"
    r"answer|question|movement|images?|result|angle|amount|conclusion|steps?)\b)\w+$|^(?:the )?object$"
)
PARTS = re.compile(rf"\b(?:{PART}|what|parts?|surfaces?|walls?)\b")
BACK = re.compile(r"\b(?:but|yet|so|therefore|instead)\s*$")
FROM = re.compile(r"\b(?:taken|shot|seen|viewed|photographed|look(?:s|ing)? at (?:it|the \w+)) from\b")
SAYS = re.compile(r"\b(?:say|says|see|sees|saw|notices?|describes?|reports?|calls?|finds?)\b")
TURNING = re.compile(
    r"^(?:(?:and|so|then|now) )?(?:the|its|this|that|a|my) (?:\w+ ){0,2}?(?:turn|rotation|yaw|pan|orientation|"
    r"viewing direction|axis|heading|gaze|swing)\b"
)
FURTHER = re.compile(r"\b(?:further|farther)\b")
WEAK = re.compile(r"\b(?:go|goes|going|gone|went|place|position|pass(?:es|ed)?)\b")
ASIDE = re.compile(r",? (?:as )?(?:seen|viewed) (?:in|from) [^,;]*,")
PLACES = re.compile(
    r"\b(?:positions?|place|spot|vantage|viewpoint|standpoint|stands?|stood|sits?|located|taken from|"
    r"trajectory|arc|axis|point(?:s|ing|ed)?)\b"
)
PRONOUN = re.compile(r"\b(?:it|they|this|that|these|those)\b")
NAMED = re.compile(r"\b(?:camera|photographer|viewpoint|viewer|observer|lens|position|orientation|axis|direction)\b")
SAME_SUBJECT = ("that", "which", "who", "and", "but", "yet", "or", "nor")
DETERMINED = re.compile(r"\w+'s\b|(?:the|an?|its|both|my|his|her|their)\b")
NOUN = re.compile(r"\b(?:the|an?|its|both|my|his|her|their) [a-z]|\b\w+'s [a-z]")
LISTS = re.compile(r"\b(?:options|choices|candidates?|possibilities|alternatives)\b")
QUOTES = re.compile(r"\b(?:options?|choices?|answers?|would|candidates?)\b")
THEIR_SIDE = re.compile(r"\b\w+'s (?:own )?(?:left|right) (?:side|hand)\b")
ONE = r"(?:image|picture|photo|photograph|pic|view|shot|frame)"
FIRST = re.compile(rf"\b(?:first {ONE}|{ONE} (?:1|one)|camera-first)\b")
OTHERS = re.compile(rf"\b(?:second|{ONE} (?:2|two)|camera-second|both|between|now|then)\b")
GENERALLY = re.compile(r"^when (?:the (?:camera|photographer|viewer)|it|he|she) \w+s\b")
PREDICATE = re.compile(r"^(?:has|have|is|are|was|were|now|will|does|did)\b")
SUPPOSES = re.compile(r"^(?:now )?(?:suppose|supposing|assume|assuming|let us (?:suppose|assume)|imagine (?:that )?(?:the|a) camera)\b")
THINKS = re.compile(r"\b(?:reason|case|think|say|evidence|sign|believe|true|mean|claim|follow|indication)\b")
ANSWER = r"(?:to the |to its |a )?(left|right|no (?:horizontal )?(?:movement|translation|rotation|turn|move|change)|none)"
THREE = re.compile(rf"(?:^|[:.;,] ?|\b(?:short|is|are) ){ANSWER}, (?:and )?{ANSWER},? (?:and )?{ANSWER}(?=[.!;,]|$)")
BARE_NONE = re.compile(r"^(?:and |with )?(?:none|nothing)\b")
NOT_MOVING = re.compile(
    r"\b(?:object|scene|subject|thing|things) (?:itself )?(?:has|did|does|is|do|have)? ?not\b|\bno(?:ne|"
    r"thing)? (?:else|other)\b|\bnot (?:asked|need|matter)"
)
BOUND = re.compile(
    r"\b(?:(?P<least>at least|more than|over|no less than|exceeding)|at most|less than|under|up to|no more than|within)\b[^\d]{0,12}$"
)
OTHER_SENSE = {"clockwise": "counterclockwise", "counterclockwise": "clockwise"}
SECOND = re.compile(r"\bcamera-second\b")
FILLS = (
    "back|question|where|now|has|have|had|changed|changes?|to|the|its|my|our|your|own|a|an|is|was|it|this|that|"
    "so|hence|thus|therefore|then|also|clearly|from|above|seen|about|degrees|deg|by|and|of|again|viewed|"
    "when|for|camera|side|"
    "direction|in|no|not|answer|horizontally|slightly|far|further|more|yes|here|same|way|simply|approximately|"
    "roughly|around|some|be|must|which|means|i|e|looking|move"
)
SHIFTED = re.compile(
    rf"\b(?!(?:{CAMERA}|no|not|an?|the|any|of|to|is|was|were|has|have|had|are|be|been|also|then|must|"
    r"now|not)\b)\w+ (?:(?:has|have|had|is|are|appears?|seems?|looks?|now|also|to have|be) )*"
    r"(?:shift(?:s|ed|ing)?|mov(?:es?|ed|ing)|drift(?:s|ed|ing)?|slid(?:es?|ing)?|displaced|appears?|"
    r"appeared|jump(?:s|ed)|slip(?:s|ped))\b[^.]{0,40}\b(?:left|right)\b"
)
NONE_OF = re.compile(
    r"\b(?:no (?:evidence|signs?|trace|indication|hint) of(?: any| an?)?|no|without(?: any)?|without a|"
    r"zero|not any|neither|nor) (?:[a-z-]+ ){0,2}$"
)
NOT_DONE = re.compile(r"\b(?:not|never|nor|neither|without) (?:(?!for|of|from|with|by)[a-z-]+ ){0,2}$")
