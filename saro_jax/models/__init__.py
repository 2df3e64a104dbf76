"""The one decoder, and the checkpoints it is read from and written to."""
