"""VTW's search: the first layer before which all visual tokens may leave.

As in the code of arXiv:2405.05803, which stops at a divergence of 0.003 nats for 7B models.
"""

from vispress.bench.search.objective import ScheduleObjective, SearchResult
from vispress.errors import ConfigError
from vispress.methods import VTW

TOLERANCE = 0.003
"""Nats of divergence, for LLaVA-1.5-7B; the code has 0.0005 for 13B and 0.0001 for LLaVA-NeXT."""
FIRST = 5
SHALLOW = 2 * FIRST
"""Models of up to so many layers are searched from layer 1 (ours)."""


def candidates(num_layers: int) -> range:
    """List the layers that are tried, in that order."""
    return range(FIRST if num_layers > SHALLOW else 1, num_layers)


def search_withdrawal(
    objective: ScheduleObjective, *, tolerance: float = TOLERANCE
) -> SearchResult:
    """Find the first layer before which withdrawal is good enough; later ones may be worse again.

    Args:
        objective: Values layers; the published metric is `"reverse_kl"`.
        tolerance: What may be lost: nats, or a share of accuracy or loyalty.

    Raises:
        ConfigError: No layer is good enough.
    """
    least, best = objective.least(tolerance), float("-inf")
    for layer in candidates(objective.num_layers):
        method = VTW(layer=layer)
        value = objective.value(method, f"without pictures from layer {layer} on")
        if value >= least:
            return SearchResult.of(objective, method)
        best = max(best, value)
    raise ConfigError(
        f"visual tokens are needed in every layer: the best withdrawal is worth {best:.4f}, asked "
        f"are {least:.4f}; a larger --tolerance works"
    )
