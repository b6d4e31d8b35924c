"""Measuring: encoders, scores, the ruler, summaries and reports."""
