"""The store of finished cells and everything that reads it."""
