"""``python -m memloc_ext`` is ``memloc``."""

from memloc_ext.study.command_line import main

if __name__ == "__main__":
    main()
