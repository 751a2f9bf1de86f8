"""Training: objectives, schedules, data and the trainer."""
