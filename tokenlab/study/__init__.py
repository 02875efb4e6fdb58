"""Minutes-long reproductions with a verdict."""

from tokenlab.study.claims import Bound, Claim, Verdict, interval
from tokenlab.study.study import Study, StudyResult, run_study
from tokenlab.study.trial import Measured, Trial

__all__ = [
    "Bound",
    "Claim",
    "Measured",
    "Study",
    "StudyResult",
    "Trial",
    "Verdict",
    "interval",
    "run_study",
]
