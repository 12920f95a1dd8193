"""Running programs: one executor, driven in lock-step or over torch.distributed."""
