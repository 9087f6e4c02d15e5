"""The commands that are nothing else, one file each."""
