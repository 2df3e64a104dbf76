"""Training machinery: step, loop, optimizer, checkpoint, metrics, scoring."""
