"""What comes in: rows and their rules, readers, sources, photos, geometry and masks."""
