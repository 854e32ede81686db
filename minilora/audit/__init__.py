"""What a checkpoint is, and whether it is right: read from the files, without a model."""
