"""Optimizers, their parameter groups and learning-rate schedules."""

from slmjax.optim.build import make_optimizer
from slmjax.optim.groups import GROUPS, group_of, label_tree
from slmjax.optim.schedule import make_schedule, warmup_steps

__all__ = ["GROUPS", "group_of", "label_tree", "make_optimizer", "make_schedule", "warmup_steps"]
