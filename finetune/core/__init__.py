"""Parts that every room uses: rows and batches, files and caches, strict readers, text from outside."""
