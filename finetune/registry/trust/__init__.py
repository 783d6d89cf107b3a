"""Keys and signatures, the trust policy of a reader, and the rollback protection."""
