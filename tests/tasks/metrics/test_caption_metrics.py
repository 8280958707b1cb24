"""CIDEr, the caption tokenizers and the mean of seven, with and without Java."""

import json
import math
import random
import sys
from itertools import chain
from pathlib import Path

import pytest
from torchmetrics import MetricCollection

from nscmerge.errors import ConfigError, DataError, ShapeError
from tasks.metrics import (
    ANLS,
    CaptionMean7,
    CIDEr,
    EmptyAnswers,
    ExactMatch,
    IconQAAccuracy,
    TextSpearman,
    caption_mean7,
    caption_scores,
    choose_ptb,
    cider,
    cider_scores,
    ptb_note,
    ptb_tokenize,
)
from tasks.metrics.ptb import caption_package, missing_java

caption_mean7_module = sys.modules["tasks.metrics.caption_mean7"]  # the package has a function of that name
GOLDEN = Path(__file__).parents[2] / "golden"
CASES = json.loads((GOLDEN / "metric_cider.json").read_text())["cases"]
NO_JAVA = missing_java()
needs_java = pytest.mark.skipif(NO_JAVA is not None, reason=NO_JAVA or "")
needs_package = pytest.mark.skipif(caption_package() is None, reason="the extra captions is not installed")
BACKENDS = ["simple", pytest.param("java", marks=[pytest.mark.java, needs_java])]

#: Captions that are hard to split; both tokenizers must give the same.
HARD = """
mr. smith at 3 st. in the u.s. | a cat... .. and !!! ?! | AT&T & co. &amp; more, black&white, an R&B band, b&w photo
email me@home.com www.foo.com http://a.b/c @home #foo #12 | rock'n'roll, the '90s, 1990s, an 80's car, 1980's, 80s
gimme lemme gotta wanna cannot 'tis 'twas more'n | a * b + c = d / e \\ f ~ g ^ h _ i < j > k, a/b/c, 24/7, c/o, w/out
e.g. this i.e. that etc. plan b. No. 7 no. of | dogs' toys, "hats", 'stop' sign, it's a dog's life, o'clock o'reilly
T-shirt 10-year-old well--known a -- b - c, 1st-place 3-D 2x4, a 6" sub, 5ft | 10:30am 10:30 5pm 2,000,000 1.5.2 .5
5% 5 % $5.99 £5 €6 5¢ -5 +5 12/25/2010 ½ | let's y'all ain't DON'T won't who'd've shouldn't've d'angelo 'em 'cause
naïve café it\u2019s “b” \u2018c\u2019 \u2013 en — em …
a [b] {c} (d) a(b) | word.Another word,another word;another a:b emoji 🙂 here
what?! what? wow!! wow! ok. | ice-cream-cone half- eaten mid-air. t.v. tv. | dunno whatcha d'you kinda 日本語
""".replace("\n", "|").split("|")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_cider_equals_the_golden_numbers(case):
    images = list(case["references"])
    candidates = [case["tokenized_predictions"][image] for image in images]
    references = [case["tokenized_references"][image] for image in images]
    assert cider(candidates, references) == pytest.approx(case["expected"]["cider"], abs=1e-9)
    expected = [case["expected"]["per_image"][image] for image in images]
    assert cider_scores(candidates, references) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("ptb", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_cider_of_raw_captions_equals_the_golden_numbers(case, ptb):
    metric = CIDEr(ptb)
    for image, captions in case["references"].items():
        metric.update([case["predictions"][image]], [captions])
    assert float(metric.compute()) == pytest.approx(case["expected"]["cider"], abs=1e-9)


def test_cider_equals_the_reference_code_on_drawn_captions():
    scorer = pytest.importorskip("pycocoevalcap.cider.cider_scorer", reason="the extra captions is not installed")
    draw = random.Random(0)

    def caption():
        return " ".join(draw.choices("abcdefghij", k=draw.randint(0, 14)))

    references = [[caption() or "a" for _ in range(draw.randint(1, 5))] for _ in range(40)]
    candidates = [caption() for _ in references]
    theirs = scorer.CiderScorer()
    for pair in zip(candidates, references, strict=True):
        theirs += pair
    mean, scores = theirs.compute_score()
    assert cider_scores(candidates, references) == pytest.approx(list(scores), abs=1e-10)
    assert cider(candidates, references) == pytest.approx(float(mean), abs=1e-10)


def test_cider_of_nothing_and_of_bad_pairs():
    assert math.isnan(cider([], []))
    assert cider(["", "c d"], [["a b"], ["c d"]]) == 2.5  # unigrams and bigrams of one image of two
    with pytest.raises(ShapeError, match="1 predictions of type list for 2 targets"):
        cider(["a"], [["a"], ["b"]])
    with pytest.raises(DataError, match=r"sample 0 has \[\] as target"):
        CIDEr("simple").update(["a"], [[]])


@pytest.mark.parametrize("ptb", BACKENDS)
def test_tokens_equal_the_golden_ones(ptb):
    cases = json.loads((GOLDEN / "metric_ptb_tokenizer.json").read_text())["cases"]
    assert ptb_tokenize([case["raw"] for case in cases], ptb) == [case["tokenized"] for case in cases]
    assert ptb_tokenize([], ptb) == []
    # Line breaks of any kind, at any place, keep captions apart.
    assert ptb_tokenize(["a\r\nb\n", "", "\n", "c\u2028d"], ptb) == ["a b", "", "", "c d"]


@pytest.mark.java
@needs_java
def test_the_approximation_equals_java_on_hard_captions():
    assert ptb_tokenize(HARD, "simple") == ptb_tokenize(HARD, "java")


@pytest.mark.java
@needs_java
def test_java_leaves_the_package_alone():
    folder = caption_package() / "tokenizer"
    before = {path: path.stat().st_mtime_ns for path in chain([folder], folder.iterdir())}
    ptb_tokenize(["A dog."], "java")
    assert {path: path.stat().st_mtime_ns for path in chain([folder], folder.iterdir())} == before


def test_without_java_the_approximation_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert choose_ptb("auto") == "simple"
    (note,) = ptb_note("auto")
    assert "tokenizer 'simple', an approximation" in note
    with pytest.raises(ConfigError, match=r"cannot run: .*(Java runtime|nscmerge\[captions\])"):
        choose_ptb("java")
    with pytest.raises(ConfigError, match=r"Bleu, METEOR and ROUGE-L of captions cannot run"):
        CaptionMean7()


def test_without_the_package_the_way_to_get_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    assert choose_ptb("auto") == choose_ptb("simple") == "simple"
    assert "as asked" in ptb_note("simple")[0]
    with pytest.raises(ConfigError, match=r"pycocoevalcap is not installed; install nscmerge\[captions\]"):
        choose_ptb("java")
    with pytest.raises(ConfigError, match="no tokenizer 'ptb' for captions; expected auto, java or simple"):
        choose_ptb("ptb")


@needs_package
def test_the_scores_beside_meteor_by_hand(monkeypatch):
    monkeypatch.setattr(caption_mean7_module, "check_caption_mean7", lambda: None)
    monkeypatch.setattr(caption_mean7_module, "_meteor", lambda *_: 0.25)
    # Two images, 3 and 4 words; 2 + 4 words, 1 + 3 bigrams, 0 + 2 trigrams, 0 + 1 fourgrams are right; no brevity.
    pairs = ["a red dog", "two cats sit here"], [["a red fox"], ["two cats sit here", "nothing"]]
    scores = caption_scores(*pairs)
    assert list(scores) == ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr"]
    precisions = [6 / 7, 4 / 5, 2 / 3, 1 / 1]
    for n in range(1, 5):
        assert scores[f"Bleu_{n}"] == pytest.approx(math.prod(precisions[:n]) ** (1 / n), abs=1e-6)
    assert scores["ROUGE_L"] == pytest.approx((2 / 3 + 1) / 2, abs=1e-6)
    assert scores["CIDEr"] == cider(*pairs)
    assert caption_mean7(*pairs) == pytest.approx(sum(scores.values()) / 7)
    assert caption_scores(["", "a"], [["a red fox"], ["a", "b"]])["ROUGE_L"] == 0.5  # an empty caption scores 0
    with pytest.raises(DataError, match="no captions to score"):
        caption_scores([], [])


@pytest.mark.slow  # METEOR reads its table of paraphrases for half a minute
@pytest.mark.java
@needs_java
def test_the_seven_scores_of_captions():
    case = CASES[1]  # every caption is its first reference
    images = list(case["references"])
    metric = CaptionMean7("java")
    for image in images:
        metric.update([case["predictions"][image]], [case["references"][image]])
    assert float(metric.compute()) == pytest.approx((6 * 1 + case["expected"]["cider"]) / 7, abs=1e-6)


@pytest.mark.slow
@pytest.mark.java
@needs_java
def test_meteor_keeps_images_apart_whatever_is_in_a_caption():
    meteor = caption_scores(["", "two ||| cats"], [["a red fox"], ["two cats"]])["METEOR"]
    assert 0.3 < meteor < 1


def test_metrics_in_one_collection_keep_apart():
    predictions, targets = ["cat", "2", ""], [["cat"], ["2"], [""]]  # all agree on the first batch
    names = [ANLS, ExactMatch, IconQAAccuracy, EmptyAnswers, TextSpearman]
    metrics = {metric.__name__: metric() for metric in names}
    together = MetricCollection({**metrics, "CIDEr": CIDEr("simple")})
    alone = {name: metric.clone() for name, metric in together.items(copy_state=False)}
    for batch in ((predictions, targets), (["dog", "A. fish", "the cat"], [["dot"], ["a"], ["the cat", "cat"]])):
        together.update(*batch)
        for metric in alone.values():
            metric.update(*batch)
    got = {name: float(value) for name, value in together.compute().items()}
    assert got == {name: float(metric.compute()) for name, metric in alone.items()}
    assert len({got["ANLS"], got["ExactMatch"], got["IconQAAccuracy"]}) == 3
