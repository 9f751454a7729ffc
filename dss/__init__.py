"""Distilling Step-by-Step: the student model, the dual-task batch and loss, decoding, metrics and checkpoints."""
