"""Keys, the trust policy of a reader, and what the reader remembers against a rollback."""
