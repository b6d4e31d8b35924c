"""What comes out: adapters, the bank that holds many at once, artifacts and their store."""
