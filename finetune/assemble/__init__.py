"""From a recipe to live objects: the base, its batches, and the rows. Nothing else is done here."""
