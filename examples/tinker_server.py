"""Serve Tinker's API on one machine, with many tenants on one base model.

Run `pip install --no-build-isolation '.[tenants]'`, then
`python examples/tinker_server.py --model DIR --store DIR`.
The unmodified SDK connects to the server if `TINKER_BASE_URL` is the server's address and
`TINKER_API_KEY` begins with `tml-`. See docs/tenants.md.
"""

from lora_ext.server.tinker import main

if __name__ == "__main__":
    main()
