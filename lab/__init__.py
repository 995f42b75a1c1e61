"""Attention Lab: what attention techniques and cache compression buy, and what they cost, on a real model."""

__version__ = "0.1.0"
