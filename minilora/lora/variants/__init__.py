"""Variants of LoRA: DoRA, PiSSA and LoftQ."""
