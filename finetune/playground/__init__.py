"""A page that shows the answers of one base and its adapters to the same image side by side (``finetune app``)."""
