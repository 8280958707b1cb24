"""An approximation of the Penn Treebank tokenizer for captions, without Java.

Names, addresses, numbers with units, hyphenated words and contractions are split as the Stanford tokenizer 3.4.1 does
with its default options. Telephone numbers, smileys, mark-up and rare abbreviations may differ; captions hardly have
them.
"""

from __future__ import annotations

import re

#: What is dropped after tokenising, as in pycocoevalcap. The brackets are on its list in capitals and so never match.
PUNCTUATION = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))

_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
#: Characters that the original writes otherwise.
_REPLACED = str.maketrans(
    {
        "\u2018": "'", "\u2019": "'", "\u201b": "'", "\u00b4": "'", "\u201c": '"', "\u201d": '"', "\u201e": '"',
        "\u00ab": '"', "\u00bb": '"', "\u2026": "...", "\u2013": " -- ", "\u2014": " -- ", "\u2015": " -- ",
        "\u00a3": "#", "\u20ac": "$", "\u00a2": " cents ", "\u00bd": "1/2", "\u00bc": "1/4", "\u00be": "3/4",
        "\u2153": "1/3", "\u2154": "2/3", "\u00a0": " ", "\u200b": " ", "\u00ad": "",
    }
)  # fmt: skip
_ENTITIES = {"&amp;": "&", "&quot;": '"', "&lt;": "<", "&gt;": ">", "&apos;": "'", "&#39;": "'"}

_WORD = r"[^\W\d_]"
_ABBREVIATIONS = (
    "adm al asst ave calif bldg blvd brig bros capt cmdr co col comdr corp cpl det dist dr drs etc ft gen gov hon "
    "inc jr lieut lt ltd maj messrs mfg mlle mme mr mrs ms mt pfc phd prof pvt rd rep reps rev sen sens sgt sr st "
    "ste tel univ vs jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri"
)
_APOSTROPHE = r"(?:'(?!(?:s|m|d|re|ve|ll)\b|n')\w+)?"
_TOKEN = re.compile(
    rf"""
      (?:https?://|www\.)[^\s"'<>()]+[^\s"'<>().,!?;:]           # addresses
    | [\w.+-]+@[\w-]+(?:\.[\w-]+)+
    | [@\#]{_WORD}\w*
    | (?:{_WORD}\.){{2,}}(?:{_WORD}(?!\w))?                      # u.s., a.m
    | (?:{_ABBREVIATIONS.replace(" ", "|")})\.(?!\w)
    | (?:no|fig|figs|nos|pp)\.(?=\s?\d) | (?<!\w)[a-z]\.(?![a-z])     # no. 7, plan b.
    | '\d\ds?(?!\w)                                              # the '90s
    | '[nN]'                                                     # rock 'n' roll
    | \d+(?:[.:]\d+)+(?=[ap]\.?m\b)    # 10:30 am
    | [+-]?\d+(?:[.,:/-]\d+)*(?:(?:[-/])?\w+(?:[-/]\w+)*)?       # 1,234.5, 5th, 10-year-old
    | [+-]?\.\d+
    | (?-i:[A-Z]+&[A-Z]+)(?!\w) | c\+\+                           # R&B, but b & w
    | {_WORD}\w*{_APOSTROPHE}(?:[-/.]\w+{_APOSTROPHE})*        # o'clock, dining-room, on/off, isn't
    | '(?:s|m|d|re|ve|ll|em|cause|tis|twas)\b
    | \.\.\.+ | -{{2,}} | [?!]+ | '' | `` | \S
    """,
    re.IGNORECASE | re.VERBOSE,
)
_NOT = re.compile(r"(.+)(n't)$")
_SPLIT = {
    "cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "gimme": "gim me", "lemme": "lem me",
    "'tis": "'t is", "'twas": "'t was", "more'n": "more 'n", "y'all": "y' all",
}  # fmt: skip


def ptb_simple(caption: str) -> str:
    """Return the lower-case tokens of a caption, a blank between two, punctuation left out; empty if there are none."""
    for entity, character in _ENTITIES.items():
        caption = caption.replace(entity, character)
    text = caption.translate(_REPLACED)
    tokens = " ".join(_token(match.group().lower()) for match in _TOKEN.finditer(text)).split()
    return " ".join(token for token in tokens if token not in PUNCTUATION)


def _token(text: str) -> str:
    if text in _BRACKETS:
        return _BRACKETS[text]
    if text > "\uffff":  # emoji and the like: the original drops what it does not know
        return ""
    if text == '"':
        return "''"
    if text[0] == "." and set(text) == {"."}:
        return "..."
    if text[0] == "-" and set(text) == {"-"}:
        return "--" if len(text) > 1 else "-"
    if text in _SPLIT:
        return _SPLIT[text]
    if negated := _NOT.match(text):
        return f"{negated[1]} {negated[2]}"
    return text
