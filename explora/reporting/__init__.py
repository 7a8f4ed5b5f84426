"""The report room: what a finished run gained, cost and forgot, as one HTML page and one text table."""

from explora.reporting.comparison import is_comparison
from explora.reporting.continual import continual_table, write_continual
from explora.reporting.leaderboard import leaderboard_table, write_leaderboard
from explora.reporting.page import write_report
from explora.reporting.side import write_side
from explora.reporting.side_table import side_table
from explora.reporting.text import results_table, table

__all__ = [
    "continual_table",
    "is_comparison",
    "leaderboard_table",
    "results_table",
    "side_table",
    "table",
    "write_continual",
    "write_leaderboard",
    "write_report",
    "write_side",
]
