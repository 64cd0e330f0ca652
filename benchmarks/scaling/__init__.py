"""The stages of compressing a corpus whose cost is measured, and how it grows."""

from .memory import MEMORIES
from .stages import STAGES, Stage

__all__ = ["MEMORIES", "STAGES", "Stage"]
