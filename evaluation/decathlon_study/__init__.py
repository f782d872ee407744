"""The paper's study on three tasks of the Decathlon, as one command: ``nnunet_ima decathlon``."""

from nnunet_ima.evaluation.decathlon_study.study import STEPS, DecathlonStudy, Request

__all__ = ["STEPS", "DecathlonStudy", "Request"]
