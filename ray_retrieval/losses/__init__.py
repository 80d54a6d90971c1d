"""Pairwise objectives and the cross-batch memory."""
