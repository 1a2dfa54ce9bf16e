"""Entry point of ``python -m lora_ext``, the command line."""

import sys

from lora_ext.cli import main

if __name__ == "__main__":
    sys.exit(main())
