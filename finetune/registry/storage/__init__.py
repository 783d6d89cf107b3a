"""The bytes of a registry: stores, blobs, and adapter folders on the disk."""
