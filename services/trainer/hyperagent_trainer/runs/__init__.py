"""Files of a run, shared by the control process and the training process; imports no torch."""
