"""A page to look at: one base and its adapters, asked about the same picture side by side (``finetune app``)."""
