"""Tools around models and runs.

inspect.py            describe a folder, a file or an adapter
verify.py             compare a 4-bit checkpoint tensor by tensor
compare_exports.py    compare a trained model in all its forms
compare_runs.py       a table of several runs
check_training.py     check that a model trains correctly
merge_figures.py      the figures of a merge, from the weights
merge_report.py       the error of merging into each storage
merge_figures.py      the figures of a merge that the weights show
merge_conclusions.py  the sentence that ends the report of a merge
model_card.py         write the model card
push_to_hub.py        upload a folder to the Hub
environment.py        the machine and the installation, for a bug report
sweep.py              search over options of a run
memory_plan/          the memory of a run, before it starts
trace/                every intermediate of a step by name
plot/                 pictures
"""
