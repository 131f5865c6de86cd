"""Engines that reply to prompts. `embedded` samples from the trainer's own module."""
