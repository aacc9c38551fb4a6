r"""How numbers are written: digits, separators, signs and LaTeX brought to one form, and what may change a number.

`plain_text` gives the form that the patterns here expect: ASCII digits and signs, no thousands separators, no LaTeX.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

# A number without its sign as it may be written, and as `plain_text` leaves it. The counts are bounded, so that a
# pattern takes time linear in the text; a run of more digits is no number.
DIGITS = r"(?:\d{1,3}(?:,\d{3}){1,12}(?!\d|,\d)|\d{1,400})(?:\.\d{1,400})?|\.\d{1,400}"
NUMBER = re.compile(
    r"(?<![A-Za-z_\d])(?:\d{1,400}(?!\d)(?:\.\d{1,400}(?!\d))?|(?<!\d)\.\d{1,400}(?!\d))"
    r"(?:[eE][-+]?\d{1,2}(?!\w))?",
    re.A,
)

_CURRENCY = r"[$€£¥₹₩₽₪₫₱₦฿¢]"
_SIGNS = str.maketrans(
    {"−": "-", "–": "-", "×": "*", "·": "*", "⋅": "*", "÷": "/", "⁄": "/", "∕": "/", "％": "%", "٪": "%", "…": "..."}
    | dict.fromkeys("‐‑‒﹣－", "-")
    | {"٬": ",", "٫": ".", "＄": "$", "（": "(", "）": ")", "＝": "=", "，": ",", "．": "."}
)


def ascii_signs(text: str) -> str:
    """The text with the typographic signs of arithmetic as -, * and /."""
    return text.translate(_SIGNS)


# --- one form ---------------------------------------------------------------------------------------------------------

_NARROW = "\u00a0"  # stands for every space that no line breaks at
_RAISED = "‸"  # stands before what was a superscript
_SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁻"
_CHARACTERS = (
    dict.fromkeys(map(ord, "\u202f\u2009\u2007\u2008\u200a\u2005\u2006"), _NARROW)
    | dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff\u00ad\u200e\u200f\u061c\u2066\u2067\u2068\u2069"), None)
    | dict.fromkeys(map(ord, "₀₁₂₃₄₅₆₇₈₉"), None)
    | str.maketrans(_SUPERSCRIPTS, "0123456789-")
)
_EXOTIC = re.compile(r"[^\x00-\x7f]")
_OF_UNIT = re.compile(rf"(?<=[A-Za-z])(?:[{_SUPERSCRIPTS}]{{1,3}}|\^\{{?-?[0-9]\}}?(?!\d))")  # m², cm^2
_POWER = re.compile(rf"(?<![{_SUPERSCRIPTS}])(?=[{_SUPERSCRIPTS}])")

# LaTeX: commands that only dress a text, those that stand for a sign, fractions, spaces.
_FRACTION = re.compile(r"\\[dtc]?frac\s{0,3}(?:\{([^{}]{1,60})\}|(\d))\s{0,3}(?:\{([^{}]{1,60})\}|(\d))")
_SPACED_GROUP = re.compile(r"(?<=\d)\\[,;: ](?=\d{3}(?!\d))")
_COMMAND = re.compile(r"\\([A-Za-z]+)|\\(.)", re.S)
_DRESS = frozenset(
    "boxed fbox text textbf textit textrm mathrm mathbf mathit mathsf mbox left right displaystyle big Big bigg Bigg "
    "quad qquad hspace color".split()
)
_COMMANDS = {
    "times": "*", "cdot": "*", "ast": "*", "div": "/", "pm": "±", "mp": "±", "sqrt": "√", "pi": "π", "infty": "∞",
    "le": "≤", "leq": "≤", "lt": "<", "ge": "≥", "geq": "≥", "gt": ">", "ne": "≠", "neq": "≠", "circ": "°",
    "degree": "°", "dots": "...", "ldots": "...", "cdots": "...", "overline": "‾", "bar": "‾", "dot": "‾",
    "approx": "≈", "sim": "≈", "euro": "€", "pounds": "£", "percent": "%",
}  # fmt: skip
_ESCAPED = {"$": "$", "%": "%", "#": "#", "&": "&", "_": " ", "!": "", "\\": "\n"}
_MARKUP = re.compile(r"</?[A-Za-z][\w-]{0,20}>")

# Separators of thousands: one kind in one number, groups of three (of two before them in India). A space that breaks
# lines separates them where the reader says so, because it separates words as well.
_GROUPS = re.compile(rf"(?<![\d.,])[1-9]\d{{0,2}}([,{_NARROW}'’_])\d{{3}}(?:\1\d{{3}}){{0,11}}(?!\d|\1\d|,\d)", re.A)
_SPACED_GROUPS = re.compile(r"(?<![\d.,/] )(?<![\d.,])[1-9]\d{0,2}( )\d{3}(?:\1\d{3}){0,11}(?!\d|\1\d|,\d| ?/)", re.A)
_INDIAN = re.compile(r"(?<![\d.,])[1-9]\d?(?:,\d{2}){1,8},\d{3}(?!\d|,\d)", re.A)
_EUROPEAN = re.compile(
    r"(?<![\d.,])[1-9]\d{0,2}(?:\.\d{3}){1,11}(?:,\d{1,12}(?![\d,.]\d)|(?<=\.\d{3}\.\d{3})(?![\d.,]\d))", re.A
)
_SCIENTIFIC = re.compile(r"(?<![\d.])(\d{1,40}(?:\.\d{1,40})?)\s?[*x]\s?10\s?[\^‸]\s?\(?(-?\d{1,2})\)?(?!\d)", re.A)
_CURRENCY_WORD = re.compile(
    rf"\b(?:USD|EUR|GBP|JPY|INR|CAD|AUD|Rs\.?)\s?(?=[-+.\d])|\b(?:US|A|C|CA|HK|NZ)(?={_CURRENCY})"
)


def plain_text(text: str, spaces_group: bool = False) -> str:
    """The text in the one form that the patterns of this module read.

    Args:
        text: any text; the caller bounds its length.
        spaces_group: whether a plain space separates thousands (70 000), as in a short answer. Elsewhere `3 500 ml`
            may be two numbers; a space that no line breaks at separates them everywhere.
    """
    text = ascii_signs(text)
    if not text.isascii():
        text = _OF_UNIT.sub("", text)
        text = _POWER.sub(_RAISED, text).translate(_CHARACTERS)
        text = _EXOTIC.sub(_ascii_digit, text)
    text = _without_latex(_OF_UNIT.sub("", text))
    text = _MARKUP.sub(" ", _CURRENCY_WORD.sub("$", text))

    # Separators go, one kind after the other.
    text = _GROUPS.sub(lambda match: match[0].replace(match[1], ""), text)
    if spaces_group:
        text = _SPACED_GROUPS.sub(lambda match: match[0].replace(" ", ""), text)
    text = _INDIAN.sub(lambda match: match[0].replace(",", ""), text)
    text = _EUROPEAN.sub(lambda match: match[0].replace(".", "").replace(",", "."), text)
    return _SCIENTIFIC.sub(r"\1e\2", text.replace(_NARROW, " "))


def _ascii_digit(match: re.Match[str]) -> str:
    """A digit of another script, or a fraction that is one character, in ASCII; anything else as it is."""
    character = match[0]
    digit = unicodedata.decimal(character, None)
    if digit is not None:
        return str(digit)

    parts = unicodedata.decomposition(character)
    if parts.startswith("<fraction>"):
        codes = [chr(int(code, 16)) for code in parts.split()[1:]]
        return f" {ascii_signs(''.join(codes))} "
    return character


def _without_latex(text: str) -> str:
    """The text without LaTeX: fractions with a slash, signs as characters, unknown commands as words."""
    if "\\" not in text and "{" not in text:
        return text
    text = text.replace("{,}", ",").replace("\\!", "").replace("^{\\circ}", "°").replace("^\\circ", "°")
    text = _SPACED_GROUP.sub(_NARROW, text)
    text = _FRACTION.sub(lambda match: f" {match[1] or match[2]}/{match[3] or match[4]} ", text)
    return _COMMAND.sub(_sign_of, text).replace("^{", "^").replace("{", " ").replace("}", " ")


def _sign_of(match: re.Match[str]) -> str:
    if match[2]:
        return _ESCAPED.get(match[2], " ")
    name = match[1]
    return " " if name in _DRESS else _COMMANDS.get(name, f" {name} ")


# --- signs ------------------------------------------------------------------------------------------------------------

_SIGN_NEAR = re.compile(r"-[^\w-]{0,6}\Z|(?:minus|negative)[^\w-]{1,6}\Z", re.I)
_TIGHT = re.compile(rf"-\(?\s?(?:{_CURRENCY}\s?)?\Z|{_CURRENCY}\s?-\s?\Z")
_APART = re.compile(rf"-\s{{1,3}}\(?(?:{_CURRENCY}\s?)?\Z")
_WORD = re.compile(rf"\b(?:minus|negative)\s{{1,2}}(?:{_CURRENCY}\s?)?\Z", re.I)
_OPERATOR_BEHIND = re.compile(r"[\d).\]%]\s*\Z")
_SIGN_BEHIND = re.compile(r"(?:\A|[:=(\[{,;|*#<>$/]|\b(?:is|be|are|was|equals|to|of|by))\s*\Z")
_BULLET = re.compile(r"\S[^\n]*\n\s*\Z")


@dataclass(frozen=True)
class Minus:
    """Whether a minus sign belongs to a number, and whether that cannot be told."""

    negative: bool = False
    doubtful: bool = False


_NO_MINUS = Minus()


def minus_before(text: str, start: int) -> Minus:
    """The minus sign of the number at `start` of a text of `plain_text`.

    A hyphen at the number is a sign, but not behind a digit, a letter or a bracket (`10-5`). One that stands apart is a
    sign where nothing stands before it that it could separate or subtract from: at the start, behind `:` or `is`. One
    that begins a later line is a bullet.
    """
    before = text[max(start - 60, 0) : start]
    if _SIGN_NEAR.search(before) is None:
        return _NO_MINUS
    word = _WORD.search(before)
    if word:
        return Minus(negative=_OPERATOR_BEHIND.search(before[: word.start()]) is None)

    tight = _TIGHT.search(before)
    apart = _APART.search(before)
    if apart and not (tight and tight.start() < apart.start()):
        rest = before[: apart.start()]
        if _BULLET.search(rest) or _OPERATOR_BEHIND.search(rest):
            return Minus()
        negative = _SIGN_BEHIND.search(rest) is not None
        return Minus(negative, doubtful=not negative)
    if tight is None:
        return Minus()

    # A letter or digit before it makes it a hyphen (COVID-19) or an operator.
    rest = before[: tight.start()]
    if tight[0].startswith("-") and rest[-1:].isalpha():
        return Minus(doubtful=True)
    return Minus(negative=not (tight[0].startswith("-") and re.search(r"[\w).\]%-]\Z", rest)))


# --- what changes a number --------------------------------------------------------------------------------------------

FRACTION_BAR = re.compile(r"\s{0,2}/\s{0,2}")
MIXED_GAP = re.compile(r"\s{1,3}|\s?(?:and|&)\s")
PERCENT = re.compile(r"\s{0,2}(?:%|percent\b|per cent\b|pct\b)", re.I)

_OPENING = rf"[\s({_CURRENCY[1:-1]}*_-]*\Z"
# Roots, functions, multiples and negations before a number; powers and the like after it.
ALTERED_BEFORE = re.compile(
    rf"(?:[√∛∜‸‾±]|\b(?:sqrt|cbrt|root|roots|log|log_?\d+|ln|exp|sin|cos|tan|abs|fact|factorial"
    r"|half|halves|third|thirds|quarter|quarters|fifth|fifths|tenth|twice|thrice|double|triple|quadruple|square|cube"
    r"|inverse|reciprocal|opposite|negation|multiple)(?:\s(?:of|the|a)){0,2}"
    rf"|\b(?:not|never|nor|neither|except|other than|instead of|rather than)(?:\s(?:equal to|equal|exactly|be|the|a))?"
    rf"|n't(?:\s(?:be|equal|the|a)){{0,2}}){_OPENING}",
    re.I,
)
ALTERED_AFTER = re.compile(
    r"[\s-]?(?:[\^‸]|\*\*\s?[\d(a-z-]"
    r"|(?:(?:st|nd|rd|th) (?:root|power))(?!\w)"
    r"|(?:squared|cubed|factorial|raised to|to the power|and a half|and a quarter|√)(?!\w))",
    re.I,
)
# What leaves open which number is meant.
DOUBTFUL_BEFORE = re.compile(
    r"(?:[<>≤≥≠∞|~^]=?|!=|(?<=\w)\(|[\w)\]]\s?[*+]|/"
    r"|\b(?:(?:more|less|greater|fewer|larger|smaller|bigger|higher|lower) than|over"
    rf"|under|above|below|between|beyond|exceeds|(?:anything|everything|all) but|up to|at least|at most|no)){_OPENING}",
    re.I,
)
DOUBTFUL_AFTER = re.compile(
    r"\s?!(?!=)|\.{2,}|[+∞|‾‰]|_\w|-(?!\w)|\s?/|\s?\*+\s?[\w(]|\(|\s?[<>≤≥≠±√π]|\s?!="
    r"|\s?(?:[A-Za-z]+\s)?or\b|\s(?:less|more) than\b|\s?-?(?:halves|thirds|fourths|quarters|fifths|sixths|sevenths"
    r"|eighths|ninths|tenths|hundredths|thousandths|percentage points|mod|modulo|choose|pi|tens|plus|minus|below zero"
    r"|too (?:many|few|much|little))(?!\w)"
    r"|\s?(?:is|was|are|would be)\s(?:not|wrong|incorrect|false|too)\b"
    r"|\s?(?:hundred|thousand|million|billion|trillion|dozen|lakh|crore|gross)s?\b|\s?(?:mn|bn)\b",
    re.I,
)
DENIED = re.compile(r"\b(?:not|never|nor|neither|cannot|wrong|incorrect|unless|except|instead|rather)\b|n['’]t\b", re.I)

_LETTERS = re.compile(r"(\s?)([A-Za-z]+(?:['’][A-Za-z]+)?)")
_UNIT_LETTERS = frozenset("mgshlLWVNJCFAaI")
_GLUED_UNITS = frozenset(
    "km cm mm nm kg mg lb lbs oz sec secs min mins hr hrs ft in yd mi ml dl cl kw kwh hz khz mhz ghz mph kmh kph am pm "
    "kb mb gb tb usd eur gbp st nd rd th pts pt cents cent pcs cal kcal".split()
)


def is_unit(after: str) -> bool:
    """Whether the letters that follow a number are a unit, a word or none: `5 km`, `5th`; not `5x`, `5M`, `5ab`."""
    match = _LETTERS.match(after)
    if match is None:
        return True

    space, letters = match.groups()
    if len(letters) == 1:
        return letters in _UNIT_LETTERS
    return bool(space) or len(letters) >= 4 or letters.lower() in _GLUED_UNITS
