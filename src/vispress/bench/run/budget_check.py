"""Checking that a run kept what was asked: off target is an error, not a score."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from vispress.bench.plan.cells import Cell
from vispress.errors import BudgetError
from vispress.kinds import Stage
from vispress.methods.base import Compressor
from vispress.report import CompressionReport, ImageReport


def expected_counts(
    chain: Sequence[Compressor], num_visual: int, num_layers: int, *, last: bool = True
) -> list[int]:
    """Compute the tokens left of an image after each placement of a chain.

    Args:
        chain: The compressors.
        num_visual: Tokens of the image.
        num_layers: Decoder layers.
        last: Whether it is the last image of its prompt.
    """
    left, counts = num_visual, []
    for method in chain:
        reached = left
        for placement in method.placements(num_layers):
            if placement.stage is Stage.ENCODER:  # the LLM still gets all places
                continue
            passes = placement.images == ("earlier" if last else "last")
            count = left if passes else min(left, placement.budget.resolve(reached))
            counts.append(count)
            left = count if placement.until is None else left
    return counts


def mean_kept(image: ImageReport, num_layers: int) -> float:
    """Average the tokens of an image over the decoder layers."""
    total = 0
    for layer in range(num_layers):
        acting = (
            p.num_kept
            for p in reversed(image.placements)
            if p.layer <= layer < (num_layers if p.until is None else p.until)
        )
        total += next(acting, image.num_visual)
    return total / num_layers


def check_budget(cell: Cell, report: CompressionReport) -> None:
    """Compare what a prefill kept with the cell's budget, image by image.

    Methods that may keep another count than asked may keep fewer, never more.

    Raises:
        BudgetError: Off target; names cell, image and both counts.
    """
    exact = all(method.exact for method in cell.chain)
    for sample in report.samples:
        for image in sample.images:
            asked = expected_counts(
                cell.chain, image.num_visual, report.num_layers, last=image is sample.images[-1]
            )
            _check_image(cell, image, asked, report.num_layers, exact=exact)


def _check_image(
    cell: Cell, image: ImageReport, asked: list[int], num_layers: int, *, exact: bool
) -> None:
    kept = [placement.num_kept for placement in image.placements]
    fits = len(kept) == len(asked) and all(
        k == a if exact else k <= a for k, a in zip(kept, asked, strict=True)
    )
    if not fits:
        raise BudgetError(
            f"{cell.key} is off target: it kept {kept} of {image.num_visual} visual tokens, "
            f"the budget is {'' if exact else 'at most '}{asked}"
        )
    method = cell.chain[0]
    mean = method.mean_keep_ratio
    if mean is None or len(cell.chain) > 1:
        return
    got = mean_kept(image, num_layers)
    off = got - mean * image.num_visual
    # every placement rounds to whole tokens, so the mean may be one token away
    if off > 1 or (exact and off < -1):
        raise BudgetError(
            f"{cell.key} is off target: a mean of {got:.2f} visual tokens a layer, "
            f"the budget is {mean * image.num_visual:.2f}"
        )


@dataclass
class KeptTokens:
    """Visual tokens of all images of a run, added up.

    Args:
        images: How many.
        visual: Tokens they had.
        end: Tokens left at the last layer.
        mean: Tokens, as a mean over decoder layers.
    """

    images: int = 0
    visual: int = 0
    end: int = 0
    mean: float = 0.0
    notes: set[str] = field(default_factory=set)

    def add(self, report: CompressionReport) -> None:
        """Add one prefill."""
        images = [image for sample in report.samples for image in sample.images]
        self.images += len(images)
        self.visual += sum(image.num_visual for image in images)
        self.end += sum(image.num_kept for image in images)
        self.mean += sum(map(sum, report.visual_per_layer)) / report.num_layers
        self.notes |= set(report.notes)

    def add_plain(self, images: int, visual: int, left: int) -> None:
        """Add a batch that no compressor touched.

        Args:
            images: How many.
            visual: Visual tokens they have at their usual size.
            left: Visual tokens they have now, in every decoder layer.
        """
        self.images += images
        self.visual += visual
        self.end += left
        self.mean += left

    def add_counts(
        self, images: int, visual: int, end: int, mean: float, *, notes: Sequence[str]
    ) -> None:
        """Add what another run counted; fields as they are here."""
        self.images += images
        self.visual += visual
        self.end += end
        self.mean += mean
        self.notes |= set(notes)

    def to_dict(self) -> dict[str, float]:
        """Convert to averages an image, and shares."""
        images, visual = max(1, self.images), max(1, self.visual)
        return {
            "images": self.images,
            "visual_tokens": self.visual / images,
            "kept_at_end": self.end / images,
            "kept_mean_over_layers": self.mean / images,
            "ratio_at_end": self.end / visual,
            "ratio_mean_over_layers": self.mean / visual,
        }
