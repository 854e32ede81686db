"""The command line: one file a command group.

main.py          the program: parse, run, print errors
parser.py        the argument parser: exact names, short errors
options.py       positional arguments and options that several commands share
values.py        option values, read by the types of the fields that they set; TOML files
train.py         train, sweep, check-training
chat.py          chat
text.py          generate, serve
evaluate.py      evaluate
checkpoints.py   merge, verify, compare-exports, inspect, push
export.py        export
plan.py          plan, env
preview.py       preview, the data options, and the lines that train prints about its data
plot.py          plot
runs.py          runs
"""
