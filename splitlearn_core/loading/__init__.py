"""From a checkpoint to a part: where tensors come from, whose they are, and bringing them in."""
