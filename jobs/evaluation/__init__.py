"""Measuring personalized objects: the set to measure on, drawing and scoring by Ray Data, the pages."""
