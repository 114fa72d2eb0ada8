"""One static HTML page about a run: plain data in, a file that opens without server or network out."""

from mmrep.report.data import PairSet, ReportData
from mmrep.report.page import write_report
from mmrep.report.read import read_run

__all__ = ["PairSet", "ReportData", "read_run", "write_report"]
