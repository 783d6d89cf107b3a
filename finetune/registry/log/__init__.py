"""The logs of adapters: their entries, the versions and aliases that these define, and what is checked of them."""
