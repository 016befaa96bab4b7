"""`python -m transcoder` is the command `transcode`."""

from transcoder.cli import main

main()
