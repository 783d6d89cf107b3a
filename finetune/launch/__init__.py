"""What stands around a process of ours: the launcher, its children, the hardware, ports, and the shape of a command.

``python -m finetune.launch`` is the body of ``launch.sh``.
"""
