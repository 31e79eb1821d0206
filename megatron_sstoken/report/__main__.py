"""The program: read what a run has written, and make a page of it, or a list of its samples."""

import sys

from megatron_sstoken.report.program import main

if __name__ == "__main__":
    sys.exit(main())
