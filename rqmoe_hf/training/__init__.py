"""How weights come to be: initialisation, trainer, and one function that runs them."""

from .initialization import initialize
from .run import train_quantizer
from .trainer import RQMoETrainer, RQMoETrainingArguments

__all__ = ["RQMoETrainer", "RQMoETrainingArguments", "initialize", "train_quantizer"]
