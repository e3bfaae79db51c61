"""Parts of the trainer: rows of data, schedule, forward pass, checkpoints, and a quick evaluation."""
