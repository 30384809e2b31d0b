"""Scores of answers, as the papers define them: exact match, VQA accuracy, ANLS, relaxed accuracy, CIDEr-D, mAP, mIoU.

Each function takes the predictions and the references of all examples and returns one number from 0 to 1 (CIDEr-D: 0 to 10).
A higher number is better. For text scores, an example may have several references, because people give different answers.

Sources: VQA (arXiv:1505.00468) and its evaluation code, ANLS (arXiv:1905.13648), relaxed accuracy (ChartQA, arXiv:2203.10244),
CIDEr-D (arXiv:1411.5726), AP (COCO's evaluation, by pycocotools), mIoU of referring segmentation (PaliGemma, arXiv:2407.07726).
Imports neither torch nor a model. Checked in tests/learning/test_scores.py.
"""

import importlib
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain

from paligemma.errors import DeviceError
from paligemma.objects.outputs import ParsedObject

Texts = Sequence[str]
References = Sequence[Sequence[str]]
Objects = Sequence[Sequence[ParsedObject]]

ARTICLES = ("a", "an", "the")
NUMBER_WORDS = {"none": "0"} | {
    word: str(value) for value, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")
FULL_STOP = re.compile(r"\.(?!\d)")
# VQA's evaluation code restores one missing apostrophe in these words. In a word with two, either may be missing.
CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd
how'll how's I'd've I'm I've isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd
you'd've you'll you're you've
"""


def restored_apostrophes() -> dict[str, str]:
    """The correct spelling of every word that lacks one apostrophe."""
    table = {}
    for word in CONTRACTIONS.split():
        table |= {word[:i] + word[i + 1 :]: word for i, letter in enumerate(word) if letter == "'"}
    return table


APOSTROPHES = restored_apostrophes()


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


# Texts


def exact_match(predictions: Texts, references: References) -> float:
    """The fraction of predictions that equal one of their references, ignoring white space at the ends."""
    pairs = zip(predictions, references, strict=True)
    return mean([float(text.strip() in {reference.strip() for reference in group}) for text, group in pairs])


def vqa_words(answer: str) -> str:
    """An answer normalised as in VQA: no articles, no punctuation, number words as digits, apostrophes restored."""
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    stripped = text
    for mark in PUNCTUATION:
        is_removed = f"{mark} " in text or f" {mark}" in text or COMMA_IN_NUMBER.search(text)
        stripped = stripped.replace(mark, "" if is_removed else " ")
    words = (NUMBER_WORDS.get(word, word) for word in FULL_STOP.sub("", stripped).lower().split())
    return " ".join(APOSTROPHES.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(predictions: Texts, references: References) -> float:
    """VQA's accuracy: an answer scores 1 if at least three people gave it; otherwise each person who gave it adds 1/3.

    The score is the mean over all subsets that leave out one person's answer. As in the official code, answers are
    normalised with `vqa_words`, unless all people gave the same answer. If there is a single reference, the normalised prediction
    must equal the normalised reference.
    """
    values = []
    for text, group in zip(predictions, references, strict=True):
        if len(group) == 1:
            values.append(float(vqa_words(text) == vqa_words(group[0])))
            continue
        prediction, *answers = (answer.replace("\n", " ").replace("\t", " ").strip() for answer in (text, *group))
        if len(set(answers)) > 1:
            prediction, *answers = map(vqa_words, (prediction, *answers))
        num_equal = answers.count(prediction)
        # If the answer that is left out equals the prediction, it is not counted.
        values.append(mean([min(1.0, (num_equal - (answer == prediction)) / 3) for answer in answers]))
    return mean(values)


def edit_distance(a: str, b: str) -> int:
    """The number of letters to insert, delete or replace to turn a into b (Levenshtein distance)."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, start=1):
        above, row = row, [i]
        for j, other in enumerate(b, start=1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (letter != other)))
    return row[-1]


def anls(predictions: Texts, references: References, threshold: float = 0.5) -> float:
    """Average normalised Levenshtein similarity: 1 - edit distance / length of the longer text.

    A similarity of 0.5 or less (1 - threshold) counts as 0. Case and repeated spaces are ignored.
    """
    values = []
    for text, group in zip(predictions, references, strict=True):
        prediction, best = " ".join(text.lower().split()), 0.0
        for reference in (" ".join(answer.lower().split()) for answer in group):
            longest = max(len(prediction), len(reference))
            distance = edit_distance(prediction, reference) / longest if longest else 0.0
            best = max(best, 1 - distance if distance < threshold else 0.0)
        values.append(best)
    return mean(values)


def as_number(text: str) -> float | None:
    """The number in a text, or None. As in ChartQA's code, a percent sign is allowed ("25%" = 0.25), but commas are not."""
    text = text.strip()
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def relaxed_accuracy(predictions: Texts, references: References, tolerance: float = 0.05) -> float:
    """ChartQA's accuracy: numbers may differ by 5 %; all other texts must be equal, ignoring case."""

    def is_right(text: str, answer: str) -> bool:
        predicted, expected = as_number(text), as_number(answer)
        if predicted is not None and expected:
            return abs(predicted - expected) / abs(expected) <= tolerance
        return text.strip().lower() == answer.strip().lower()

    pairs = zip(predictions, references, strict=True)
    return mean([float(any(is_right(text, reference) for reference in group)) for text, group in pairs])


def caption_words(text: str) -> list[str]:
    """Words in lower case without punctuation, close to the tokens of COCO's caption evaluation."""
    return re.findall(r"[^\W_]+(?:['-][^\W_]+)*", text.lower())


def ngrams(words: Sequence[str], longest: int = 4) -> list[Counter]:
    """The counts of the n-grams for n = 1, 2, 3, 4."""
    return [Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for n in range(1, longest + 1)]


def cider_d(predictions: Texts, references: References, *, sigma: float = 6.0) -> float:
    """The similarity of captions to their references, in which rare n-grams count more than common ones.

    The result is the mean cosine similarity of TF-IDF vectors of n-grams, by convention multiplied by 10. The IDF is computed
    from the references. Counts are clipped, so that repetition does not help, and a Gaussian penalises a difference in length.
    """
    candidates = [ngrams(caption_words(text)) for text in predictions]
    groups = [[ngrams(caption_words(reference)) for reference in group] for group in references]
    documents = Counter(chain.from_iterable({gram for counts in refs for n in counts for gram in n} for refs in groups))

    def weighted(counts: Counter) -> dict[tuple, float]:
        return {gram: count * (math.log(len(groups)) - math.log(max(1, documents[gram]))) for gram, count in counts.items()}

    values = []
    for candidate, group in zip(candidates, groups, strict=True):
        total = 0.0
        for reference in group:
            # The original implementation measures length in bigrams.
            difference = candidate[1].total() - reference[1].total()
            damping = math.exp(-(difference**2) / (2 * sigma**2))
            total += sum(clipped_cosine(weighted(a), weighted(b)) for a, b in zip(candidate, reference, strict=True)) * damping
        values.append(10 * total / len(candidate) / len(group))
    return mean(values)


def clipped_cosine(candidate: dict[tuple, float], reference: dict[tuple, float]) -> float:
    """The cosine similarity of two sparse vectors; values of the candidate that exceed the reference's are clipped."""
    dot = sum(min(value, reference[gram]) * reference[gram] for gram, value in candidate.items() if gram in reference)
    norm = math.sqrt(sum(value**2 for value in candidate.values()) * sum(value**2 for value in reference.values()))
    return dot / norm if norm else dot


# Boxes and masks


def pycocotools_problem() -> str | None:
    """None if pycocotools can be imported; otherwise a message that says how to install it."""
    try:
        importlib.import_module("pycocotools.coco")  # find_spec would not notice a package that was built for another numpy
    except (ImportError, ValueError):
        return "average precision (map) needs pycocotools. Install it: pip install pycocotools."
    return None


def detection_map(predictions: Objects, references: Objects) -> dict[str, float]:
    """COCO's mean average precision over the labels. An object without a score counts as an object with score 1.

    Returns: "map", the mean over the IoU thresholds 0.50, 0.55, ..., 0.95, and "map50", at the threshold 0.50.
    Raises: DeviceError if pycocotools is missing.
    """
    if problem := pycocotools_problem():
        raise DeviceError(problem)
    import contextlib
    import io

    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    labels = sorted({obj.label for objects in chain(predictions, references) for obj in objects})
    if not labels:
        return {"map": 1.0, "map50": 1.0}  # nothing expected and nothing predicted

    def entries(examples: Objects) -> list[dict]:
        rows = []
        for image, objects in enumerate(examples, start=1):
            for obj in objects:
                if obj.box is None:
                    continue
                left, top, right, bottom = obj.box.xyxy(1000, 1000)
                box = [left, top, right - left, bottom - top]
                row = {"image_id": image, "category_id": labels.index(obj.label) + 1, "bbox": box, "area": box[2] * box[3]}
                rows.append(row | {"id": len(rows) + 1, "iscrowd": 0, "score": 1.0 if obj.score is None else obj.score})
        return rows

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints progress
        truth = COCO()
        truth.dataset = {
            "images": [{"id": image} for image in range(1, len(references) + 1)],
            "categories": [{"id": number, "name": label} for number, label in enumerate(labels, start=1)],
            "annotations": entries(references),
        }
        truth.createIndex()
        predicted = entries(predictions)
        if not predicted:
            return {"map": 0.0, "map50": 0.0}
        evaluation = COCOeval(truth, truth.loadRes(predicted), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {"map": max(0.0, float(evaluation.stats[0])), "map50": max(0.0, float(evaluation.stats[1]))}


def segmentation_miou(predictions: Objects, references: Objects) -> float:
    """Mean IoU (intersection over union) of masks with the same label.

    If an example has one reference mask (referring expression segmentation), only the first predicted mask is scored, as in
    big_vision's evaluator. If an example has several reference masks, each is matched to the best remaining prediction, and the
    sum of the IoUs is divided by the number of references or the number of predictions, whichever is larger.
    """
    values = []
    for predicted, expected in zip(predictions, references, strict=True):
        expected = [obj for obj in expected if obj.mask is not None]
        remaining = [obj for obj in predicted if obj.mask is not None]
        if len(expected) == 1:
            predicted = remaining = remaining[:1]
        total = 0.0
        for reference in expected:
            candidates = [obj for obj in remaining if obj.label == reference.label]
            if candidates:
                best = max(candidates, key=lambda obj: mask_iou(obj.mask, reference.mask))
                remaining = [obj for obj in remaining if obj is not best]
                total += mask_iou(best.mask, reference.mask)
        count = max(len(expected), len(predicted))
        values.append(total / count if count else 1.0)
    return mean(values)


def mask_iou(a: object, b: object) -> float:
    """The IoU of two masks, bool[H, W]: pixels in both masks divided by pixels in at least one. It is 1 if both are empty."""
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 1.0


TEXT_SCORES: dict[str, Callable[[Texts, References], float]] = {
    "exact": exact_match,
    "vqa": vqa_accuracy,
    "anls": anls,
    "relaxed": relaxed_accuracy,
    "cider": cider_d,
}
OBJECT_SCORES = ("map", "miou")
