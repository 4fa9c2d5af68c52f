"""The end of an epoch: a row of the history, and which weights and epochs are the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .checkpoint import AVERAGE, TRAINED
from .progress import Progress
from .scores import Scores
from .tasks import Evaluation

PREFIXES = {TRAINED: "", AVERAGE: "ema_"}  # of the columns of these weights in the history


def better(evaluations: Mapping[str, Evaluation]) -> str | None:
    """The weights by which an epoch is judged; None where those of neither give finite outputs throughout."""
    sound = [weights for weights, found in evaluations.items() if not found.not_finite]
    return max(sound, key=lambda weights: evaluations[weights].rank, default=None)


def history_row(
    progress: Progress,
    scores: Scores,
    evaluations: Mapping[str, Evaluation],
    lr: float,
    initial_share: float | None,
) -> dict[str, object]:
    """The row of the history of an epoch whose steps are done; None stands for what was not evaluated."""
    p = progress
    found: dict[str, object] = {
        "epoch": p.epoch + 1,
        "step": p.step,
        "lr": lr,
        "train_loss": p.loss_sum / p.steps if p.steps else None,
        **{f"{prefix}{key}": None for prefix in PREFIXES.values() for key in scores.row},
        "total": None,
        "weights": better(evaluations),
        "ema_initial_share": initial_share,
        "images_per_second": p.images / p.seconds if p.seconds else None,
        "data_wait": p.wait_seconds / p.seconds if p.seconds else None,
        "seconds": p.seconds,
        "skipped_steps": p.skipped,
        "unreadable_images": p.unreadable,
    }
    for weights, evaluation in evaluations.items():
        found |= {f"{PREFIXES[weights]}{key}": value for key, value in evaluation.values.items()}
        found["total"] = evaluation.total
    return found


def best_epochs(history: Sequence[Mapping[str, object]], scores: Scores, number: int) -> list[int]:
    """The `number` epochs of the highest score, each by its better weights; of equal ones the earlier."""
    rows = [one for one in history if one["weights"]]
    rows.sort(key=lambda one: (-one[f"{PREFIXES[one['weights']]}{scores.best}"], one["epoch"]))
    return [one["epoch"] for one in rows[:number]]
