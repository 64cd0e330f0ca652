"""Damaged and hostile files: how they are made, what opens them, and what runs them in processes that may die."""
