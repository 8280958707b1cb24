"""How answers to visual questions are normalized before they are compared: steps and tables of the VQA evaluation."""

from __future__ import annotations

import re

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = frozenset(("a", "an", "the"))
_DIGITS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0", **{word: str(n) for n, word in enumerate(_DIGITS.split())}}
_PERIOD = re.compile(r"\.(?!\d)")
#: The published code passes a regular expression's flag where the number of replacements goes.
_MOST_PERIODS = int(re.UNICODE)

_PLAIN = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's I'm "
    "I've isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've "
    "shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're "
    "there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd "
    "where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're "
    "you've"
)
_NOT_HAVE = ["could", "had", "might", "should", "would"]
_WOULD_HAVE = ["he", "I", "it", "she", "someone", "something", "somebody", "there", "they", "we", "who", "you"]
_IRREGULAR = {
    "yall'll": "y'all'll",
    "y'allll": "y'all'll",
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
    "let's": "let's",
    "she's": "she's",
    "somebody'd": "somebodyd",
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
}
#: Misspelt word -> contraction. Keys with capitals never match, as texts are lower-cased before; they are in the
#: published table all the same.
CONTRACTIONS = {
    **{word.replace("'", ""): word for word in _PLAIN.split()},
    **{key: f"{stem}n't've" for stem in _NOT_HAVE for key in (f"{stem}nt've", f"{stem}n'tve")},
    **{key: f"{stem}'d've" for stem in _WOULD_HAVE for key in (f"{stem}d've", f"{stem}'dve")},
    **_IRREGULAR,
}


def normalize_vqa_answer(text: str) -> str:
    """Return an answer as the VQA evaluation compares it: lower case, no articles, digits, spelt contractions.

    Equal to the answer processor of the released evaluation codes, their slips included: a mark next to a blank
    anywhere is deleted everywhere, and no more than 32 periods are removed.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    plain = text
    for mark in _PUNCTUATION:  # judged on the text as it was before the first replacement
        plain = plain.replace(mark, "" if f"{mark} " in text or f" {mark}" in text else " ")
    plain = _PERIOD.sub("", plain, count=_MOST_PERIODS)
    words = (_NUMBERS.get(word, word) for word in plain.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
