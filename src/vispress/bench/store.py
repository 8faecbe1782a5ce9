"""Results folders, under the name they had before `vispress.bench.results`."""

from vispress.bench.results.opening import open_results
from vispress.bench.results.store import read_results

__all__ = ["open_results", "read_results"]
