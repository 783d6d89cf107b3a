"""``python -m finetune.launch``; see ``launcher``."""

import sys

from finetune.launch.launcher import main

sys.exit(main())
