"""Training: the loop and its parts, one file each.

    loop           `train`: steps, evaluation, checkpoints
    session        `TrainingSession`: the verbs of a step, on which the loop stands
    run            the parts of a run and its set-up
    config         `TrainConfig`, with the names of TrainingArguments
    batch_sampler  the samples of each step
    checks         errors that are raised before training or in a step
    precision      autocast and the loss scaler
    runtime        context managers for the run: modes, Ctrl-C, memory
    checkpoint     one checkpoint: write and read it
    run_folder     the folder of a run and its checkpoints: find, keep, delete
    folder_lock    one run at a time in a folder
    validation     evaluation during training, the best step, early stopping
    process        the process of a run, where there is only one
    distributed    several processes: DDP and FSDP2
    on_policy/     training on answers that the model samples: GRPO
    logs/          log.jsonl, run.json, the progress bar, trackers and callbacks
    optim/         the gradient of a step, parameter groups, learning rate, 8-bit AdamW, NEFTune

Begin with `loop`; it names the others in the order in which they are used.
"""
