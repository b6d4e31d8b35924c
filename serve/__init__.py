"""Serving: the HTTP API over a store's objects, and its deployment on Ray Serve."""
