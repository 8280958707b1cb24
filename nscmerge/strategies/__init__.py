"""Learning a merge of bases that are too large for one device: Lightning strategies, named in YAML by class path."""

from nscmerge.strategies.check import check_strategy
from nscmerge.strategies.sharded import ShardedBase
from nscmerge.strategies.split import SplitBase

__all__ = ["ShardedBase", "SplitBase", "check_strategy"]
