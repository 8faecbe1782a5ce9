"""A report that is read when it is looked at."""

from collections.abc import Callable
from html import escape
from typing import Any

from vispress.errors import CompressionStateError
from vispress.report import CompressionReport


class ReportView:
    """Reads like the `CompressionReport` of the model's last prefill, at the time of reading."""

    def __init__(self, read: Callable[[], CompressionReport]) -> None:
        self._read: Callable[[], CompressionReport] | None = read
        self._last: CompressionReport | CompressionStateError | None = None

    def close(self) -> None:
        """Keep the last report, and let go of the model."""
        if self._read is not None:
            try:
                self._last = self._read()
            except CompressionStateError as error:
                self._last = error.with_traceback(None)
        self._read = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.report, name)

    @property
    def report(self) -> CompressionReport:
        """Give the report itself.

        Raises:
            CompressionStateError: As `compression_report`.
        """
        if self._read is not None:
            return self._read()
        if not isinstance(self._last, CompressionReport):
            raise CompressionStateError(f"{self._last}; the block has ended")
        return self._last

    def __str__(self) -> str:
        return str(self.report)

    def __repr__(self) -> str:
        try:
            return f"<report of the last prefill>\n{self.report}"
        except CompressionStateError as error:
            return f"<no report: {error}>"

    def _repr_html_(self) -> str:
        try:
            return self.report._repr_html_()
        except CompressionStateError as error:
            return f"<p>no report: {escape(str(error))}</p>"
