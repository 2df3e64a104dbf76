"""How far two judges agree: confusion counts, accuracy, Cohen's kappa, recall by class."""

from collections.abc import Hashable, Sequence

Label = Hashable


def confusion(
    truth: Sequence[Label], judged: Sequence[Label], classes: Sequence[Label]
) -> list[list[int]]:
    """Counts [truth][judged] over `classes`; a label outside them is an error."""
    if len(truth) != len(judged):
        raise ValueError(f"agreement: {len(truth)} labels and {len(judged)} judgments")
    place = {label: i for i, label in enumerate(classes)}
    counts = [[0] * len(classes) for _ in classes]
    for true, given in zip(truth, judged, strict=True):
        for label in (true, given):
            if label not in place:
                raise ValueError(f"agreement: label {label!r}; allowed: {list(classes)}")
        counts[place[true]][place[given]] += 1
    return counts


def accuracy(truth: Sequence[Label], judged: Sequence[Label]) -> float:
    """Share of equal labels; nan without any."""
    pairs = list(zip(truth, judged, strict=True))
    return sum(a == b for a, b in pairs) / len(pairs) if pairs else float("nan")


def kappa(first: Sequence[Label], second: Sequence[Label]) -> float:
    """Cohen's kappa (Cohen 1960): agreement beyond chance, 1 at most; symmetric.

    nan without labels, and where both judges give one and the same label throughout.
    """
    n, observed = len(first), accuracy(first, second)
    if n == 0:
        return float("nan")
    labels = {*first, *second}
    chance = sum(list(first).count(label) * list(second).count(label) for label in labels) / n**2
    return (observed - chance) / (1 - chance) if chance < 1 else float("nan")


def recall(truth: Sequence[Label], judged: Sequence[Label], label: Label) -> float:
    """Share of the rows that truly have the label which the judge gave it; nan where none has."""
    mine = [given for true, given in zip(truth, judged, strict=True) if true == label]
    return mine.count(label) / len(mine) if mine else float("nan")


def precision(truth: Sequence[Label], judged: Sequence[Label], label: Label) -> float:
    """Share of the rows that the judge gave the label which truly have it; nan where it gave it to
    none."""
    return recall(judged, truth, label)
