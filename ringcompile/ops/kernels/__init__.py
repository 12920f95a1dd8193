"""Block-attention kernels behind one contract, and the merge of their results.

Every kernel returns the attention of its block and the log-sum-exp (LSE) of its scores, from which
blocks merge into the attention over all keys. What a kernel takes, and where its LSE departs from
the contract, is told beside it; `attend` picks the first row of the table that fits. Forward only.
"""

from ringcompile.ops.kernels.merging import merge
from ringcompile.ops.kernels.select import attend, attend_merge, providers, unseen

__all__ = ["attend", "attend_merge", "merge", "providers", "unseen"]
