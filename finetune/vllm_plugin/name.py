"""The name of the plugin in vLLM."""

NAME = "finetune_registry"  # of both entry points, and of the resolver in vLLM's own table
