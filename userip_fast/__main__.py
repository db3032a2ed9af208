"""`python -m userip_fast` is `userip`."""

from userip_fast.cli import main

main()
