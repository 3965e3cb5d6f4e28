"""Reports: statistics, tables and figures of finished comparisons."""

from experiments.report.build import Report, build
from experiments.report.load import Arm, References, load_arm, save_baselines
from experiments.report.pages import write

__all__ = ["Arm", "References", "Report", "build", "load_arm", "save_baselines", "write"]
