"""The report room: what a finished run gained, cost and forgot, as one HTML page and one text table."""

from explora.reporting.continual import continual_table, write_continual
from explora.reporting.page import write_report
from explora.reporting.text import results_table, table

__all__ = ["continual_table", "results_table", "table", "write_continual", "write_report"]
