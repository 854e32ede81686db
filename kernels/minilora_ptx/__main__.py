"""The entry of `python -m minilora_ptx`."""

from minilora_ptx.command import main

main()
