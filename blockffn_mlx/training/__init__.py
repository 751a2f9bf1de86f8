"""Training: objectives, schedules, data and the trainer."""

from . import losses, schedule

__all__ = ["losses", "schedule"]
