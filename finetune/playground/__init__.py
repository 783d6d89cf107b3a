"""A page to look at: one base and its adapters, asked about the same image side by side (``finetune app``)."""
