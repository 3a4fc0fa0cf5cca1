"""``python -m tests.agent``: torchrun of one of two hosts, which starts once both have imported it.

They would otherwise come as far apart as this machine is busy. Its process id lies in the file agentN of this folder.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from torch.distributed.run import main

if __name__ == "__main__":
    fresh = Path(f"agent{os.environ['NODE_RANK']}.fresh")
    fresh.write_text(str(os.getpid()))
    fresh.rename(fresh.stem)
    while not (Path("agent0").exists() and Path("agent1").exists()):
        time.sleep(0.02)
    main()
