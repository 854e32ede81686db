"""Data sets from files and the Hub, with columns of any name.

load_dataset.py   rows of a file or a Hub data set, with the options below
columns.py        columns of other names → the keys of a known shape
conversation.py   prompt and completion → messages; a system message for each row
proposal.py       the likely meaning of unknown columns
hub_files.py      the files of a data set on the Hub
"""
