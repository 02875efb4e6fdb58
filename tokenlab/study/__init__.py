"""Minutes-long reproductions with a verdict."""

from tokenlab.study.claims import Claim, Verdict, interval
from tokenlab.study.study import Study, StudyResult, run_study

__all__ = ["Claim", "Study", "StudyResult", "Verdict", "interval", "run_study"]
