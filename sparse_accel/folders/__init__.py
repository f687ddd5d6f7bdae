"""Model folders: what is in them, and how they are opened."""
