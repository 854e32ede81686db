"""Adapter files in PEFT's format, and the check of the base that they belong to."""
