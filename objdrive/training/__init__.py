"""One-shot fine-tunes: recipe, prototype, losses, views and the loop."""
