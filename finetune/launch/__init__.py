"""The processes of commands: the launcher, child processes, hardware, ports, and what all commands share.

``python -m finetune.launch`` is the body of ``launch.sh``.
"""
