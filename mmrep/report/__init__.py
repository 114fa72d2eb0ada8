"""One static HTML page about a run: plain data in, a file that opens without server or network out."""

from mmrep.report.data import PairSet, ReportData
from mmrep.report.from_run import read_run, report_run
from mmrep.report.page import write_report

__all__ = ["PairSet", "ReportData", "read_run", "report_run", "write_report"]
