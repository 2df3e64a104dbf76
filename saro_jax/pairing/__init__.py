"""Pairs: from judged rollouts to preference pairs, step values and items for reward models."""
