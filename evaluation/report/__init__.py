"""One page, and tables, that say what evaluations found: for people who were not there."""

from nnunet_ima.evaluation.report.report import write_report

__all__ = ["write_report"]
