"""``python -m memloc_ext`` is ``memloc``."""

from memloc_ext.cli import main

if __name__ == "__main__":
    main()
