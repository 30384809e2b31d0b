"""How good answers are, by the measures of the papers: exact match, VQA accuracy, ANLS, relaxed accuracy, CIDEr-D, mAP, mIoU.

Each function takes what was said and what is right, example by example, and returns one number from 0 to 1 (CIDEr-D: 0 to 10);
higher is better. Text measures take a list of right answers an example, since people do not all say the same.

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
Rights = Sequence[Sequence[str]]

ARTICLES = ("a", "an", "the")
NUMBER_WORDS = {"none": "0"} | {
    word: str(value) for value, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")
FULL_STOP = re.compile(r"\.(?!\d)")
# The evaluation code of VQA puts apostrophes back that people leave out; of two, each may be the one that is missing.
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
    """Words with an apostrophe too few, and as they should be."""
    table = {}
    for word in CONTRACTIONS.split():
        places = [i for i, letter in enumerate(word) if letter == "'"]
        table |= {word[:i] + word[i + 1 :]: word for i in places}
    return table


APOSTROPHES = restored_apostrophes()


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


# Texts


def exact_match(said: Texts, right: Rights) -> float:
    """Share of answers that are one of the right ones to the letter, white space at the ends aside."""
    pairs = zip(said, right, strict=True)
    return mean([float(text.strip() in {answer.strip() for answer in answers}) for text, answers in pairs])


def vqa_words(answer: str) -> str:
    """An answer as VQA compares it: no articles, no punctuation, numbers as digits, apostrophes put back."""
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    stripped = text
    for mark in PUNCTUATION:
        is_apart = f"{mark} " in text or f" {mark}" in text or COMMA_IN_NUMBER.search(text)
        stripped = stripped.replace(mark, "" if is_apart else " ")
    words = (NUMBER_WORDS.get(word, word) for word in FULL_STOP.sub("", stripped).lower().split())
    return " ".join(APOSTROPHES.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(said: Texts, right: Rights) -> float:
    """VQA's accuracy: an answer is right if three people gave it, a third right if one did.

    It is the mean over leaving out each person in turn. As in the official code, answers are compared letter by letter where all
    people agree, and else as `vqa_words` has them. With a single right answer nobody would be left to agree with, and what was
    said has to be that one, as `vqa_words` has both.
    """
    values = []
    for text, answers in zip(said, right, strict=True):
        if len(answers) == 1:
            values.append(float(vqa_words(text) == vqa_words(answers[0])))
            continue
        ours, *theirs = (answer.replace("\n", " ").replace("\t", " ").strip() for answer in (text, *answers))
        if len(set(theirs)) > 1:
            ours, *theirs = map(vqa_words, (ours, *theirs))
        agreeing = theirs.count(ours)
        # Leaving out one who agrees leaves one fewer to agree with.
        values.append(mean([min(1.0, (agreeing - (answer == ours)) / 3) for answer in theirs]))
    return mean(values)


def edit_distance(a: str, b: str) -> int:
    """Letters to insert, delete or exchange to make b of a (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, start=1):
        above, row = row, [i]
        for j, other in enumerate(b, start=1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (letter != other)))
    return row[-1]


def anls(said: Texts, right: Rights, threshold: float = 0.5) -> float:
    """1 - edit distance / length of the longer, case and runs of spaces aside; what is off by half or more counts as wrong."""
    values = []
    for text, answers in zip(said, right, strict=True):
        ours, best = " ".join(text.lower().split()), 0.0
        for answer in answers:
            theirs = " ".join(answer.lower().split())
            longest = max(len(ours), len(theirs))
            distance = edit_distance(ours, theirs) / longest if longest else 0.0
            best = max(best, 1 - distance if distance < threshold else 0.0)
        values.append(best)
    return mean(values)


def as_number(text: str) -> float | None:
    """The number a text is, a percent sign allowed ("25%" = 0.25), and as in ChartQA's code no comma ("1,200" is none)."""
    text = text.strip()
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def relaxed_accuracy(said: Texts, right: Rights, tolerance: float = 0.05) -> float:
    """ChartQA's accuracy: numbers may be 5 % off, all else has to be right to the letter, case aside."""

    def is_right(text: str, answer: str) -> bool:
        ours, theirs = as_number(text), as_number(answer)
        if ours is not None and theirs:
            return abs(ours - theirs) / abs(theirs) <= tolerance
        return text.strip().lower() == answer.strip().lower()

    pairs = zip(said, right, strict=True)
    return mean([float(any(is_right(text, answer) for answer in answers)) for text, answers in pairs])


def caption_words(text: str) -> list[str]:
    """Words in lower case without punctuation, close to what COCO's captions are cut into."""
    return re.findall(r"[^\W_]+(?:['-][^\W_]+)*", text.lower())


def ngrams(words: Sequence[str], longest: int = 4) -> list[Counter]:
    """How often each run of 1, 2, 3 and 4 words occurs."""
    return [Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for n in range(1, longest + 1)]


def cider_d(said: Texts, right: Rights, *, sigma: float = 6.0) -> float:
    """How much an answer has in common with the right ones, rare runs of words counting more than common ones.

    The mean cosine of the vectors of n-gram frequencies, each weighted by how few examples have that n-gram among their right
    answers, clipped against repetition, and dampened where the lengths differ. Ten times that, as it is always reported.
    """
    ours = [ngrams(caption_words(text)) for text in said]
    theirs = [[ngrams(caption_words(answer)) for answer in answers] for answers in right]
    documents = Counter(chain.from_iterable({gram for counts in refs for n in counts for gram in n} for refs in theirs))

    def weighted(counts: Counter) -> dict[tuple, float]:
        return {gram: count * (math.log(len(theirs)) - math.log(max(1, documents[gram]))) for gram, count in counts.items()}

    values = []
    for candidate, references in zip(ours, theirs, strict=True):
        total = 0.0
        for reference in references:
            # The length that the original measures is the number of pairs of words.
            difference = candidate[1].total() - reference[1].total()
            damping = math.exp(-(difference**2) / (2 * sigma**2))
            total += sum(clipped_cosine(weighted(a), weighted(b)) for a, b in zip(candidate, reference, strict=True)) * damping
        values.append(10 * total / len(candidate) / len(references))
    return mean(values)


def clipped_cosine(ours: dict[tuple, float], theirs: dict[tuple, float]) -> float:
    """The cosine of two sparse vectors, what we say more often than they not counted again."""
    dot = sum(min(value, theirs[gram]) * theirs[gram] for gram, value in ours.items() if gram in theirs)
    norm = math.sqrt(sum(value**2 for value in ours.values()) * sum(value**2 for value in theirs.values()))
    return dot / norm if norm else dot


# Boxes and masks


def lacks_pycocotools() -> str | None:
    """Why there is no average precision, and what to install; None where pycocotools is there and can be imported."""
    try:
        import pycocotools.coco  # noqa: F401 - also one that was built for another numpy is of no use
    except (ImportError, ValueError):
        return "average precision (map) needs pycocotools. Install it: pip install pycocotools."
    return None


def detection_map(said: Sequence[Sequence[ParsedObject]], right: Sequence[Sequence[ParsedObject]]) -> dict[str, float]:
    """COCO's average precision, over labels; objects without a score count as equally sure.

    Returns: "map", the mean over overlaps of 0.50, 0.55, ..., 0.95, and "map50", at 0.50 alone.
    Raises: DeviceError if pycocotools is missing.
    """
    if why := lacks_pycocotools():
        raise DeviceError(why)
    import contextlib
    import io

    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    labels = sorted({found.label for objects in chain(said, right) for found in objects})
    if not labels:
        return {"map": 1.0, "map50": 1.0}  # nothing was there, and nothing was said

    def entries(examples: Sequence[Sequence[ParsedObject]]) -> list[dict]:
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

    with contextlib.redirect_stdout(io.StringIO()):  # it prints as it goes
        truth = COCO()
        truth.dataset = {
            "images": [{"id": image} for image in range(1, len(right) + 1)],
            "categories": [{"id": number, "name": label} for number, label in enumerate(labels, start=1)],
            "annotations": entries(right),
        }
        truth.createIndex()
        found = entries(said)
        if not found:
            return {"map": 0.0, "map50": 0.0}
        evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {"map": max(0.0, float(evaluation.stats[0])), "map50": max(0.0, float(evaluation.stats[1]))}


def segmentation_miou(said: Sequence[Sequence[ParsedObject]], right: Sequence[Sequence[ParsedObject]]) -> float:
    """Mean overlap (intersection over union) of masks of the same label.

    Where one mask is right, as for referring expressions, the first one said counts, as in big_vision's evaluator. Where several
    are, each is held against the best that is left; the sum is divided by how many are right, or were said if that is more.
    """
    values = []
    for ours, theirs in zip(said, right, strict=True):
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
    """Pixels that two masks, bool[H, W], share over pixels that they cover."""
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 1.0


TEXT_SCORES: dict[str, Callable[[Texts, Rights], float]] = {
    "exact": exact_match,
    "vqa": vqa_accuracy,
    "anls": anls,
    "relaxed": relaxed_accuracy,
    "cider": cider_d,
}
OBJECT_SCORES = ("map", "miou")
