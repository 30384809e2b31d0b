"""Scores of answers, as the papers define them: exact match, VQA accuracy, ANLS, relaxed accuracy, CIDEr-D, mAP, mIoU.

Each function takes the predictions and the references of all examples and returns one number from 0 to 1 (CIDEr-D: 0 to 10);
higher is better. For text scores, an example may have several references, because people give different answers.

Sources: VQA (arXiv:1505.00468) and its evaluation code, ANLS (arXiv:1905.13648), relaxed accuracy (ChartQA, arXiv:2203.10244),
CIDEr-D (arXiv:1411.5726), AP (COCO's evaluation, by pycocotools), mIoU of referring segmentation (PaliGemma, arXiv:2407.07726).
Imports neither torch nor a model. Checked in tests/learning/test_scores.py.
"""

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
# VQA's evaluation code restores one missing apostrophe in these words; in a word with two, either may be missing.
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
    """The share of predictions that equal one of their references, except for white space at the ends."""
    pairs = zip(predictions, references, strict=True)
    return mean([float(text.strip() in {reference.strip() for reference in group}) for text, group in pairs])


def vqa_words(answer: str) -> str:
    """An answer normalised as in VQA: no articles, no punctuation, number words as digits, apostrophes restored."""
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    stripped = text
    for mark in PUNCTUATION:
        is_apart = f"{mark} " in text or f" {mark}" in text or COMMA_IN_NUMBER.search(text)
        stripped = stripped.replace(mark, "" if is_apart else " ")
    words = (NUMBER_WORDS.get(word, word) for word in FULL_STOP.sub("", stripped).lower().split())
    return " ".join(APOSTROPHES.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(predictions: Texts, references: References) -> float:
    """VQA's accuracy: an answer scores 1 if at least three people gave it, 1/3 for each person if fewer did.

    The score is averaged over all subsets that leave out one person. As in the official code, answers are normalised with
    `vqa_words`, unless all people gave the same answer. If there is a single reference, the normalised prediction must equal the
    normalised reference.
    """
    values = []
    for text, group in zip(predictions, references, strict=True):
        if len(group) == 1:
            values.append(float(vqa_words(text) == vqa_words(group[0])))
            continue
        ours, *theirs = (answer.replace("\n", " ").replace("\t", " ").strip() for answer in (text, *group))
        if len(set(theirs)) > 1:
            ours, *theirs = map(vqa_words, (ours, *theirs))
        agreeing = theirs.count(ours)
        # If the person left out is one of those who agree, one fewer agrees.
        values.append(mean([min(1.0, (agreeing - (answer == ours)) / 3) for answer in theirs]))
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
    """Average normalised Levenshtein similarity: 1 - edit distance / length of the longer text, or 0 if that is 0.5 or less.

    Case and repeated spaces are ignored.
    """
    values = []
    for text, group in zip(predictions, references, strict=True):
        ours, best = " ".join(text.lower().split()), 0.0
        for reference in group:
            theirs = " ".join(reference.lower().split())
            longest = max(len(ours), len(theirs))
            distance = edit_distance(ours, theirs) / longest if longest else 0.0
            best = max(best, 1 - distance if distance < threshold else 0.0)
        values.append(best)
    return mean(values)


def as_number(text: str) -> float | None:
    """Parses a number, or returns None. Percent signs are allowed ("25%" = 0.25), commas are not, as in ChartQA's code."""
    text = text.strip()
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def relaxed_accuracy(predictions: Texts, references: References, tolerance: float = 0.05) -> float:
    """ChartQA's accuracy: numbers may differ by 5 %; all other texts must be equal, ignoring case."""

    def is_right(text: str, answer: str) -> bool:
        ours, theirs = as_number(text), as_number(answer)
        if ours is not None and theirs:
            return abs(ours - theirs) / abs(theirs) <= tolerance
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

    It is the mean cosine similarity of TF-IDF vectors of n-grams. The IDF is computed from the references; counts are clipped, so
    that repetition does not help, and a Gaussian penalises a difference in length. By convention the result is multiplied by 10.
    """
    ours = [ngrams(caption_words(text)) for text in predictions]
    theirs = [[ngrams(caption_words(reference)) for reference in group] for group in references]
    documents = Counter(chain.from_iterable({gram for counts in refs for n in counts for gram in n} for refs in theirs))

    def weighted(counts: Counter) -> dict[tuple, float]:
        return {gram: count * (math.log(len(theirs)) - math.log(max(1, documents[gram]))) for gram, count in counts.items()}

    values = []
    for candidate, group in zip(ours, theirs, strict=True):
        total = 0.0
        for reference in group:
            # The original implementation measures length in bigrams.
            difference = candidate[1].total() - reference[1].total()
            damping = math.exp(-(difference**2) / (2 * sigma**2))
            total += sum(clipped_cosine(weighted(a), weighted(b)) for a, b in zip(candidate, reference, strict=True)) * damping
        values.append(10 * total / len(candidate) / len(group))
    return mean(values)


def clipped_cosine(ours: dict[tuple, float], theirs: dict[tuple, float]) -> float:
    """The cosine similarity of two sparse vectors, with the candidate's values clipped to those of the reference."""
    dot = sum(min(value, theirs[gram]) * theirs[gram] for gram, value in ours.items() if gram in theirs)
    norm = math.sqrt(sum(value**2 for value in ours.values()) * sum(value**2 for value in theirs.values()))
    return dot / norm if norm else dot


# Boxes and masks


def lacks_pycocotools() -> str | None:
    """The message that pycocotools is missing and how to install it; None if it can be imported."""
    try:
        import pycocotools.coco  # noqa: F401 - imported, because one that was built for another numpy cannot be used
    except (ImportError, ValueError):
        return "average precision (map) needs pycocotools. Install it: pip install pycocotools."
    return None


def detection_map(predictions: Objects, references: Objects) -> dict[str, float]:
    """COCO's mean average precision over the labels; an object without a score counts as score 1.

    Returns: "map", the mean over the IoU thresholds 0.50, 0.55, ..., 0.95, and "map50", at the threshold 0.50.
    Raises: DeviceError if pycocotools is missing.
    """
    if why := lacks_pycocotools():
        raise DeviceError(why)
    import contextlib
    import io

    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    labels = sorted({found.label for objects in chain(predictions, references) for found in objects})
    if not labels:
        return {"map": 1.0, "map50": 1.0}  # no objects in the references, none predicted

    def entries(examples: Objects) -> list[dict]:
        rows = []
        for image, objects in enumerate(examples, start=1):
            for found in objects:
                if found.box is None:
                    continue
                left, top, right_edge, bottom = found.box.xyxy(1000, 1000)
                box = [left, top, right_edge - left, bottom - top]
                row = {"image_id": image, "category_id": labels.index(found.label) + 1, "bbox": box, "area": box[2] * box[3]}
                rows.append(row | {"id": len(rows) + 1, "iscrowd": 0, "score": 1.0 if found.score is None else found.score})
        return rows

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints progress
        truth = COCO()
        truth.dataset = {
            "images": [{"id": image} for image in range(1, len(references) + 1)],
            "categories": [{"id": number, "name": label} for number, label in enumerate(labels, start=1)],
            "annotations": entries(references),
        }
        truth.createIndex()
        found = entries(predictions)
        if not found:
            return {"map": 0.0, "map50": 0.0}
        evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {"map": max(0.0, float(evaluation.stats[0])), "map50": max(0.0, float(evaluation.stats[1]))}


def segmentation_miou(predictions: Objects, references: Objects) -> float:
    """Mean IoU (intersection over union) of masks with the same label.

    If there is one reference mask, as in referring expression segmentation, only the first predicted mask is scored, as in
    big_vision's evaluator. If there are several, each is matched to the best remaining prediction; the sum of the IoUs is divided
    by the number of references or of predictions, whichever is larger.
    """
    values = []
    for ours, theirs in zip(predictions, references, strict=True):
        wanted = [found for found in theirs if found.mask is not None]
        left = [found for found in ours if found.mask is not None]
        if len(wanted) == 1:
            ours = left = left[:1]
        total = 0.0
        for goal in wanted:
            fitting = [found for found in left if found.label == goal.label]
            if fitting:
                best = max(fitting, key=lambda found: mask_iou(found.mask, goal.mask))
                left = [found for found in left if found is not best]
                total += mask_iou(best.mask, goal.mask)
        count = max(len(wanted), len(ours))
        values.append(total / count if count else 1.0)
    return mean(values)


def mask_iou(a: object, b: object) -> float:
    """The IoU of two masks, bool[H, W]: shared pixels divided by covered pixels; 1 if both are empty."""
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
