"""Data: rows, their tokens and masks, packed fixed-shape batches."""
