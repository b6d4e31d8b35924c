"""A catalog's pictures: objects of a store, drawn by a list of prompts."""
