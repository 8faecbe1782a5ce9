"""`python -m vispress.bench PLAN ...`: `vispress bench` for launchers of several processes.

`accelerate launch --multi_gpu --num_processes 8 -m vispress.bench offline --device cuda`
"""

import sys

from vispress.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "bench")
    main()
